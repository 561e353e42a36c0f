"""A strict, streaming reader of tar archives: ustar, GNU and PAX, with sparse files.

Written for hostile input and for layers: names and extended attributes are bytes, every length is checked and bounded,
nothing is ever extracted, and what is not understood is refused instead of skipped. (The standard library's ``tarfile``
is lenient by design, and its header parsing has been the subject of several denial-of-service reports.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from hypervisor.errors import InvalidInput

BLOCK = 512
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12s")
_ZERO_BLOCK = bytes(BLOCK)
_XATTR = b"SCHILY.xattr."
_SPARSE_LIMIT = 1_000_000
"""Data regions of one sparse file."""


class Source(Protocol):
    """What an archive is read from; each call raises InvalidInput where the source ends too early."""

    def read(self, count: int) -> bytes:
        """Exactly so many bytes."""

    def read_some(self, limit: int) -> bytes:
        """At least one byte and at most ``limit``."""

    def read_if_any(self, count: int) -> bytes:
        """Exactly so many, or none if the source ends here."""

    def skip(self, count: int) -> None:
        """Pass over so many."""


class Kind(Enum):
    """What an entry is."""

    FILE = "file"
    LINK = "hard link"
    SYMLINK = "symlink"
    CHAR = "character device"
    BLOCK = "block device"
    DIRECTORY = "directory"
    FIFO = "fifo"


_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"S": Kind.FILE,
    b"1": Kind.LINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHAR,
    b"4": Kind.BLOCK,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}


@dataclass(slots=True)
class Entry:
    """One member.

    :ivar size: of the file in bytes, holes included
    :ivar mtime: seconds since 1970 (may be negative) and nanoseconds
    :ivar regions: of a sparse file, (offset, length) of its data, ascending; None for an ordinary file
    :ivar stored: bytes of data that follow in the archive
    """

    name: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    size: int
    mtime: tuple[int, int]
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    regions: list[tuple[int, int]] | None = None
    stored: int = 0

    @property
    def shown(self) -> str:
        """The name for people."""
        return show(self.name)


def show(name: bytes) -> str:
    """A name from an archive, safe to print and not endless."""
    text = ascii(name.decode("utf-8", "backslashreplace"))
    return text if len(text) <= 120 else f"{text[:50]}...{text[-60:]}"


class TarReader:
    """Entries of one archive. The data of the present entry must be taken, or is skipped, before the next one."""

    def __init__(self, stream: Source, *, header_limit: int) -> None:
        self._stream = stream
        self._header_limit = header_limit
        self._left = 0
        self._padding = 0

    def entries(self) -> Iterator[Entry]:
        """Each entry in turn.

        :raises InvalidInput: the archive is damaged, cut short, or uses what is not known
        """
        while (entry := self._next()) is not None:
            yield entry
            self._finish()

    def data(self) -> Iterator[bytes]:
        """What is left of the present entry's data, in pieces."""
        while self._left:
            piece = self._stream.read_some(self._left)
            self._left -= len(piece)
            yield piece

    def read(self, count: int) -> bytes:
        """So much of the present entry's data."""
        if count > self._left:
            raise InvalidInput("a sparse file's map is longer than its data")
        self._left -= count
        return self._stream.read(count)

    def _finish(self) -> None:
        self._stream.skip(self._left + self._padding)
        self._left = self._padding = 0

    def _start(self, size: int) -> None:
        self._left, self._padding = size, -size % BLOCK

    def _next(self) -> Entry | None:
        pax: dict[bytes, bytes] = {}
        sparse: list[tuple[bytes, bytes]] = []
        long_name = long_target = None
        extended = False
        while header := self._header():
            kind = header[156:157]
            extended = kind in (b"L", b"K", b"x")
            if kind == b"L":
                long_name = self._extended(header).rstrip(b"\0")
            elif kind == b"K":
                long_target = self._extended(header).rstrip(b"\0")
            elif kind == b"x":
                pax, sparse = _parse_pax(self._extended(header))
            elif kind == b"g":
                _parse_pax(self._extended(header))  # checked, and ignored as docker does
            else:
                return self._entry(header, pax, sparse, long_name, long_target)
        if extended:
            raise InvalidInput("the tar archive ends after an extended header")
        return None

    def _header(self) -> bytes | None:
        """The next header block; None at the end of the archive, which two zero blocks, or just the end, mark."""
        block = self._stream.read_if_any(BLOCK)
        if not block or block == _ZERO_BLOCK:
            return None
        _check_sum(block)
        return block

    def _extended(self, header: bytes) -> bytes:
        size = _number(header[124:136], "size")
        if not 0 <= size <= self._header_limit:
            raise InvalidInput(f"a tar header of {size} bytes; the limit is {self._header_limit}")
        data = self._stream.read(size)
        self._stream.skip(-size % BLOCK)
        return data

    def _entry(
        self,
        header: bytes,
        pax: dict[bytes, bytes],
        sparse: list[tuple[bytes, bytes]],
        long_name: bytes | None,
        long_target: bytes | None,
    ) -> Entry:
        entry, flag = _parse_header(header)
        if long_name is not None:
            entry.name = long_name
        if long_target is not None:
            entry.target = long_target
        _apply_pax(entry, pax)
        if flag in (b"\0", b"0") and entry.name.endswith(b"/"):
            entry.kind = Kind.DIRECTORY  # how tar wrote directories before there was a type for them
        if b"\0" in entry.name or b"\0" in entry.target:
            raise InvalidInput(f"{entry.shown}: a name with a NUL byte")
        if entry.size < 0:
            raise InvalidInput(f"{entry.shown}: a negative size")
        # As Go's reader has it: only files carry data, whatever the size field says.
        entry.stored = entry.size if entry.kind is Kind.FILE else 0
        entry.size = entry.stored
        self._start(entry.stored)
        self._read_sparse(entry, flag, header, pax, sparse)
        return entry

    def _read_sparse(
        self, entry: Entry, flag: bytes, header: bytes, pax: dict[bytes, bytes], sparse: list[tuple[bytes, bytes]]
    ) -> None:
        if entry.kind is not Kind.FILE:
            return
        if flag == b"S":
            entry.regions, entry.size = self._old_gnu_map(header)
        elif sparse or any(key in pax for key in (b"GNU.sparse.map", b"GNU.sparse.major")):
            entry.regions, entry.size = self._pax_map(pax, sparse)
            entry.name = pax.get(b"GNU.sparse.name", entry.name)
        if entry.regions is not None:
            entry.stored = self._left
            _check_regions(entry)

    def _old_gnu_map(self, header: bytes) -> tuple[list[tuple[int, int]], int]:
        """The map of GNU's own format: 4 regions in the header, 21 in each block that follows it."""
        fields, more = header[386:482], header[482]
        numbers = [fields]
        while more:
            block = self._stream.read(BLOCK)
            numbers.append(block[:504])
            more = block[504]
            if len(numbers) * 21 > _SPARSE_LIMIT:
                raise InvalidInput("a sparse file of too many regions")
        text = b"".join(numbers)
        regions = []
        for at in range(0, len(text) - 23, 24):
            if text[at] == 0:
                break
            regions.append((_number(text[at : at + 12], "offset"), _number(text[at + 12 : at + 24], "size")))
        return regions, _number(header[483:495], "size")

    def _pax_map(self, pax: dict[bytes, bytes], sparse: list[tuple[bytes, bytes]]) -> tuple[list[tuple[int, int]], int]:
        size = _decimal(pax.get(b"GNU.sparse.realsize", pax.get(b"GNU.sparse.size", b"")), "GNU.sparse.size")
        if b"GNU.sparse.major" in pax:
            if (pax[b"GNU.sparse.major"], pax.get(b"GNU.sparse.minor")) != (b"1", b"0"):
                raise InvalidInput("a sparse file in a format that is not known")
            return _pairs(self._map_in_data()), size
        if b"GNU.sparse.map" in pax:
            return _pairs([_decimal(part, "map") for part in pax[b"GNU.sparse.map"].split(b",")]), size
        return _pairs([_decimal(value, key.decode()) for key, value in sparse]), size

    def _map_in_data(self) -> list[int]:
        """PAX sparse 1.0: decimal lines before the data, padded to whole blocks."""
        lines: list[bytes] = []
        rest = b""
        count = None
        while count is None or len(lines) < 1 + 2 * count:
            *whole, rest = (rest + self.read(BLOCK)).split(b"\n")
            lines += whole
            if lines and count is None:
                count = _decimal(lines[0], "map")
                if count > _SPARSE_LIMIT:
                    raise InvalidInput("a sparse file of too many regions")
            if len(rest) > 20 and b"\0" not in rest:
                raise InvalidInput("a sparse file's map is damaged")
        return [_decimal(line, "map") for line in lines[1 : 1 + 2 * count]]


