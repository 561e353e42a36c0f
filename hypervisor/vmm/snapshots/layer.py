"""A layer: pages of guest RAM in a file, with checksums.

Layout: the pages; a CRC-32 (32 bits, little-endian) for each frame of `FRAME_PAGES` pages, the last one of what is
left; and a foot: ``HVSLAYER``, version, number of pages, pages in a frame, CRC-32 of the table of checksums (32 bits
each). Pages come first, so that a page of the file is a page of guest RAM, to be mapped or copied as it is.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import zlib
from array import array
from pathlib import Path

from hypervisor.errors import InvalidInput

PAGE = 4096
FRAME_PAGES = 64
VERSION = 1
_MAGIC = b"HVSLAYER"
_FOOT = struct.Struct("<8sIIII")
_FRAME = FRAME_PAGES * PAGE

#: layers whose frames were found good, by (device, inode, size, mtime); the value is the layer's id
_verified: dict[tuple[int, int, int, int], str] = {}


class LayerWriter:
    """Writes a layer into an empty file; one thread at a time. `finish` completes it.

    :param fd: open for writing; stays the caller's
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._pending = bytearray()
        self._sums = array("I")
        self.pages = 0

    def add(self, page: bytes) -> int:
        """Appends a page; its number in the layer. :raises OSError: the disk is full"""
        self._pending += page
        self.pages += 1
        if len(self._pending) >= _FRAME:
            self._flush()
        return self.pages - 1

    def _flush(self) -> None:
        if self._pending:
            self._sums.append(zlib.crc32(self._pending))
            _write_all(self.fd, self._pending)
            self._pending.clear()

    def finish(self) -> str:
        """Completes the file; the layer's id. :raises OSError: the disk is full"""
        self._flush()
        tail = _tail(self._sums, self.pages)
        _write_all(self.fd, tail)
        identity = hashlib.sha256(tail).hexdigest()
        _verified[_seen(self.fd)] = identity
        return identity


def _tail(sums: array[int], pages: int) -> bytes:
    table = _little(sums)
    return table + _FOOT.pack(_MAGIC, VERSION, pages, FRAME_PAGES, zlib.crc32(table))


def _little(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers = array("I", numbers)
        numbers.byteswap()
    return numbers.tobytes()


def _write_all(fd: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _seen(fd: int) -> tuple[int, int, int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_layer(path: Path, identity: str, pages: int) -> None:
    """Reads a layer and looks whether it is what it was. Each file once, as long as size and time stay the same.

    :param identity: of `LayerWriter.finish`
    :raises InvalidInput: missing, truncated, changed, of another version or another layer
    """
    where = path.name
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as e:
        raise InvalidInput(f"cannot be read: {e.strerror}", where=where) from e
    try:
        if _verified.get(_seen(fd)) == identity:
            return
        sums = _read_sums(fd, identity, pages, where)
        for frame, expected in enumerate(sums):
            size = min(_FRAME, pages * PAGE - frame * _FRAME)
            data = os.pread(fd, size, frame * _FRAME)
            if len(data) != size or zlib.crc32(data) != expected:
                raise InvalidInput(f"was changed: the checksum of frame {frame} does not fit", where=where)
        _verified[_seen(fd)] = identity
    except OSError as e:
        raise InvalidInput(f"cannot be read: {e.strerror}", where=where) from e
    finally:
        os.close(fd)


def _read_sums(fd: int, identity: str, pages: int, where: str) -> array[int]:
    frames = -(-pages // FRAME_PAGES)
    size = pages * PAGE + 4 * frames + _FOOT.size
    if (there := os.fstat(fd).st_size) != size:
        raise InvalidInput(f"has {there} bytes instead of {size}", where=where)
    tail = os.pread(fd, size - pages * PAGE, pages * PAGE)
    magic, version, *_ = _FOOT.unpack(tail[-_FOOT.size :])
    if magic == _MAGIC and version != VERSION:
        raise InvalidInput(f"has version {version}; this release reads {VERSION}", where=where)
    if hashlib.sha256(tail).hexdigest() != identity:
        raise InvalidInput("was changed, or is another layer: its table of checksums does not fit", where=where)
    sums = array("I", tail[: 4 * frames])
    if sys.byteorder == "big":
        sums.byteswap()
    return sums
