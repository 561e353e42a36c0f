"""The host's page-frame database: VADs for the templates that its clones are started from.

One per host daemon. The daemon writes; device processes get a descriptor through which they can only read. Clones of
one template share its VADs and page-frame entries. The database lives as long as somebody maps it: a daemon that is
replaced makes a new one, and the VMs of the old go on with theirs.

Source: US 11341058.
"""

from __future__ import annotations

import bisect
import dataclasses
import fcntl
import os
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from hypervisor.memory.database import DatabaseUsage, PageFrameDatabase, SourceKind, new_memory_file
from hypervisor.vmm.plan import ClonePlan
from hypervisor.vmm.snapshots.index import TEMPLATE, ZERO
from hypervisor.vmm.snapshots.snapshot import Layer, Snapshot
from hypervisor.vmm.templates.template import PAGE, Template

#: entries for 64 GiB of templates, and VADs for as many pieces as they may have; memory is used as they are
MAX_PFES = 1 << 24
MAX_VADS = 1 << 18
#: a hole shorter than this is read from the file as if it were data: a VAD costs more than copying it
MIN_HOLE_PAGES = 32
#: F_SEAL_FUTURE_WRITE, which Python 3.11 does not name: the mapping that there is stays the only writable one
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x0010

Mapping = tuple[int, int, int, int]


class HostFrames:
    """Owned by the daemon; not thread-safe. A context manager: left, the daemon's mapping is gone."""

    def __init__(self) -> None:
        self._fd = new_memory_file("podvisor-frames")
        self._database = PageFrameDatabase.create(self._fd, max_vads=MAX_VADS, max_pfes=MAX_PFES)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        self.reader_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._mappings: dict[str, tuple[Mapping, ...]] = {}
        self._layers: dict[tuple[str, int], int] = {}
        self._zeroes: dict[int, int] = {}

    def clone_plan(self, template: Template) -> ClonePlan:
        """What a clone of `template` starts from; its VADs are added the first time.

        :raises ResourceExhausted: the database is full
        """
        name = template.manifest.ram_sha256
        if name not in self._mappings:
            self._mappings[name] = self._add(template)
        return ClonePlan(
            template=template.path, ram_bytes=template.manifest.ram_bytes, ram_sha256=name,
            mappings=self._mappings[name],
        )  # fmt: skip

    def snapshot_plan(self, template: Template, snapshot: Snapshot) -> ClonePlan:
        """What a VM starts from that goes on from `snapshot`, which lies over `template`. Each layer has one VAD, which
        all VMs share that have it at the same place; each piece is a mapping of a part of it.

        :raises ResourceExhausted: the database is full
        """
        plan = self.clone_plan(template)
        vads = {number: self._layer_vad(layer, number) for number, layer in enumerate(snapshot.manifest.layers, 1)}
        mappings: list[Mapping] = []
        for piece in snapshot.pieces:
            if piece.source == TEMPLATE:
                mappings += _parts(plan.mappings, piece.first, piece.pages)
            elif piece.source == ZERO:
                mappings.append((piece.first, piece.pages, self._zero_vad(plan.ram_bytes // PAGE), piece.first))
            else:
                mappings.append((piece.first, piece.pages, vads[piece.source], piece.page))
        known = Snapshot.working_set_of(snapshot.path).exists()
        return dataclasses.replace(plan, mappings=tuple(mappings), snapshot=snapshot.path, working_set=known)

    def _layer_vad(self, layer: Layer, number: int) -> int:
        if layer.pages == 0:
            return -1  # no piece leads there
        key = (layer.id, number)
        if key not in self._layers:
            self._layers[key] = self._database.add(SourceKind.FILE, pages=layer.pages, source=number)
        return self._layers[key]

    def _zero_vad(self, pages: int) -> int:
        if pages not in self._zeroes:
            self._zeroes[pages] = self._database.add(SourceKind.ZERO, pages=pages)
        return self._zeroes[pages]

    def _add(self, template: Template) -> tuple[Mapping, ...]:
        pages = template.manifest.ram_bytes // PAGE
        made: list[Mapping] = []
        for first, count, has_data in pieces(template.manifest.extents, pages):
            kind = SourceKind.FILE if has_data else SourceKind.ZERO
            vad = self._database.add(kind, pages=count, offset=first * PAGE if has_data else 0)
            made.append((first, count, vad, 0))
        return tuple(made)

    def usage(self) -> DatabaseUsage:
        """Memory of VADs and entries, for ``hv top``."""
        return self._database.usage()

    def close(self) -> None:
        """Harmless when repeated."""
        if self._fd >= 0:
            self._database.close()
            os.close(self.reader_fd)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parts(mappings: tuple[Mapping, ...], first: int, count: int) -> Iterator[Mapping]:
    """What `mappings`, ascending, say of `count` pages from `first` on."""
    at = max(0, bisect.bisect_right(mappings, (first, sys.maxsize, 0, 0)) - 1)
    for start, pages, vad, page in mappings[at:]:
        low, high = max(start, first), min(start + pages, first + count)
        if start >= first + count:
            return
        if low < high:
            yield low, high - low, vad, page + low - start


def pieces(extents: tuple[tuple[int, int], ...], pages: int) -> list[tuple[int, int, bool]]:
    """RAM of `pages` pages as (first page, pages, has data), without gaps; a short hole belongs to its neighbours."""
    merged: list[list[int]] = []
    for first, count in extents:
        if merged and first - (merged[-1][0] + merged[-1][1]) < MIN_HOLE_PAGES:
            merged[-1][1] = first + count - merged[-1][0]
        else:
            merged.append([first, count])
    found: list[tuple[int, int, bool]] = []
    at = 0
    for first, count in merged:
        if first > at:
            found.append((at, first - at, False))
        found.append((first, count, True))
        at = first + count
    if at < pages:
        found.append((at, pages - at, False))
    return found
