"""The second disk: this project from its own wheel, its dependencies' wheels, the guest image, the tests.

Dependencies are kept by the digest of setup.cfg and of this file: a change of the project's code costs a wheel and a
disk.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from builder.run import output_of

from lane import coverage, packages
from lane.rootdisk import compile_all

ROOT = Path(__file__).parents[2]
_HERE = Path(__file__).parent
_SITE = ".venv/lib/python3.11/site-packages"
_HV = """#!/podvisor/.venv/bin/python
import sys
from hypervisor.cli.main import main
sys.exit(main())
"""
_IMAGE = ("manifest.json", "vmlinux", "vmlinuz", "initrd.img", "root.erofs", "samples")
_PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")


def project_disk(
    folder: Path, target: Path, command: Sequence[str], environment: Mapping[str, str], further: Mapping[str, Path]
) -> None:
    """Makes the disk at `target`.

    :param folder: where dependencies are kept
    :param command: what L1 runs, in the project's folder; its Python is ``.venv/bin/python``
    :param environment: what that finds in its environment, beside the usual
    :param further: files and folders by their name below the project's folder
    """
    dependencies = _dependencies(folder)
    with tempfile.TemporaryDirectory(prefix=".project-", dir=folder) as scratch:
        tree = Path(scratch, "tree")
        _lay_venv(tree)
        shutil.copytree(dependencies, tree / _SITE, symlinks=True, dirs_exist_ok=True)
        _install_wheel(Path(scratch), tree / _SITE)
        shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "setup.cfg", tree)
        for name in _IMAGE:
            _copy(ROOT / "guest-images/out" / name, tree / "guest-images/out" / name)
        shutil.copytree(_HERE / "inside", tree / "lane")
        coverage.write_rc(tree / "lane/coveragerc")
        exports = {"HV_GUEST_DIR": "/podvisor/guest-images/out", **environment}
        (tree / "lane/environment").write_text("".join(f"export {k}={shlex.quote(v)}\n" for k, v in exports.items()))
        (tree / "lane/command").write_text(shlex.join(command) + "\n")
        for name, path in further.items():
            _copy(path, tree / name)
        output_of(["mkfs.erofs", "-T0", "--all-root", "--quiet", str(target), str(tree)])


def _dependencies(folder: Path) -> Path:
    """A folder with the dependencies installed, as site-packages has them."""
    wanted = _requirements()
    key = hashlib.sha256(repr([wanted, sys.version_info[:2], Path(__file__).read_bytes()]).encode()).hexdigest()[:16]
    made = folder / f"wheels-{key}"
    if not made.is_dir():
        print(f"kvm-lane: installing {len(wanted)} dependencies for L1", flush=True)
        partial = folder / f".{made.name}"
        shutil.rmtree(partial, ignore_errors=True)
        output_of([*_PIP, "install", "--no-compile", "--target", str(partial), *wanted])
        compile_all([partial])
        for old in folder.glob("wheels-????????????????"):
            shutil.rmtree(old)
        partial.rename(made)
    return made


def _requirements() -> list[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    test = config["options.extras_require"]["test"].split("\n")
    chosen = [line for line in test if re.split(r"[ <>=]", line)[0] in packages.TEST_REQUIREMENTS]
    return [line for line in config["options"]["install_requires"].split("\n") if line] + chosen


def _install_wheel(scratch: Path, site: Path) -> None:
    """The wheel is built from a copy: building one in the checkout would leave files there for others to stumble on."""
    source, wheels = scratch / "source", scratch / "wheels"
    source.mkdir()
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.o", "*.cpython-*.so", "_*.c")
    for name in ("csrc", "hypervisor"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    output_of([*_PIP, "wheel", "--no-deps", "-w", str(wheels), str(source)])
    (wheel,) = wheels.glob("*.whl")
    # zipfile would lose the programs' execute bits; pip keeps them
    output_of([*_PIP, "install", "--no-deps", "--no-compile", "--target", str(site), str(wheel)])
    compile_all([site / "hypervisor"])


def _lay_venv(tree: Path) -> None:
    """A venv laid by hand: its Python is L1's own."""
    bin_folder = tree / ".venv/bin"
    bin_folder.mkdir(parents=True)
    for name in ("python", "python3"):
        (bin_folder / name).symlink_to("/usr/bin/python3.11")
    (tree / ".venv/pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    (bin_folder / "hv").write_text(_HV)
    (bin_folder / "hv").chmod(0o755)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        os.link(source, target) if source.stat().st_dev == target.parent.stat().st_dev else shutil.copy(source, target)
