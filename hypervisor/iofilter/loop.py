"""Open disks: a loop on a thread of its own, the disks that live on it, and what can be done to them while they run.

Every method blocks until the loop has done it (milliseconds, or as long as a file or a connection takes to open):
asyncio code calls them through ``asyncio.to_thread``. All of them may be called from any thread.
"""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hypervisor.errors import HvError, InvalidInput, NotFound
from hypervisor.iofilter.native import error_of, ffi, lib, new_fail, settings

SPIN_NS = 20_000
"""How long the loop may poll before it sleeps: about what a wake-up costs in a virtual machine."""
_FIGURES = 256
ORDERS = ("inspection", "caching", "compression", "encryption", "replication", "anywhere")
"""The classes of filters, from the guest to the data; those of the last may stand between any others."""


@dataclass(frozen=True)
class FilterClass:
    """A filter that there is.

    :param order: where it belongs in a chain, one of `ORDERS`
    :param persistent: without it the data of a disk that names it would be wrong
    """

    name: str
    order: str
    persistent: bool


def filter_classes() -> tuple[FilterClass, ...]:
    """All filters, in the order of the table of filters."""
    found: list[FilterClass] = []
    out = ffi.new("struct pv_disk_class *")
    while lib.pv_disk_class(len(found), out):
        found.append(FilterClass(ffi.string(out.name).decode(), ORDERS[out.order], bool(out.persistent)))
    return tuple(found)


def filter_class(name: str) -> FilterClass:
    """The filter of that name. Raises `InvalidInput`, naming those there are."""
    classes = filter_classes()
    for found in classes:
        if found.name == name:
            return found
    raise InvalidInput(f"there is no filter {name}; there are {', '.join(sorted(c.name for c in classes))}")


def create_state(kind: str, values: tuple[tuple[str, str], ...], size: int) -> None:
    """Makes a filter's persistent state for a disk of `size` bytes. Raises `HvError`; nothing was made then."""
    array, _kept = settings(values)
    fail = new_fail()
    if lib.pv_disk_create_state(kind.encode(), array, len(values), size, fail):
        raise error_of(fail)


