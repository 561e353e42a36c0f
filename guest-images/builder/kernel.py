"""The kernel out of its package: its release, and the uncompressed kernel inside the compressed one.

Debian ships a bzImage: a small loader and an LZ4 archive of the real kernel, an ELF file. Guests boot that ELF file
itself, through its PVH entry: QEMU maps it from the page cache, once for all VMs, and the loader does not unpack 53 MB
with emulated instructions (0.5 s of each start under TCG). The price is that the loader also is what randomises the
kernel's address (KASLR), as in every VMM that boots an ELF kernel (Firecracker, Cloud Hypervisor).
"""

from __future__ import annotations

import struct
from pathlib import Path

from builder import tree
from builder.errors import BuildError
from builder.pyroot import GuestPython

_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_LARGEST_BLOCK = 8 << 20  # what one block of the legacy LZ4 format unpacks to
_SETUP_SECTORS = 0x1F1
_MAGIC = 0x202
_PAYLOAD = 0x248  # two 32-bit numbers: offset behind the setup code, length
_PT_NOTE = 4
_XEN_PHYS32_ENTRY = 18  # the note that holds the PVH entry point


def release_of(package: Path) -> str:
    """``uname -r`` of the kernel in an unpacked package.

    :raises BuildError: the package has no kernel, or two
    """
    names = [p.name.removeprefix("vmlinuz-") for p in package.glob("boot/vmlinuz-*")]
    if len(names) != 1:
        raise BuildError(f"{package.name} has {len(names)} kernels in /boot, not one")
    return names[0]


def extract(python: GuestPython, compressed: Path, target: Path) -> None:
    """Writes the ELF kernel inside a bzImage; the guest's own liblz4 unpacks it.

    :raises BuildError: not a bzImage, not compressed with LZ4, cut short, or without a PVH entry
    """
    python.ask(
        "unlz4",
        source=str(compressed),
        target=str(target),
        ranges=lz4_ranges(compressed.read_bytes()),
        largest=_LARGEST_BLOCK,
        library=str(python.prefix / tree.LIBRARIES / "liblz4.so.1"),
    )
    if not has_pvh_entry(target.read_bytes()):
        raise BuildError("the kernel has no PVH entry; QEMU could not boot it as an ELF file")


def lz4_ranges(image: bytes) -> list[tuple[int, int]]:
    """(offset, length) of each compressed block of the kernel inside a bzImage, in order.

    :raises BuildError: not a bzImage, compressed by another method, or cut short
    """
    if image[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise BuildError("the kernel package's vmlinuz is no bzImage")
    start, length = struct.unpack_from("<II", image, _PAYLOAD)
    begin = (image[_SETUP_SECTORS] + 1) * 512 + start
    if (magic := image[begin : begin + 4]) != _LZ4_LEGACY:
        raise BuildError(f"the kernel is not compressed with LZ4 (its payload begins {magic.hex()})")
    end = begin + length - 4  # the last four bytes are the unpacked size, for the loader
    ranges: list[tuple[int, int]] = []
    position = begin + 4
    while position < end:
        (size,) = struct.unpack_from("<I", image.ljust(position + 4, b"\0"), position)
        if not size or position + 4 + size > min(end, len(image)):
            raise BuildError("the kernel's LZ4 payload is cut short")
        ranges.append((position + 4, size))
        position += 4 + size
    return ranges


def has_pvh_entry(image: bytes) -> bool:
    """Whether an ELF kernel has the note by which QEMU finds its 32-bit entry point."""
    if image[:6] != b"\x7fELF\x02\x01":
        return False
    (table,) = struct.unpack_from("<Q", image, 32)
    size, count = struct.unpack_from("<HH", image, 54)
    for i in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", image, table + i * size)
        if kind == _PT_NOTE and _XEN_PHYS32_ENTRY in _note_types(image[offset : offset + length]):
            return True
    return False


def _note_types(notes: bytes) -> list[int]:
    """Types of the notes whose owner is Xen."""
    types: list[int] = []
    position = 0
    while position + 12 <= len(notes):
        name, description, kind = struct.unpack_from("<III", notes, position)
        if notes[position + 12 : position + 12 + name] == b"Xen\0":
            types.append(kind)
        position += 12 + (name + 3 & ~3) + (description + 3 & ~3)
    return types
