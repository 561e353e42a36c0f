"""What of a guest's RAM differs from what it was started from: found by comparing, written as a layer.

The RAM of a clone is a memfd in which only the pages are present that were touched since; whatever is absent is as in
its *base* (a template, or a snapshot over one). A page that is present is compared with the base: the same, it is left
out; all zeroes, it is named as such; else it goes into the layer. Nothing is tracked while the guest runs, so a guest
that is never saved pays nothing; a save reads every page that is present.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hypervisor.errors import InvalidInput
from hypervisor.vmm.snapshots.index import ZERO, Piece, joined, overlay, within
from hypervisor.vmm.snapshots.layer import PAGE, LayerWriter
from hypervisor.vmm.templates.template import data_extents

_BLOCK_PAGES = 256
_ZERO_PAGE = bytes(PAGE)


@dataclass(frozen=True)
class Base:
    """What absent pages hold.

    :ivar pieces: of all of RAM
    :ivar fds: of each source, the template first; the owner's to close
    """

    pieces: Sequence[Piece]
    fds: Sequence[int]

    def read(self, first: int, count: int) -> bytes:
        """The pages from `first` on. :raises InvalidInput: a source is short"""
        return b"".join(self._read(piece) for piece in within(self.pieces, first, count))

    def _read(self, piece: Piece) -> bytes:
        size = piece.pages * PAGE
        if piece.source == ZERO:
            return bytes(size)
        data = os.pread(self.fds[piece.source], size, piece.page * PAGE)
        if len(data) != size:
            raise InvalidInput(f"source {piece.source} is shorter than it says")
        return data


class Difference(NamedTuple):
    """What `write_difference` found.

    :ivar pieces: of all of RAM, over the base's sources and the new layer
    :ivar looked_at: pages that were present
    :ivar written: pages in the layer
    :ivar touched: numbers of the pages that were present, those that differ first: what the guest is likely to want
    """

    pieces: list[Piece]
    looked_at: int
    written: int
    touched: list[int]


def write_difference(ram: int, base: Base, writer: LayerWriter) -> Difference:
    """Compares guest RAM with `base`, appends what differs to `writer`, whose layer comes after the base's sources.

    Blocks. The guest must stand still, and none of its processes write to its RAM.

    :param ram: a descriptor of the memfd
    :raises OSError: the disk is full
    """
    changes: list[Piece] = []
    present: list[int] = []
    for first, count in _blocks(ram):
        now = os.pread(ram, count * PAGE, first * PAGE)
        present += range(first, first + count)
        before = base.read(first, count)
        if now != before:
            changes += _changes(first, now, before, writer, len(base.fds))
    touched = [*(change.first for change in changes), *present]
    return Difference(overlay(base.pieces, joined(changes)), len(present), writer.pages, list(dict.fromkeys(touched)))


def _blocks(ram: int) -> Iterator[tuple[int, int]]:
    for first, count in data_extents(ram):
        for start in range(first, first + count, _BLOCK_PAGES):
            yield start, min(_BLOCK_PAGES, first + count - start)


def _changes(first: int, now: bytes, before: bytes, writer: LayerWriter, source: int) -> Iterator[Piece]:
    for i in range(0, len(now), PAGE):
        page = now[i : i + PAGE]
        if page == before[i : i + PAGE]:
            continue
        number = first + i // PAGE
        if page == _ZERO_PAGE:
            yield Piece(number, 1, ZERO, 0)
        else:
            yield Piece(number, 1, source, writer.add(page))