def _check_sum(block: bytes) -> None:
    stated = _number(block[148:156], "checksum")
    unsigned = sum(block) - sum(block[148:156]) + 8 * 32
    if stated == unsigned:
        return
    # Some old programs summed signed bytes.
    if stated != unsigned - 256 * sum(1 for byte in block[:148] + block[156:] if byte > 127):
        raise InvalidInput("not a tar archive, or damaged (a header's checksum is wrong)")


def _number(text: bytes, what: str) -> int:
    """Octal digits, or GNU's base 256."""
    if text[0] & 0x80:
        value = int.from_bytes(bytes([text[0] & 0x7F]) + text[1:], "big", signed=False)
        return value - (1 << (8 * len(text) - 1)) if text[0] & 0x40 else value
    digits = text.strip(b" \0")
    if not digits:
        return 0
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise InvalidInput(f"a tar header is damaged ({what} {show(text)})")
    return int(digits, 8)


def _decimal(text: bytes, what: str) -> int:
    if not text.isdigit() or len(text) > 19:
        raise InvalidInput(f"a tar header is damaged ({what} {show(text)})")
    return int(text)


def _cut(text: bytes) -> bytes:
    return text.partition(b"\0")[0]


def _parse_header(header: bytes) -> tuple[Entry, bytes]:
    fields = _HEADER.unpack(header)
    name, mode, uid, gid, size, mtime, _sum, flag, target, magic, _user, _group, major, minor, prefix, trailer = fields
    kind = _KINDS.get(flag)
    name = _cut(name)
    if kind is None:
        raise InvalidInput(f"{show(name)}: an entry of the unknown type {flag!r}")
    if magic.startswith(b"ustar\0"):
        prefix = _cut(prefix[:131] if trailer.endswith(b"tar\0") else prefix)
        name = prefix + b"/" + name if prefix else name
    entry = Entry(
        name=name,
        kind=kind,
        mode=_number(mode, "mode") & 0o7777,
        uid=_number(uid, "uid"),
        gid=_number(gid, "gid"),
        size=_number(size, "size"),
        mtime=(_number(mtime, "mtime"), 0),
        target=_cut(target),
    )
    if kind in (Kind.CHAR, Kind.BLOCK):
        entry.device = (_number(major, "device"), _number(minor, "device"))
    return entry, flag


