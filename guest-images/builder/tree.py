"""Folders that become file systems: merged from packages, checked for missing libraries, packed with fixed metadata."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from builder import elf
from builder.errors import BuildError
from builder.run import output_of

LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = f"{LIBRARIES}/ld-linux-x86-64.so.2"
_USR_MERGE = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"}


def lay_out(root: Path, directories: Iterable[str]) -> None:
    """Makes `root` with the merged-/usr links and `directories`."""
    for name, target in _USR_MERGE.items():
        (root / target).mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)
    for directory in directories:
        (root / directory).mkdir(parents=True, exist_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file (a link's target, not the link) with its execute bits."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def merge(source: Path, target: Path) -> None:
    """Copies a folder's files into another that may exist; links are copied as links."""
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def without_libraries(folder: Path, packages: Sequence[Path]) -> list[Path]:
    """The ELF files below `folder` that need a library which none of `packages` has."""
    offered = _offered_libraries(packages)
    return [p for p in _elf_files(folder) if any(name not in offered for name in elf.needed_libraries(p))]


def install_libraries(root: Path, packages: Sequence[Path], *, optional: bool = False) -> None:
    """Copies every shared library that the ELF files below `root` need, and those that these need, and the loader.

    :param packages: unpacked packages to take them from
    :param optional: leave out what is in none of them
    :raises BuildError: a library is in none of them
    """
    offered = _offered_libraries(packages)
    pending = [name for path in _elf_files(root) for name in elf.needed_libraries(path)]
    done: set[str] = set()
    while pending:
        name = pending.pop()
        if name in done:
            continue
        done.add(name)
        if name not in offered:
            if optional:
                continue
            raise BuildError(f"no package in packages.py has the library {name}; add the one that does")
        target = root / LIBRARIES / name
        if not target.exists():
            copy_file(offered[name], target)
        pending += elf.needed_libraries(offered[name])
    loader = root / "usr/lib64" / Path(LOADER).name
    if done and not loader.is_symlink():
        copy_file(offered[loader.name], root / LOADER)
        (root / LOADER).chmod(0o755)
        loader.symlink_to(f"../../{LOADER}")


def pack_erofs(root: Path, target: Path, *, label: str, options: Sequence[str] = ()) -> None:
    """Packs `root` as an EROFS image whose bytes depend on nothing but names, modes and contents.

    :raises BuildError: mkfs.erofs is missing or failed
    """
    _fix_modes(root)
    tool = shutil.which("mkfs.erofs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "mkfs.erofs"
    fixed = ("-T0", "--all-root", "--force-uid=0", "--force-gid=0", "-x-1", f"-U{_fixed_uuid(label)}", "--quiet")
    output_of([tool, *fixed, *options, str(target), str(root)])


def _fixed_uuid(label: str) -> str:
    """A file system UUID that says nothing but the label: two builds must not differ in it."""
    raw = label.encode().ljust(16, b"\0")[:16].hex()
    return f"{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}"


def _fix_modes(root: Path) -> None:
    """Only execute bits count: the rest depends on the umask of whoever builds."""
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def _offered_libraries(packages: Sequence[Path]) -> dict[str, Path]:
    """Libraries by soname, as files or links to them, in the folders where Debian puts them."""
    offered: dict[str, Path] = {}
    for package in packages:
        for folder in (f"lib/{Path(LIBRARIES).name}", LIBRARIES):
            for path in sorted((package / folder).glob("*.so*")):
                if path.is_file():
                    offered.setdefault(path.name, path)
    return offered


def _elf_files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink() and elf.is_elf(p))
