"""L1's kernel, initramfs and root disk, made of Debian packages by name; the same machinery as the guest image's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from builder import debs, initrd, kernel
from builder.errors import BuildError
from builder.run import output_of

from lane import packages
from lane.suite import Suite, suite

_HERE = Path(__file__).parent
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/bin/false\n",
    "etc/group": "root:x:0:\nkvm:x:104:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "etc/hosts": "127.0.0.1 localhost l1\n",
    "etc/resolv.conf": "",
}
_MERGED = ("bin", "sbin", "lib", "lib64")


@dataclass(frozen=True)
class RootDisk:
    """Files of L1, ready to boot."""

    kernel: Path
    initrd: Path
    disk: Path


def root_disk(folder: Path, qemu: str = "stable") -> RootDisk:
    """L1's, as today's packages make it; taken from `folder` when it was made of the same ones before.

    :param qemu: of `suite.QEMUS`

    :raises BuildError: apt does not know a package, or a tool is missing
    """
    source = suite(qemu, folder)
    chosen = _closure([*packages.ROOT_PACKAGES, packages.KERNEL_METAPACKAGE], source)
    inputs = [sorted(d.sha256 for d in chosen.values()), *(_digest(p) for p in _recipe())]
    made = folder / f"root-{qemu}-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]}"
    if not made.is_dir():
        print(f"kvm-lane: making L1's root disk of {len(chosen)} Debian packages", flush=True)
        debs.fetch(chosen.values(), source.cache, options=source.options)
        _make(chosen, source.cache, made)
        for old in folder.glob(f"root-{qemu}-*"):
            if old != made:
                shutil.rmtree(old, ignore_errors=True)
    return RootDisk(made / "vmlinuz", made / "initrd", made / "root.erofs")


def _recipe() -> list[Path]:
    return [_HERE / "packages.py", _HERE / "rootdisk.py", _HERE / "inside/init"]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _closure(wanted: list[str], source: Suite) -> dict[str, debs.Deb]:
    """What apt would install for `wanted` on a machine that has nothing, `packages.LEFT_OUT` left out."""
    with tempfile.TemporaryDirectory() as empty:  # apt does not name what it has downloaded already
        own = ("Dir::State::status=/dev/null", f"Dir::Cache::archives={empty}", "Debug::NoLocking=1")
        options = [*source.options, *(word for option in own for word in ("-o", option))]
        argv = ["apt-get", "-q", "-y", *options, "--no-install-recommends", "--print-uris", "install", *wanted]
        text = output_of(argv)
    names = {line.split()[1].split("_")[0] for line in text.splitlines() if line.startswith("'")}
    if not names:
        raise BuildError("apt named no package; run `apt-get update` as root")
    return debs.resolve(names - set(packages.LEFT_OUT), source.cache, options=source.options)


def _make(chosen: dict[str, debs.Deb], cache: Path, made: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".root-", dir=made.parent) as scratch:
        tree, out = Path(scratch, "tree"), Path(scratch, "out")
        out.mkdir()
        _unpack([cache / d.file for d in chosen.values()], tree)
        release = kernel.release_of(tree)
        shutil.copy(tree / f"boot/vmlinuz-{release}", out / "vmlinuz")
        _write_initrd(tree, Path(scratch, "initrd"), out / "initrd")
        _finish(tree)
        output_of(["mkfs.erofs", "-T0", "--all-root", "--quiet", str(out / "root.erofs"), str(tree)])
        out.rename(made)


def _unpack(archives: list[Path], tree: Path) -> None:
    for name in _MERGED:
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    for archive in archives:
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True).stdout
        # the links of a merged /usr must stay links when a package names /bin as a folder
        untar = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", tree]
        subprocess.run(untar, input=data, check=True)


def _finish(tree: Path) -> None:
    """What packages' own scripts would have done, as far as the lane needs it."""
    for name in packages.USELESS:
        shutil.rmtree(tree / name, ignore_errors=True)
    for name, text in _FILES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    for name in ("proc", "sys", "dev", "run", "tmp", "root", "podvisor", "lower"):
        (tree / name).mkdir(exist_ok=True)
    # the file system has no times: compiled modules that name their source's would count as old
    compile_all([tree / "usr/lib/python3.11"])


def compile_all(folders: list[Path]) -> None:
    """Compiles every Python module below `folders`, valid whatever the sources' times."""
    argv = [sys.executable, "-m", "compileall", "-q", "-j2", "--invalidation-mode", "unchecked-hash", *folders]
    subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # test data that is no Python is there


def _write_initrd(tree: Path, folder: Path, target: Path) -> None:
    modules = initrd.resolve_modules(packages.MODULES, tree)
    for name in ("bin", "modules", "proc", "sys", "dev", "new", "ro", "rw", "project"):
        (folder / name).mkdir(parents=True)
    shutil.copy(tree / "usr/bin/busybox", folder / "bin/busybox")
    shutil.copy(_HERE / "inside/init", folder / "init")
    (folder / "init").chmod(0o755)
    for module in modules:
        (folder / "modules" / module.name).write_bytes(initrd.without_signature(module.read_bytes()))
    (folder / "modules/order").write_text("".join(f"{m.name}\n" for m in modules))
    names = b"".join(os.fsencode(p.relative_to(folder)) + b"\0" for p in sorted(folder.rglob("*")))
    with target.open("wb") as out:
        argv = ["cpio", "--quiet", "-o0", "-H", "newc", "-R", "0:0"]
        subprocess.run(argv, input=names, stdout=out, cwd=folder, check=True)