def _parse_pax(data: bytes) -> tuple[dict[bytes, bytes], list[tuple[bytes, bytes]]]:
    """Records by key, the last one wins; and those of sparse format 0.0, whose order counts."""
    records: dict[bytes, bytes] = {}
    sparse: list[tuple[bytes, bytes]] = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        length = data[at:space] if space > 0 else b""
        end = at + (int(length) if length.isdigit() else 0)
        equals = data.find(b"=", space, end)
        if not space + 1 < equals < end <= len(data) or data[end - 1 : end] != b"\n":
            raise InvalidInput("an extended tar header is damaged")
        key, value = data[space + 1 : equals], data[equals + 1 : end - 1]
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            sparse.append((key, value))
        records[key] = value
        at = end
    return records, sparse


def _apply_pax(entry: Entry, pax: dict[bytes, bytes]) -> None:
    for key, value in pax.items():
        if key.startswith(_XATTR):
            entry.xattrs[key[len(_XATTR) :]] = value
        elif not value:
            continue
        elif key == b"path":
            entry.name = value
        elif key == b"linkpath":
            entry.target = value
        elif key == b"size":
            entry.size = _decimal(value, "size")
        elif key == b"uid":
            entry.uid = _decimal(value, "uid")
        elif key == b"gid":
            entry.gid = _decimal(value, "gid")
        elif key == b"mtime":
            entry.mtime = _time(value)


def _time(text: bytes) -> tuple[int, int]:
    """``-1.5`` is 2 seconds before 1970 and 500,000,000 nanoseconds after that."""
    whole, _, fraction = text.lstrip(b"-").partition(b".")
    seconds = _decimal(whole or b"0", "mtime")
    nanoseconds = _decimal(fraction[:9].ljust(9, b"0"), "mtime")
    if not text.startswith(b"-"):
        return seconds, nanoseconds
    return (-seconds - 1, 1_000_000_000 - nanoseconds) if nanoseconds else (-seconds, 0)


def _pairs(numbers: list[int]) -> list[tuple[int, int]]:
    if len(numbers) % 2:
        raise InvalidInput("a sparse file's map is damaged")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _check_regions(entry: Entry) -> None:
    """Ascending, inside the file, and as long together as the data that is stored."""
    assert entry.regions is not None
    end = total = 0
    for offset, length in entry.regions:
        if offset < end or length < 0:
            raise InvalidInput(f"{entry.shown}: the sparse file's map is damaged")
        end = offset + length
        total += length
    if end > entry.size or total != entry.stored:
        raise InvalidInput(f"{entry.shown}: the sparse file's map does not fit its size")
