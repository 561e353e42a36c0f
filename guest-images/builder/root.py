"""root.erofs: the agent's read-only root. Python and the part of its library that the agent needs, crun, the agent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from builder import bundle, packages, pyroot, seccomp, tree
from builder.errors import BuildError
from builder.run import output_of, say

AGENT_FOLDER = "usr/lib/podvisor"
_ENTRY = Path(__file__).parent.parent / "guest/agent_main.py"

# Mount points of init (csrc/guest/init.c) and of the agent; /etc/resolv.conf and its like lead into the writable /run.
_DIRECTORIES = ("data", "dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "var", AGENT_FOLDER, tree.LIBRARIES)
_LINKS = {
    "etc/mtab": "../proc/self/mounts",
    "etc/resolv.conf": "../run/podvisor/resolv.conf",
    "etc/hosts": "../run/podvisor/hosts",
    "etc/hostname": "../run/podvisor/hostname",
    "usr/bin/python3": "python3.11",
    "var/run": "../run",
    "var/tmp": "../tmp",
}
_TEXTS = {
    "etc/passwd": "root:x:0:0:root:/:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}


@dataclass(frozen=True)
class RootInputs:
    """Where the parts come from."""

    packages: Mapping[str, Path]  # unpacked, by name
    agent_sources: Mapping[str, Path]  # path below the agent's folder -> file of this project
    helper: Path  # hv-exec
    crun: Path  # static
    python: pyroot.GuestPython  # with the whole standard library


def build_root(inputs: RootInputs, scratch: Path, target: Path) -> None:
    """Makes the tree below `scratch` and packs it as `target`.

    :raises BuildError: a package lacks something, or the agent imports what is not packed
    """
    root, agent = scratch / "root", scratch / "agent"
    tree.lay_out(root, _DIRECTORIES)
    _install_texts(root)
    tree.copy_file(inputs.crun, root / "usr/bin/crun")
    tree.copy_file(inputs.packages["python3.11-minimal"] / "usr/bin/python3.11", root / "usr/bin/python3.11")
    _install_busybox(inputs.packages["busybox-static"] / "bin/busybox", root)
    if inputs.helper.is_file():
        tree.copy_file(inputs.helper, root / AGENT_FOLDER / "hv-exec")
    else:
        say(f"warning: {inputs.helper} is not built; containers of this image cannot be exec'ed into")
    _install_seccomp(inputs.packages["golang-github-containers-common"], root)
    for name, source in inputs.agent_sources.items():
        tree.copy_file(source, agent / name)
    _install_python(inputs.python, agent, root)
    tree.install_libraries(root, [*inputs.packages.values()])
    tree.pack_erofs(root, target, label="podvisor-root")


def _install_texts(root: Path) -> None:
    for name, text in _TEXTS.items():
        (root / name).write_text(text)
    for name, link in _LINKS.items():
        (root / name).symlink_to(link)


def _install_busybox(source: Path, root: Path) -> None:
    """A shell and its tools, for who debugs a guest; what is packed already keeps its name."""
    program = root / "usr/bin/busybox"
    tree.copy_file(source, program)
    for applet in output_of([str(program), "--list"]).split():
        if not (root / "usr/bin" / applet).is_symlink() and not (root / "usr/bin" / applet).exists():
            (root / "usr/bin" / applet).symlink_to("busybox")


def _install_seccomp(package: Path, root: Path) -> None:
    try:
        profile = json.loads((package / "usr/share/containers/seccomp.json").read_text())
    except (OSError, ValueError) as e:
        raise BuildError(f"{package.name} has no usable usr/share/containers/seccomp.json: {e}") from e
    text = json.dumps(seccomp.narrow(profile), indent=None, separators=(",", ":"), sort_keys=True)
    (root / AGENT_FOLDER / "seccomp.json").write_text(text)


def _install_entry(python: pyroot.GuestPython, root: Path) -> None:
    """The script that init executes, compiled: a script's source would be compiled at each start."""
    target = root / AGENT_FOLDER / "agent_main.pyc"
    python.ask("compile", jobs=[[str(_ENTRY), str(target), f"/{AGENT_FOLDER}/{_ENTRY.name}"]], optimize=0)


def _install_python(python: pyroot.GuestPython, agent: Path, root: Path) -> None:
    selection = pyroot.select(python, agent, packages.EXTRA_PYTHON_MODULES, packages.EXCLUDED_PYTHON_MODULES)
    pyroot.install(python, selection, root)
    names = pyroot.install_agent(python, agent, root, AGENT_FOLDER)
    pyroot.check_imports(python, root, AGENT_FOLDER, [*packages.EXTRA_PYTHON_MODULES, *names])
    bundle.write_bundle(python, root, AGENT_FOLDER, root / AGENT_FOLDER / "modules.bundle")
    _install_entry(python, root)
    say(f"packed {len(selection.sources)} Python modules and {len(selection.extensions)} extensions")
