"""The EROFS on-disk format, as far as an uncompressed image needs it: pure functions from values to bytes.

Only what Linux 5.10 already reads: extended inodes, data in whole blocks (``PLAIN``) or with the last, partial block
behind the inode (``INLINE``), extended attributes inline. See ``fs/erofs/erofs_fs.h`` in Linux.

An inode's number is its byte offset in the metadata area, divided by 32.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hypervisor.errors import InvalidInput

BLOCK = 4096
SLOT = 32
INODE = 64
NAME_LIMIT = 255
SYMLINK_LIMIT = 4095
XATTR_LIMIT = 65535
NO_BLOCK = 0xFFFFFFFF

_MAGIC = 0xE0F5E1E2
_SUPER_OFFSET = 1024
_SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23s")
_INODE = struct.Struct("<HHHHQIIIIQII16x")
_XATTR_HEADER = struct.Struct("<IB7x")
_XATTR_ENTRY = struct.Struct("<BBH")
_DIRENT = struct.Struct("<QHBx")

_COMPAT_CHECKSUM, _COMPAT_MTIME = 1, 2
_PLAIN, _INLINE = 0, 2

_XATTR_PREFIXES = (
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
)
_XATTR_WHOLE = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}
_XATTR_DROPPED = (b"trusted.overlay.", b"user.overlay.")
"""The guest's overlay would obey these as its own bookkeeping; they mean nothing in an image."""

_FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}


@dataclass(slots=True)
class Inode:
    """What is written for one inode. ``where`` is the first data block, or the device number of a device.

    :ivar xattrs: as :func:`encode_xattrs` made them
    :ivar inline: the last, partial block of the data lies behind the inode
    """

    mode: int
    uid: int
    gid: int
    mtime: tuple[int, int]
    nlink: int
    size: int
    where: int
    xattrs: bytes
    inline: bool
    number: int

    def encode(self) -> bytes:
        """The inode and its extended attributes."""
        xattr_slots = 1 + (len(self.xattrs) - _XATTR_HEADER.size) // 4 if self.xattrs else 0
        head = _INODE.pack(
            1 | (_INLINE if self.inline else _PLAIN) << 1,
            xattr_slots,
            self.mode,
            0,
            self.size,
            self.where,
            self.number & 0xFFFFFFFF,
            self.uid,
            self.gid,
            self.mtime[0] & 0xFFFFFFFFFFFFFFFF,
            self.mtime[1],
            self.nlink,
        )
        return head + self.xattrs


def device_number(major: int, minor: int) -> int:
    """As the kernel's ``new_encode_dev`` has it.

    :raises InvalidInput: Linux has no such numbers
    """
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        raise InvalidInput(f"no such device number: {major}:{minor}")
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12


def encode_xattrs(xattrs: Mapping[bytes, bytes]) -> bytes:
    """The inline attribute area, sorted by name; empty if nothing is left that EROFS can hold.

    :raises InvalidInput: a name or value, or all together, are too long
    """
    entries = b"".join(_encode_xattr(name, value) for name, value in sorted(xattrs.items()))
    if not entries:
        return b""
    if len(entries) > 4 * (0xFFFF - 1):
        raise InvalidInput("the extended attributes of one file take more than 256 KiB")
    return _XATTR_HEADER.pack(0, 0) + entries


def _encode_xattr(name: bytes, value: bytes) -> bytes:
    index, suffix = _xattr_index(name)
    if not index:
        return b""
    if len(suffix) > NAME_LIMIT or len(value) > XATTR_LIMIT:
        raise InvalidInput(f"an extended attribute is too long ({len(name)} bytes of name, {len(value)} of value)")
    entry = _XATTR_ENTRY.pack(len(suffix), index, len(value)) + suffix + value
    return entry + bytes(-len(entry) % 4)


def _xattr_index(name: bytes) -> tuple[int, bytes]:
    if name.startswith(_XATTR_DROPPED):
        return 0, b""
    if name in _XATTR_WHOLE:
        return _XATTR_WHOLE[name], b""
    for prefix, index in _XATTR_PREFIXES:
        if name.startswith(prefix) and len(name) > len(prefix):
            return index, name[len(prefix) :]
    return 0, b""


def directory_layout(names: Sequence[bytes]) -> list[tuple[int, int]]:
    """How sorted names (with ``.`` and ``..``) fall into blocks: for each block the end index and the bytes used."""
    blocks: list[tuple[int, int]] = []
    used = 0
    for index, name in enumerate(names):
        need = _DIRENT.size + len(name)
        if used + need > BLOCK:
            blocks.append((index, used))
            used = 0
        used += need
    blocks.append((len(names), used))
    return blocks


def directory_size(layout: Sequence[tuple[int, int]]) -> int:
    """Bytes of a directory's data."""
    return BLOCK * (len(layout) - 1) + layout[-1][1]


def directory_blocks(entries: Sequence[tuple[bytes, int, int]], layout: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """Each block of a directory; the last one is not padded.

    :param entries: sorted (name, inode number, mode)
    """
    start = 0
    for end, _used in layout:
        part = entries[start:end]
        offset = _DIRENT.size * len(part)
        head = []
        for name, nid, mode in part:
            head.append(_DIRENT.pack(nid, offset, _FILE_TYPES[stat.S_IFMT(mode)]))
            offset += len(name)
        block = b"".join(head) + b"".join(name for name, _, _ in part)
        yield block if end == len(entries) else block.ljust(BLOCK, b"\0")
        start = end


def superblock(*, root: int, inodes: int, blocks: int, meta_block: int, uuid: bytes, label: bytes) -> bytes:
    """Block 0 of the image.

    :param root: inode number of the root, below 65536
    :param blocks: of the whole image
    :param meta_block: where the metadata area begins
    """
    body = _SUPER.pack(
        _MAGIC,
        0,
        _COMPAT_CHECKSUM | _COMPAT_MTIME,
        BLOCK.bit_length() - 1,
        0,
        root,
        inodes,
        0,
        0,
        blocks,
        meta_block,
        0,
        uuid,
        label,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        bytes(23),
    )
    area = bytearray(body.ljust(BLOCK - _SUPER_OFFSET, b"\0"))
    area[4:8] = struct.pack("<I", _crc32c(area))
    return bytes(_SUPER_OFFSET) + bytes(area)


def _crc32c(data: bytes | bytearray) -> int:
    """Castagnoli's CRC as the kernel's ``crc32c(~0, ...)`` gives it: not inverted at the end."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc
