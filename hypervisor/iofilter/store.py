"""The disks of a host: a folder each, with the descriptor, the data and the filters' own state.

::

    <root>/NAME/disk.json      the descriptor (descriptor.py)
                data.raw       where the bytes are, unless the descriptor names another place
                FILTER.state   a filter's persistent state
                lock           who has it open: exclusive for writers, shared for readers and for clones of it
                control.sock   how the process that has it open is asked to change it

A disk is made in a folder with another name and renamed when it is whole; one that is being removed is renamed first.
So what has a disk's name is a whole disk, also after a crash; what has not is swept by the next call of that name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound, ResourceExhausted
from hypervisor.iofilter import descriptor as metadata
from hypervisor.iofilter.descriptor import BLOCK, Data, Descriptor
from hypervisor.iofilter.loop import create_state, filter_class
from hypervisor.iofilter.spec import FilterSpec

NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
DATA = "data.raw"
_HALF = ".half-"


@dataclass(frozen=True)
class Held:
    """A lock on a disk that this process has; `release` lets go."""

    fd: int

    def release(self) -> None:
        """Lets go; harmless once."""
        os.close(self.fd)


class DiskStore:
    """The disks below one folder. Methods block for a few file operations; several processes may use one at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, name: str) -> Path:
        """A disk's folder, which need not exist. Raises `InvalidInput` for what is no name."""
        if not NAME.fullmatch(name):
            raise InvalidInput(f"{name!r} is no name for a disk: small letters, digits, '-' and '.', at most 63")
        return self.root / name

    def names(self) -> list[str]:
        """All disks, sorted."""
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if NAME.fullmatch(path.name) and path.is_dir())

    def load(self, name: str) -> Descriptor:
        """A disk's descriptor. Raises `NotFound`, or `InvalidInput` when it is damaged."""
        return metadata.load(self.folder(name))

    def clones_of(self, name: str) -> list[str]:
        """The disks that redirect to this one; those whose descriptor is damaged are left out."""
        found = []
        for other in self.names():
            with contextlib.suppress(HvError):
                if self.load(other).parent == name:
                    found.append(other)
        return found

    def create(self, descriptor: Descriptor) -> None:
        """Makes a disk: folder, sparse data file, the filters' first state.

        :raises Conflict: there is one of that name
        :raises ResourceExhausted: no room; nothing is left behind
        """
        with self._making(descriptor.name) as half:
            if descriptor.data == Data("file", DATA):
                _sparse_file(half / DATA, descriptor.size)
            for spec in descriptor.filters:
                create_state(spec.kind, spec.resolved(half), descriptor.size)
            metadata.save(half, descriptor)

    def clone(self, base: str, name: str) -> Descriptor:
        """Makes a linked clone: it reads from its base what was not written to it. Takes no longer for a larger base.

        From now on the base is read-only, for as long as it has clones.
        """
        below = self._as_base(base)
        spec = FilterSpec("linkedclone", "linkedclone", (("base", f"disk:{base}"), ("state", "./linkedclone.state")))
        made = Descriptor(name, below.size, Data("file", DATA), parent=base, filters=(spec,))
        with self.locked(base, shared=True):
            self.create(made)
        return made

    def _as_base(self, name: str) -> Descriptor:
        descriptor = self.load(name)
        if descriptor.read_only:
            return descriptor
        with self.locked(name):  # nobody writes to it now, and from here on nobody will
            self.change(name, replace(descriptor, read_only=True))
        return self.load(name)

    def make_writable(self, name: str) -> Descriptor:
        """Lets a disk be written that was the base of clones, all gone by now. The caller has it locked.

        :raises Conflict: it still has clones
        """
        clones = self.clones_of(name)
        if clones:
            raise Conflict(
                f"disk {name} is the base of {', '.join(clones[:5])}: open it read-only, or write to a clone"
            )
        self.change(name, replace(self.load(name), read_only=False))
        return self.load(name)

    def snapshot(self, name: str, snapshot: str) -> None:
        """Keeps a disk that is not open as another one, and goes on as a linked clone of that.

        The disk's folder is renamed and a clone made in its place: after a crash in between, the disk is there under
        the snapshot's name with nothing lost; `hv disk clone` makes the rest.
        """
        descriptor = self.load(name)
        if self.clones_of(name):
            raise Conflict(f"disk {name} has clones, which read from it: clone it instead")
        target = self.folder(snapshot)
        if target.exists():
            raise Conflict(f"there is a disk {snapshot} already")
        with self.locked(name):
            self.folder(name).rename(target)
            metadata.save(target, replace(descriptor, name=snapshot))
        self.clone(snapshot, name)

    def remove(self, name: str) -> None:
        """Removes a disk and all that is in its folder. Raises `Conflict` while it is open or has clones."""
        folder = self.folder(name)
        if not folder.is_dir():
            raise NotFound(f"there is no disk {name}")
        clones = self.clones_of(name)
        if clones:
            raise Conflict(f"disk {name} is the base of {', '.join(clones[:5])}: remove those first")
        with self.locked(name):
            gone = self.root / f"{_HALF}{name}"
            shutil.rmtree(gone, ignore_errors=True)
            folder.rename(gone)
        shutil.rmtree(gone)

    def change(self, name: str, changed: Descriptor) -> None:
        """Replaces the descriptor of a disk that the caller has locked, or whose holder asks for it."""
        metadata.save(self.folder(name), replace(changed, name=name))

    def add_filter(
        self, descriptor: Descriptor, spec: FilterSpec, at: int | None = None
    ) -> tuple[Descriptor, FilterSpec, int]:
        """Makes a filter's first state for a disk; the caller puts it into the chain, then calls `change`.

        :return: the changed descriptor, the filter with its state's file named, its place
        """
        kind = filter_class(spec.kind)
        if kind.order in ("compression", "encryption"):
            raise InvalidInput(
                f"{spec.kind} would read what was written without it: make a disk with it"
                f" (hv disk create --filter {spec.kind},...) and import the data there"
            )
        if kind.persistent and not any(key == "state" for key, _ in spec.settings):
            spec = replace(spec, settings=(*spec.settings, ("state", f"./{spec.name}.state")))
        place = descriptor.place_for(spec.kind) if at is None else at
        changed = descriptor.with_filter(spec, place)
        create_state(spec.kind, spec.resolved(self.folder(descriptor.name)), descriptor.size)
        return changed, spec, place

    def drop_state(self, name: str, spec: FilterSpec) -> None:
        """Removes the state that `add_filter` made for a filter that was refused then."""
        state = dict(spec.settings).get("state", "")
        if state.startswith("./"):
            (self.folder(name) / state).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _making(self, name: str) -> Iterator[Path]:
        folder = self.folder(name)
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        half = self.root / f"{_HALF}{name}"
        if folder.exists():
            raise Conflict(f"there is a disk {name} already")
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(mode=0o700)
        try:
            yield half
            half.rename(folder)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ResourceExhausted(f"no room for disk {name} in {self.root}") from error
            raise
        finally:
            shutil.rmtree(half, ignore_errors=True)

    def lock(self, name: str, *, shared: bool = False) -> Held:
        """Takes the disk for this process. Raises `Conflict` when another one has it, `NotFound`."""
        folder = self.folder(name)
        try:
            fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as error:
            raise NotFound(f"there is no disk {name}") from error
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            how = "is open for writing" if shared else "is open, or is the base of an open clone,"
            raise Conflict(f"disk {name} {how} in another process") from error
        return Held(fd)

    @contextlib.contextmanager
    def locked(self, name: str, *, shared: bool = False) -> Iterator[None]:
        """`lock` for the length of a block."""
        held = self.lock(name, shared=shared)
        try:
            yield
        finally:
            held.release()


def _sparse_file(path: Path, size: int) -> None:
    with path.open("xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(size)


def without_filter(descriptor: Descriptor, name: str) -> Descriptor:
    """The descriptor with one filter less.

    :raises InvalidInput: without the filter the disk's data would be wrong
    :raises NotFound: there is no such filter
    """
    if filter_class(descriptor.filter(name).kind).persistent:
        raise InvalidInput(
            f"without filter {name} disk {descriptor.name} would give wrong data:"
            " export the disk and import it into a new one"
        )
    return descriptor.without_filter(name)


def round_size(size: int) -> int:
    """The next size that a disk can have."""
    return -(-size // BLOCK) * BLOCK
