"""Opening a disk as its descriptor says: its bases first, then its data, then its filters from the data up."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from hypervisor.errors import InvalidInput
from hypervisor.iofilter.descriptor import Descriptor
from hypervisor.iofilter.loop import Disk, DiskLoop
from hypervisor.iofilter.store import DiskStore, Held

DEPTH_MAX = 16
"""Bases of bases; the framework itself follows no more redirects than that."""


@dataclass(frozen=True)
class OpenDisk:
    """A disk that is being served in this process, with the bases below it.

    :param bases: nearest first
    """

    descriptor: Descriptor
    disk: Disk
    held: Held
    bases: tuple[OpenDisk, ...] = ()

    def close(self) -> None:
        """Ends it and the bases that were opened for it. Raises `Conflict` while it is exported; all goes on then."""
        self.disk.close()
        self.held.release()
        for base in self.bases:
            base.close()


def open_disk(
    loop: DiskLoop, store: DiskStore, name: str, *, read_only: bool = False, bases: Mapping[str, OpenDisk] | None = None
) -> OpenDisk:
    """Opens a disk on a loop, and starts it.

    :param read_only: take no writes; several processes may have it open so
    :param bases: disks that are open on this loop already, by name; those that it needs and that are not among them
        are opened and closed with it
    :raises Conflict: another process has it open
    :raises HvError: the descriptor, its data or one of its filters is missing or damaged; nothing stays open
    """
    return _open(loop, store, name, read_only, (), bases or {})


def _open(
    loop: DiskLoop,
    store: DiskStore,
    name: str,
    read_only: bool,
    above: tuple[str, ...],
    known: Mapping[str, OpenDisk],
) -> OpenDisk:
    if name in above or len(above) >= DEPTH_MAX:
        raise InvalidInput(
            f"the bases of disk {above[0]} lead back to it, or are more than {DEPTH_MAX}: {', '.join(above)}"
        )
    with contextlib.ExitStack() as undo:
        held = store.lock(name, shared=read_only)
        undo.callback(held.release)
        descriptor = store.load(name)
        if descriptor.read_only and not read_only:
            descriptor = store.make_writable(name)
        bases: tuple[OpenDisk, ...] = ()
        if descriptor.parent and descriptor.parent not in known:
            bases = (_open(loop, store, descriptor.parent, True, (*above, name), known),)
            undo.callback(bases[0].close)
        disk = _open_data(loop, store, descriptor, read_only)
        undo.callback(disk.close)
        for spec in reversed(descriptor.filters):
            disk.add(spec.kind, spec.name, spec.resolved(store.folder(name)))
        disk.start()
        undo.pop_all()
    return OpenDisk(descriptor, disk, held, bases)


def _open_data(loop: DiskLoop, store: DiskStore, descriptor: Descriptor, read_only: bool) -> Disk:
    data = descriptor.data
    path = store.folder(descriptor.name) / data.path
    if data.kind == "nbd":
        return loop.open_nbd(descriptor.name, path, data.export)
    return loop.open_file(descriptor.name, path, read_only=read_only, direct=data.direct)
