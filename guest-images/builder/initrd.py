"""The initramfs: our static init and the kernel modules, as an uncompressed cpio archive.

Uncompressed, because the kernel would spend more time (TCG) on unpacking than on copying 2 MB.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Sequence
from pathlib import Path

from builder import elf
from builder.errors import BuildError

# struct module_signature: algorithm, hash, type of id, lengths of signer and key id, padding, length of the signature
_SIGNATURE_TRAILER = struct.Struct(">5B3xI")
_SIGNATURE_MAGIC = b"~Module signature appended~\n"
_DIRECTORIES = ("dev", "etc", "modules", "proc", "root", "sys")


def resolve_modules(wanted: Sequence[str], kernel_tree: Path) -> list[Path]:
    """The module files for `wanted`, in order, each behind those that it depends on.

    :param kernel_tree: the unpacked kernel package
    :raises BuildError: a module is not in the package
    """
    found = {p.stem.replace("-", "_"): p for p in kernel_tree.glob("lib/modules/*/kernel/**/*.ko")}
    ordered: list[Path] = []

    def add(name: str) -> None:
        path = found.get(name.replace("-", "_"))
        if path is None:
            raise BuildError(f"kernel module {name} is not in {kernel_tree.name} (built in, renamed or compressed?)")
        if path in ordered:
            return
        for dependency in filter(None, elf.module_info(path).get("depends", "").split(",")):
            add(dependency)
        ordered.append(path)

    for name in wanted:
        add(name)
    return ordered


def write_initrd(target: Path, init: Path, modules: Sequence[Path]) -> None:
    """Writes the archive: /init, /etc/modules, /modules/*.ko, mount points and /dev/console.

    The bytes depend on nothing but the contents of `init` and `modules` and their order.
    """
    cpio = _Cpio()
    for name in _DIRECTORIES:
        cpio.add(name, stat.S_IFDIR | 0o755)
    # The kernel opens it as init's standard input and output before anything could have been mounted.
    cpio.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    cpio.add("init", stat.S_IFREG | 0o755, init.read_bytes())
    cpio.add("etc/modules", stat.S_IFREG | 0o644, "".join(f"{m.stem}\n" for m in modules).encode())
    for module in modules:
        cpio.add(f"modules/{module.name}", stat.S_IFREG | 0o644, without_signature(module.read_bytes()))
    target.write_bytes(cpio.finish())


def without_signature(module: bytes) -> bytes:
    """A kernel module without the signature that Debian appended.

    Checking it costs the guest 5 ms a module under TCG (RSA and SHA-256) and proves nothing here: the host has checked
    the digest of the whole initramfs, and no lockdown asks for signatures. The kernel marks itself tainted (E).
    """
    if not module.endswith(_SIGNATURE_MAGIC):
        return module
    end = len(module) - len(_SIGNATURE_MAGIC) - _SIGNATURE_TRAILER.size
    *_, length = _SIGNATURE_TRAILER.unpack_from(module, end)
    return module[: end - length]


class _Cpio:
    """A "newc" archive in the making; all times 0, all owners root."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0

    def add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        raw = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(raw), 0)
        self._data += b"070701" + b"".join(b"%08X" % f for f in fields) + raw
        self._pad()
        self._data += content
        self._pad()

    def finish(self) -> bytes:
        self._inode = -1  # the trailer's number is 0
        self.add("TRAILER!!!", 0)
        return bytes(self._data)

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)
