"""The guest image: inputs to four files in one folder, whole or not at all."""

from __future__ import annotations

import ast
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from builder import debs, initrd, kernel, manifest, packages, pyroot, stamp
from builder.crun import static_crun
from builder.errors import BuildError
from builder.root import RootInputs, build_root
from builder.run import say

FILES = ("vmlinuz", "vmlinux", "initrd.img", "root.erofs")


@dataclass(frozen=True)
class Project:
    """Where this project's own inputs lie."""

    top: Path

    @property
    def init(self) -> Path:
        """The static init of the initramfs."""
        return self.top / "build/guest/init"

    @property
    def helper(self) -> Path:
        """The exec helper."""
        return self.top / "build/guest/hv-exec"

    def agent_sources(self) -> dict[str, Path]:
        """The agent's package, and of `hypervisor` nothing but what makes it importable."""
        package = self.top / "hypervisor"
        files = [package / "__init__.py", package / "version.py", *sorted((package / "agent").rglob("*.py"))]
        return {str(f.relative_to(self.top)): f for f in files}

    def wire_version(self) -> int:
        """VERSION in hypervisor/agent/wire.py, read without importing it.

        :raises BuildError: there is no such line
        """
        path = self.top / "hypervisor/agent/wire.py"
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VERSION":
                return int(ast.literal_eval(node.value))
        raise BuildError(f"{path} has no VERSION")


def build_image(project: Project, out: Path, cache: Path, *, force: bool = False) -> bool:
    """Brings `out` up to date; whether anything had to be built.

    The files are made aside and then renamed into place, the manifest last: a folder with a manifest has fitting files.

    :raises BuildError: on failure `out` is as it was
    """
    out, cache = out.resolve(), cache.resolve()  # the guest's Python mistakes relative paths for its own
    chosen = _resolve_packages(cache)
    inputs = stamp.digest(
        {name: deb.sha256 for name, deb in chosen.items()},
        {**project.agent_sources(), "init": project.init, "hv-exec": project.helper},
    )
    if not force and stamp.is_current(out, inputs) and not manifest.damaged_files(out):
        say(f"{out.name} is up to date")
        return False
    debs.fetch(chosen.values(), cache)
    unpacked = {name: debs.unpack(deb, cache) for name, deb in chosen.items()}
    crun = static_crun(chosen, unpacked, cache)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=out) as scratch:
        finished = Path(scratch) / "finished"
        finished.mkdir()
        _make_files(project, chosen, unpacked, crun, Path(scratch), finished)
        stamp.replace(finished, out, (*FILES, "manifest.json"), inputs)
    sizes = ", ".join(f"{name} {(out / name).stat().st_size / 1e6:.1f} MB" for name in FILES)
    say(f"{out.name} is ready: {sizes}")
    return True


def _resolve_packages(cache: Path) -> dict[str, debs.Deb]:
    names = [packages.KERNEL_METAPACKAGE, *packages.ROOT_PACKAGES, *packages.BUILD_PACKAGES]
    return debs.resolve(names, cache, expand={packages.KERNEL_METAPACKAGE: debs.kernel_package})


def _make_files(
    project: Project, chosen: Mapping[str, debs.Deb], unpacked: Mapping[str, Path], crun: Path, scratch: Path,
    finished: Path,
) -> None:  # fmt: skip
    if not project.init.is_file():
        raise BuildError(f"{project.init} is not built; run `make native` in the project's root first")
    package = next(path for name, path in unpacked.items() if name.startswith("linux-image-"))
    release = kernel.release_of(package)
    say(f"kernel {release}")
    python = pyroot.assemble(unpacked, scratch / "python")
    shutil.copyfile(package / f"boot/vmlinuz-{release}", finished / "vmlinuz")
    kernel.extract(python, finished / "vmlinuz", finished / "vmlinux")
    modules = initrd.resolve_modules(packages.MODULES, package)
    initrd.write_initrd(finished / "initrd.img", project.init, modules)
    say(f"initrd with {len(modules)} modules")
    rooted = {name: path for name, path in unpacked.items() if name not in packages.BUILD_PACKAGES}
    inputs = RootInputs(rooted, project.agent_sources(), project.helper, crun, python)
    build_root(inputs, scratch, finished / "root.erofs")
    description = manifest.describe(
        finished,
        release=release,
        packages={name: deb.version for name, deb in chosen.items()},
        modules=[m.stem for m in modules],
        wire_version=project.wire_version(),
    )
    manifest.write(finished / "manifest.json", description)