class DiskLoop:
    """A loop and its thread. A context manager; its disks are closed before it is."""

    def __init__(self, *, spin_ns: int = SPIN_NS) -> None:
        fail = new_fail()
        self._handle = lib.pv_disks_new(spin_ns, fail)
        if not self._handle:
            raise error_of(fail)
        self._failure: HvError | None = None
        self._thread = threading.Thread(target=self._run, name="disks", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        fail = new_fail()
        if lib.pv_disks_run(self._handle, fail):
            self._failure = error_of(fail)

    @property
    def handle(self) -> Any:
        """The ``struct pv_disks *``, for device processes that put front ends on its disks."""
        return self._handle

    def close(self) -> None:
        """Ends the thread. Raises what the loop failed with, if it did."""
        lib.pv_disks_stop(self._handle)
        self._thread.join()
        lib.pv_disks_free(self._handle)
        if self._failure:
            raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open_file(self, name: str, path: Path, *, read_only: bool = False, direct: bool = False) -> Disk:
        """A disk whose data is a file or a block device; not started.

        :raises NotFound: it cannot be opened
        :raises Conflict: this process has a disk of that name
        """
        try:
            fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as error:
            raise NotFound(f"disk {name}: cannot open {path}: {error.strerror}") from error
        return self.open_fd(name, fd, read_only=read_only, direct=direct)

    def open_fd(self, name: str, fd: int, *, read_only: bool = False, direct: bool = False) -> Disk:
        """A disk whose data is an open file, which becomes its own, also on failure; not started. Raises `HvError`."""
        fail = new_fail()
        return self._opened(name, lib.pv_disk_open_file(self._handle, name.encode(), fd, read_only, direct, fail), fail)

    def open_nbd(self, name: str, path: Path, export: str = "", *, patience_s: float = 10) -> Disk:
        """A disk whose data is an NBD server's export on a Unix socket; not started.

        :param patience_s: how long requests wait for a server that went away before they fail
        """
        fail = new_fail()
        patience_ms = int(patience_s * 1000)
        handle = lib.pv_disk_open_nbd(self._handle, name.encode(), bytes(path), export.encode(), patience_ms, fail)
        return self._opened(name, handle, fail)

    def _opened(self, name: str, handle: Any, fail: Any) -> Disk:
        if not handle:
            raise error_of(fail)
        return Disk(name, handle)


class Export:
    """An NBD export that is being served; `close` ends it and removes its socket."""

    def __init__(self, disk: Any, server: Any, path: Path) -> None:
        self._disk, self._server, self.path = disk, server, path

    def close(self) -> None:
        """Ends it: waits for the requests under way, closes connections."""
        lib.pv_disk_unexport(self._disk, self._server)
        self.path.unlink(missing_ok=True)


class Disk:
    """An open disk: a chain of filters over data. `DiskLoop.open_file` and `open_nbd` make it."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self._handle = handle

    @property
    def handle(self) -> Any:
        """The ``struct pv_disk *``."""
        return self._handle

    @property
    def size(self) -> int:
        """Bytes, as a guest would see it."""
        return int(lib.pv_disk_size(self._handle))

    def start(self) -> None:
        """From now on requests are served. Raises `Conflict` when it runs already."""
        fail = new_fail()
        if lib.pv_disk_start(self._handle, fail):
            raise error_of(fail)

    def close(self) -> None:
        """Ends it. Raises `Conflict` while somebody uses it or redirects to it; it goes on then."""
        fail = new_fail()
        if lib.pv_disk_close(self._handle, fail):
            raise error_of(fail)

    def add(self, kind: str, name: str, values: tuple[tuple[str, str], ...] = (), *, at: int = 0) -> float:
        """Puts a filter into the chain, also of a disk that runs.

        :param at: its place; 0 is nearest to the guest
        :return: seconds for which requests waited
        :raises HvError: refused (settings, order of classes, name taken); the chain is as it was
        """
        array, _kept = settings(values)
        return self._changed(
            lambda pause, fail: lib.pv_disk_add(
                self._handle, kind.encode(), name.encode(), array, len(values), at, pause, fail
            )
        )

    def remove(self, name: str) -> float:
        """Takes a filter out. Returns and raises as `add`; `NotFound` when there is none of that name."""
        return self._changed(lambda pause, fail: lib.pv_disk_remove(self._handle, name.encode(), pause, fail))

    def set(self, name: str, values: tuple[tuple[str, str], ...]) -> float:
        """Gives a filter other settings: all of them. Returns and raises as `add`."""
        array, _kept = settings(values)
        return self._changed(
            lambda pause, fail: lib.pv_disk_set(self._handle, name.encode(), array, len(values), pause, fail)
        )

    def resize(self, size: int) -> float:
        """Makes the data `size` bytes long. Returns and raises as `add`."""
        return self._changed(lambda pause, fail: lib.pv_disk_resize(self._handle, size, pause, fail))

    @staticmethod
    def _changed(call: Any) -> float:
        fail, pause = new_fail(), ffi.new("uint64_t *")
        if call(pause, fail):
            raise error_of(fail)
        return float(pause[0]) / 1e9

    def figures(self, name: str | None = None) -> dict[str, int]:
        """What a filter counts, or (None) the disk itself: requests, bytes, errors, redirects."""
        fail = new_fail()
        out = ffi.new("struct pv_disk_figure[]", _FIGURES)
        count = lib.pv_disk_figures(self._handle, ffi.NULL if name is None else name.encode(), out, _FIGURES, fail)
        if count < 0:
            raise error_of(fail)
        return {ffi.string(out[i].name).decode(): int(out[i].value) for i in range(count)}

    def export(self, path: Path, *, at: str | None = None, name: str | None = None, read_only: bool = False) -> Export:
        """Serves the disk by NBD on a new Unix socket at `path` (mode 0600).

        :param at: a filter's name: only what lies downstream of it is seen; None: the whole chain
        :param name: the export's name; None: the disk's. Clients that ask for "" get it as well
        :raises InvalidInput: the path is too long or taken
        """
        listener = _listener(path)
        fail = new_fail()
        server = lib.pv_disk_export(
            self._handle,
            ffi.NULL if at is None else at.encode(),
            (name or self.name).encode(),
            listener.detach(),
            read_only,
            fail,
        )
        if not server:
            path.unlink(missing_ok=True)
            raise error_of(fail)
        return Export(self._handle, server, path)


def _listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    previous = os.umask(0o177)
    try:
        _remove_if_dead(path)
        listener.bind(str(path))
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise InvalidInput(f"cannot serve on {path}: {error.strerror or error}; choose a free, shorter path") from error
    finally:
        os.umask(previous)
    return listener


def _remove_if_dead(path: Path) -> None:
    """A socket that nobody listens on was left by a process that was killed."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
