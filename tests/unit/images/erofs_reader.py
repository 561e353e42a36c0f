"""Reads an EROFS image: written from the format's documentation, independently of the writer under test."""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 4096
_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}


@dataclass
class Found:
    """One inode as read."""

    nid: int
    mode: int
    uid: int
    gid: int
    mtime: tuple[int, int]
    nlink: int
    size: int
    data: bytes
    rdev: int
    xattrs: dict[bytes, bytes]
    entries: dict[bytes, int] = field(default_factory=dict)

    @property
    def permissions(self) -> int:
        return stat.S_IMODE(self.mode)


class Image:
    """The files of an image by their paths (bytes, without a leading slash; the root is b"")."""

    def __init__(self, path: Path) -> None:
        self.bytes = path.read_bytes()
        fields = struct.unpack_from("<IIIBBHQQIIII16s16sI", self.bytes, 1024)
        assert fields[0] == 0xE0F5E1E2
        self.root_nid, self.inodes, self.blocks, self.meta = fields[5], fields[6], fields[9], fields[10]
        self.uuid, self.label = fields[12], fields[13]
        assert self.blocks * BLOCK == len(self.bytes)
        self.files: dict[bytes, Found] = {}
        self._walk()

    def __getitem__(self, path: str | bytes) -> Found:
        return self.files[path.encode() if isinstance(path, str) else path]

    def __contains__(self, path: str) -> bool:
        return path.encode() in self.files

    @property
    def paths(self) -> list[str]:
        return sorted(path.decode("utf-8", "surrogateescape") for path in self.files if path)

    def _walk(self) -> None:
        stack = [(b"", self.root_nid, self.root_nid)]
        while stack:
            path, nid, parent = stack.pop()
            found = self.files[path] = self._inode(nid)
            if stat.S_ISDIR(found.mode):
                found.entries = self._directory(found.data)
                assert found.entries.pop(b".") == nid
                assert found.entries.pop(b"..") == parent
                stack += [(path + b"/" + name if path else name, child, nid) for name, child in found.entries.items()]

    def _inode(self, nid: int) -> Found:
        at = self.meta * BLOCK + nid * 32
        layout, icount, mode, _, size, where, _, uid, gid, mtime, nanoseconds, nlink = struct.unpack_from(
            "<HHHHQIIIIqII", self.bytes, at
        )
        assert layout & 1, "extended inodes only"
        xattr_size = 12 + 4 * (icount - 1) if icount else 0
        behind = at + 64 + xattr_size
        data = self._data(layout >> 1, mode, size, where, behind)
        xattrs = self._xattrs(at + 64 + 12, at + 64 + xattr_size)
        return Found(nid, mode, uid, gid, (mtime, nanoseconds), nlink, size, data, where, xattrs)

    def _data(self, layout: int, mode: int, size: int, where: int, behind: int) -> bytes:
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISFIFO(mode) or not size:
            return b""
        if layout == 0:
            return self.bytes[where * BLOCK : where * BLOCK + size]
        assert layout == 2
        whole, tail = divmod(size, BLOCK)
        assert tail
        assert behind // BLOCK == (behind + tail - 1) // BLOCK, "a tail crosses a block"
        return self.bytes[where * BLOCK : (where + whole) * BLOCK] * bool(whole) + self.bytes[behind : behind + tail]

    def _xattrs(self, at: int, end: int) -> dict[bytes, bytes]:
        xattrs = {}
        while at < end:
            name_size, index, size = struct.unpack_from("<BBH", self.bytes, at)
            name = _PREFIXES[index] + self.bytes[at + 4 : at + 4 + name_size]
            xattrs[name] = self.bytes[at + 4 + name_size : at + 4 + name_size + size]
            at += 4 + name_size + size
            at += -at % 4
        return xattrs

    def _directory(self, data: bytes) -> dict[bytes, int]:
        entries: dict[bytes, int] = {}
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            count = struct.unpack_from("<QH", block)[1] // 12
            places = [struct.unpack_from("<QHB", block, 12 * index) for index in range(count)]
            for (nid, offset, kind), following in zip(places, [*places[1:], None], strict=True):
                name = block[offset : following[1] if following else len(block)].rstrip(b"\0")
                entries[name] = nid
                assert kind in range(1, 8)
        assert list(entries) == sorted(entries), "names must be sorted"
        return entries
