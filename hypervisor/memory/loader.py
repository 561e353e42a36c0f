"""Loads a dear source (compressed, or another process) once for all VMs of a host, in a thread of the host daemon.

See csrc/memory/loader.h for the theory of operation. Source: US 11341058 (entries that are shared, and their state).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from hypervisor.errors import InvalidInput, Unavailable
from hypervisor.memory.database import PageFrameDatabase, SourceKind
from hypervisor.memory.native import ffi, lib, new_error, raise_for

_WHY = 160


@dataclass(frozen=True)
class LoaderCounts:
    """Counters since the start.

    :ivar units: loaded, `bytes` in all
    :ivar asked: pages that clients asked for; `found`: in a unit that was there already
    :ivar full: asks refused for the limit; `failed`: because of the source
    """

    units: int
    bytes: int
    asked: int
    found: int
    full: int
    failed: int


class SourceLoader:
    """One source's loader. A context manager: entered, it serves in a thread; left, clients load for themselves.

    :param database: opened for writing; its VADs of this source may be added and not removed while this is entered
    :param number: the source's, as VADs name it
    :param fd: stays the caller's
    :param size: bytes that a REMOTE source has
    :param max_bytes: how much may be loaded in all; what is more, each VM loads for itself
    :raises InvalidInput, Unavailable: with the reason; nothing was made
    """

    def __init__(
        self, database: PageFrameDatabase, number: int, fd: int, *, kind: SourceKind, size: int = 0, max_bytes: int
    ) -> None:
        config = ffi.new("struct pv_loader_config *")
        config.db, config.source, config.kind = database.handle, number, int(kind)
        config.fd, config.bytes, config.max_bytes = fd, size, max_bytes
        out, err, why = ffi.new("struct pv_loader **"), new_error(), ffi.new("char[]", _WHY)
        if lib.pv_loader_create(config, out, err, why) < 0:
            reason = ffi.string(why).decode(errors="replace")
            raise raise_for(f"making a loader for source {number} ({reason})", err)
        self._handle: Any = out[0]
        self._database = database  # kept alive
        self._thread = threading.Thread(target=self._run, name=f"loader-{number}", daemon=True)

    def _alive(self) -> Any:
        if self._handle is None:
            raise Unavailable("the loader is closed")
        return self._handle

    @property
    def store_fd(self) -> int:
        """The frame store, which can only be read through it; closed with the loader."""
        return int(lib.pv_loader_store(self._alive()))

    def client(self) -> int:
        """A new client's end, for a vmx of this source; the caller closes it.

        :raises ResourceExhausted, Unavailable: too many clients, or what the system says
        """
        out, err = ffi.new("int *"), new_error()
        if lib.pv_loader_add_client(self._alive(), out, err) < 0:
            raise raise_for("adding a client to a loader", err)
        return int(out[0])

    def counts(self) -> LoaderCounts:
        """Never blocks."""
        out = ffi.new("struct pv_loader_counts *")
        lib.pv_loader_count(self._alive(), out)
        return LoaderCounts(*(int(getattr(out, name)) for name in LoaderCounts.__dataclass_fields__))

    def _run(self) -> None:
        lib.pv_loader_run(
            self._alive(), new_error()
        )  # when it gives up, clients find it silent and load for themselves

    def __enter__(self) -> Self:
        if self._thread.is_alive():
            raise InvalidInput("the loader runs already")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lib.pv_loader_stop(self._alive())
        self._thread.join()
        handle, self._handle = self._handle, None
        lib.pv_loader_destroy(handle)
