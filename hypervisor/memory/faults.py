"""The page-fault server of one VM as a Python object: one thread that serves, and prefetching beside it."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from hypervisor.errors import Unavailable
from hypervisor.memory.database import PageFrameDatabase, SourceKind
from hypervisor.memory.native import ffi, lib, new_error, raise_for
from hypervisor.memory.space import AddressSpace


@dataclass(frozen=True)
class FaultStats:
    """Counters since the start.

    :ivar prefetched: pages filled by `FaultServer.prefetch`; they are among the copied ones
    :ivar prefetch_hits: faults on pages that had been prefetched by the time they were read
    :ivar bytes: filled in all
    :ivar units_loaded: of compressed and remote sources; `units_found`: reads that found theirs loaded
    :ivar frames_found: pages filled from frames that the host had loaded; `frames_asked`: asks to load one
    :ivar latency: bucket i counts faults served in less than 2**i nanoseconds (and not in a lower bucket);
        `latency_ns`: the sum of what they took
    """

    faults: int
    pages_copied: int
    pages_zeroed: int
    already_there: int
    removed_pages: int
    prefetched: int
    prefetch_hits: int
    bytes: int
    units_loaded: int
    units_found: int
    frames_found: int
    frames_asked: int
    latency: tuple[int, ...]
    latency_ns: int


class FaultServer:
    """Fills guest RAM from the VADs of an address space as it is touched.

    A context manager: entered, it serves in a thread; left, it is stopped and its descriptors are closed, which wakes
    every suspended toucher, so leave it only when the VM has gone.

    :param ram_bytes: size of guest RAM; the space's addresses are offsets in it
    :param around_pages: fault-around window, a power of two up to 512
    :param record_pages: how many first touches are remembered
    :raises InvalidInput, ResourceExhausted: nothing was made
    """

    def __init__(
        self,
        database: PageFrameDatabase,
        space: AddressSpace,
        *,
        ram_bytes: int,
        around_pages: int = 16,
        record_pages: int = 65536,
    ) -> None:
        config = ffi.new("struct pv_fault_config *")
        config.db, config.space = database.handle, space.handle
        config.ram_bytes, config.around_pages, config.record_pages = ram_bytes, around_pages, record_pages
        out, err = ffi.new("struct pv_fault **"), new_error()
        if lib.pv_fault_create(config, out, err) < 0:
            raise raise_for(f"making a fault server for {ram_bytes} bytes of RAM", err)
        self._handle: Any = out[0]
        self._keep = (database, space)
        self._record_pages = record_pages
        self._thread: threading.Thread | None = None
        self.failed = threading.Event()

    @staticmethod
    def trace(hook: int) -> None:
        """Where trace points of fault servers go, of this process's all: `PerCpuTrace.hook`, or 0 for nowhere."""
        lib.pv_fault_trace(ffi.cast("void *", hook))

    def _alive(self) -> Any:
        if self._handle is None:
            raise Unavailable("the fault server is closed")
        return self._handle

    def add_source(self, number: int, fd: int, *, kind: SourceKind = SourceKind.FILE, size: int = 0) -> None:
        """VADs with this source number read from `fd`, which stays the caller's. Before entering only.

        :param kind: FILE; ZSTD: zstd's seekable format with checksums; REMOTE: a stream socket (csrc/memory/source.h)
        :param size: bytes that a REMOTE source has
        :raises InvalidInput, Unavailable: with the reason; nothing was added
        """
        err = new_error()
        if lib.pv_fault_add_source(self._alive(), number, int(kind), fd, size, err) < 0:
            reason = self.reason
            raise raise_for(f"adding source {number}" + (f" ({reason})" if reason else ""), err)

    def share_source(self, number: int, store: int, loader: int) -> None:
        """Source `number`, added before, is loaded once for the host: `hypervisor.memory.loader`. Before entering.

        :param store: `SourceLoader.store_fd`; `loader`: a client's end. Both stay the caller's
        :raises InvalidInput: there is no such source, it is not dear, or `store` is none
        """
        err = new_error()
        if lib.pv_fault_share_source(self._alive(), number, store, loader, err) < 0:
            raise raise_for(f"sharing source {number}", err)

    def add_range(self, uffd: int, start: int, length: int, offset: int) -> None:
        """A mapping of RAM in the process that `uffd` belongs to; the descriptor is taken over when this succeeds."""
        err = new_error()
        if lib.pv_fault_add_range(self._alive(), uffd, start, length, offset, err) < 0:
            raise raise_for(f"adding the range {start:#x}+{length:#x}", err)

    def open_own(self, device: int = -1) -> None:
        """Makes this process's userfaultfd, once, before `register_own` or the hook.

        :param device: a descriptor of /dev/userfaultfd, or -1 for the system call
        :raises Unavailable: this user may not have kernel faults delivered
        """
        err = new_error()
        if lib.pv_fault_open_own(self._alive(), device, err) < 0:
            raise raise_for("making this process's userfaultfd", err)

    def register_own(self, buffer: Any, *, offset: int = 0) -> None:
        """A mapping of RAM in this process, before its first touch.

        :param buffer: an ``mmap.mmap`` or another writable buffer over the mapping
        """
        err = new_error()
        view = ffi.from_buffer(buffer)
        if lib.pv_fault_register_own(self._alive(), view, len(view), offset, err) < 0:
            raise raise_for("registering this process's mapping of guest RAM", err)

    def set_around(self, pages: int) -> None:
        """Another fault-around window from the next fault on. :raises InvalidInput: no power of two up to 512"""
        err = new_error()
        if lib.pv_fault_set_around(self._alive(), pages, err) < 0:
            raise raise_for(f"a fault-around window of {pages} pages", err)

    def map_hook(self) -> tuple[int, int]:
        """``(function, context)`` as addresses, for C code that maps RAM: see pv_fault_map_hook in csrc/memory/fault.h.

        Whoever gets them must have stopped before this server is left.
        """
        function = int(ffi.cast("uintptr_t", ffi.addressof(lib, "pv_fault_map_hook")))
        return function, int(ffi.cast("uintptr_t", self._alive()))

    def prefetch(self, pages: Sequence[int]) -> int:
        """Fills pages (numbers in RAM) in that order; how many were filled. Blocks: call it in a thread."""
        numbers = array("I", pages)
        if not numbers:
            return 0
        return int(lib.pv_fault_prefetch(self._alive(), ffi.from_buffer("uint32_t[]", numbers), len(numbers)))

    def recorded(self) -> list[int]:
        """Pages in the order of their first touch, at most as many as were to be remembered."""
        numbers = ffi.new("uint32_t[]", max(1, self._record_pages))
        count = lib.pv_fault_recorded(self._alive(), numbers, self._record_pages)
        return [int(n) for n in numbers[0 : min(count, self._record_pages)]]

    def wake_all(self) -> None:
        """As the successor of a server that died: whoever it left suspended faults anew."""
        lib.pv_fault_wake_all(self._alive())

    @property
    def reason(self) -> str:
        """Why the server gave up; empty while it has not. The touchers it could not serve stay suspended."""
        return str(ffi.string(lib.pv_fault_reason(self._alive())).decode(errors="replace"))

    def stats(self) -> FaultStats:
        """Never blocks; counters may be a moment apart."""
        out = ffi.new("struct pv_fault_stats *")
        lib.pv_fault_stats(self._alive(), out)
        names = [name for name in FaultStats.__dataclass_fields__ if name != "latency"]
        return FaultStats(**{name: int(getattr(out, name)) for name in names}, latency=tuple(map(int, out.latency)))

    def _run(self) -> None:
        if lib.pv_fault_run(self._alive(), new_error()) < 0:
            self.failed.set()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lib.pv_fault_stop(self._alive())
        if self._thread is not None:
            self._thread.join()
        handle, self._handle = self._handle, None
        lib.pv_fault_destroy(handle)
