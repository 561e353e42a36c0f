"""The index of a snapshot: which page of guest RAM has its content where.

Layout, little-endian: ``HVSI``, version, pages of RAM, number of layers, number of pieces (32 bits each), the pieces
(four numbers of 32 bits each), SHA-256 of all that. A piece is (first page, number of pages, source, first page in the
source); pieces are ascending, without gaps or overlap, and cover RAM exactly. Sources: `TEMPLATE`, whose pages stand
where they stand in RAM; 1, 2, ...: a layer, in the order of the manifest; `ZERO`: pages of zeroes, whose last number
is 0.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from hypervisor.errors import InvalidInput

TEMPLATE = 0
ZERO = 0xFFFFFFFF
VERSION = 1
_MAGIC = b"HVSI"
_HEAD = struct.Struct("<4sIIII")
_DIGEST = 32


class Piece(NamedTuple):
    """Pages [first, first + pages) of RAM are pages [page, page + pages) of the source."""

    first: int
    pages: int
    source: int
    page: int

    def cut(self, start: int, end: int) -> Piece:
        """The part of it that lies in pages [start, end) of RAM, which it must meet."""
        first, last = max(self.first, start), min(self.first + self.pages, end)
        page = 0 if self.source == ZERO else self.page + first - self.first
        return Piece(first, last - first, self.source, page)

    def continues(self, other: Piece) -> bool:
        """Whether it is the direct continuation of `other`, which lies before it."""
        if other.source != self.source or other.first + other.pages != self.first:
            return False
        return self.source == ZERO or other.page + other.pages == self.page


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with neighbours that continue each other made one."""
    found: list[Piece] = []
    for piece in pieces:
        if found and piece.continues(found[-1]):
            found[-1] = found[-1]._replace(pages=found[-1].pages + piece.pages)
        else:
            found.append(piece)
    return found


def within(pieces: Sequence[Piece], first: int, count: int) -> Iterator[Piece]:
    """What `pieces`, ascending, say of `count` pages from `first` on."""
    low, high = 0, len(pieces)
    while low < high:
        middle = (low + high) // 2
        if pieces[middle].first + pieces[middle].pages <= first:
            low = middle + 1
        else:
            high = middle
    end = first + count
    while count > 0 and low < len(pieces) and pieces[low].first < end:
        yield pieces[low].cut(first, end)
        low += 1


def overlay(base: Sequence[Piece], changes: Sequence[Piece]) -> list[Piece]:
    """`base` with the pages of `changes`, ascending and without overlap, taken from there."""

    def parts() -> Iterator[Piece]:
        at = 0
        end = base[-1].first + base[-1].pages if base else 0
        for change in changes:
            yield from within(base, at, change.first - at)
            yield change
            at = change.first + change.pages
        yield from within(base, at, end - at)

    return joined(parts())


def encode(pieces: Sequence[Piece], *, ram_pages: int, layers: int) -> bytes:
    """The file."""
    numbers = array("I", (number for piece in pieces for number in piece))
    body = _HEAD.pack(_MAGIC, VERSION, ram_pages, layers, len(pieces)) + numbers.tobytes()
    return body + hashlib.sha256(body).digest()


def decode(data: bytes, *, ram_pages: int, layers: Sequence[int]) -> list[Piece]:
    """The inverse of `encode`.

    :param layers: the number of pages that each layer has
    :raises InvalidInput: damaged, of another version, or no index of such a RAM and such layers
    """
    body, digest = data[:-_DIGEST], data[-_DIGEST:]
    if len(data) < _HEAD.size + _DIGEST or hashlib.sha256(body).digest() != digest:
        raise InvalidInput("is truncated or was changed: its checksum does not fit", where="index")
    magic, version, pages, count, pieces = _HEAD.unpack_from(body)
    if (magic, version) != (_MAGIC, VERSION):
        raise InvalidInput(f"has version {version}; this release reads {VERSION}", where="index")
    if (pages, count) != (ram_pages, len(layers)) or len(body) != _HEAD.size + 16 * pieces:
        raise InvalidInput("is of another snapshot", where="index")
    numbers = array("I", body[_HEAD.size :])
    found = [Piece(*numbers[i : i + 4]) for i in range(0, len(numbers), 4)]
    _check(found, ram_pages, (ram_pages, *layers))
    return found


def _check(pieces: Sequence[Piece], ram_pages: int, sizes: Sequence[int]) -> None:
    at = 0
    for piece in pieces:
        if piece.first != at or piece.pages == 0:
            raise InvalidInput(f"has a gap or an overlap at page {at}", where="index")
        at += piece.pages
        if piece.source == ZERO:
            good = piece.page == 0
        elif piece.source == TEMPLATE:
            good = piece.page == piece.first
        else:
            good = piece.source < len(sizes) and piece.page + piece.pages <= sizes[piece.source]
        if not good:
            raise InvalidInput(f"names pages that its source does not have, at page {piece.first}", where="index")
    if at != ram_pages:
        raise InvalidInput(f"ends at page {at} of {ram_pages}", where="index")
