"""A VM's address space: pages of fixed-height tables that lead straight to VADs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from hypervisor.errors import InvalidInput, Unavailable
from hypervisor.memory.database import PageFrameDatabase
from hypervisor.memory.native import PAGE, ffi, lib, new_error, raise_for

ADDRESS_BITS = 48


@dataclass(frozen=True)
class Extent:
    """A piece of address space whose pages are consecutive pages of one VAD; addresses in bytes, lengths in pages."""

    address: int
    pages: int
    vad: int
    page: int


@dataclass(frozen=True)
class SpaceUsage:
    """Nodes of the page table, their bytes, and pages mapped."""

    nodes: int
    node_bytes: int
    mapped_pages: int


class AddressSpace:
    """An address space over a database, which must outlive it. Thread-safe but for `close`.

    `map` and `unmap` may block on each other; `unmap` also waits for fault servers' short sections. `lookup` waits for
    nobody.
    """

    def __init__(self, database: PageFrameDatabase) -> None:
        out, err = ffi.new("struct pv_space **"), new_error()
        if lib.pv_space_create(database.handle, out, err) < 0:
            raise raise_for("making an address space", err)
        self._database = database  # kept alive
        self._handle: Any = out[0]
        self._reader: Any = self._add_reader()

    def _add_reader(self) -> Any:
        out, err = ffi.new("struct pv_reader **"), new_error()
        if lib.pv_space_add_reader(self._handle, out, err) < 0:
            raise raise_for("adding a reader to the address space", err)
        return out[0]

    @property
    def handle(self) -> Any:
        """The C object. :raises Unavailable: closed"""
        if self._handle is None:
            raise Unavailable("the address space is closed")
        return self._handle

    def map(self, address: int, pages: int, vad: int, *, page: int = 0) -> None:
        """Maps pages [page, page + pages) of a VAD at `address` (bytes). All or nothing.

        :raises InvalidInput: misaligned, empty, beyond 2**48, or more than the VAD has
        :raises NotFound: no such VAD
        :raises Conflict: something is mapped there
        """
        self._check(address, pages)
        if not (0 <= vad < 2**32 and 0 <= page < 2**32):
            raise InvalidInput(f"VAD {vad}, page {page}: not 32-bit numbers")
        err = new_error()
        if lib.pv_space_map(self.handle, address, pages, vad, page, err) < 0:
            raise raise_for(f"mapping {pages} pages of VAD {vad} at {address:#x}", err)

    def unmap(self, address: int, pages: int) -> int:
        """Unmaps whatever is mapped in the range; how many pages that were. When it returns, no fault server uses them.

        :raises InvalidInput: as `map`
        """
        self._check(address, pages)
        out, err = ffi.new("uint64_t *"), new_error()
        if lib.pv_space_unmap(self.handle, address, pages, out, err) < 0:
            raise raise_for(f"unmapping {pages} pages at {address:#x}", err)
        return int(out[0])

    @staticmethod
    def _check(address: int, pages: int) -> None:
        if not (0 <= address < 2**64 and 0 <= pages < 2**64):
            raise InvalidInput(f"address {address:#x} and {pages} pages are not 64-bit numbers")

    def lookup(self, address: int) -> tuple[int, int] | None:
        """``(page-frame entry, page of its VAD)`` at a byte address; None where nothing is mapped.

        One thread at a time.
        """
        if not 0 <= address < 2**64:
            return None
        out = ffi.new("struct pv_translation *")
        lib.pv_space_read_lock(self.handle, self._reader)
        found = lib.pv_space_lookup(self.handle, address, out)
        lib.pv_space_read_unlock(self._reader)
        return (int(out.pfe), int(out.page)) if found else None

    def extents(self, address: int = 0) -> Iterator[Extent]:
        """Every extent from `address` on, in order, read from the page table itself."""
        out, err = ffi.new("struct pv_extent *"), new_error()
        while address < 1 << ADDRESS_BITS:
            found = lib.pv_space_next(self.handle, address, out, err)
            if found < 0:
                raise raise_for(f"reading the address space at {address:#x}", err)
            if not found:
                return
            extent = Extent(int(out.address), int(out.pages), int(out.vad), int(out.page))
            yield extent
            address = extent.address + extent.pages * PAGE

    def usage(self) -> SpaceUsage:
        """Memory of the table."""
        out = ffi.new("struct pv_space_usage *")
        lib.pv_space_usage(self.handle, out)
        return SpaceUsage(int(out.nodes), int(out.node_bytes), int(out.mapped_pages))

    def close(self) -> None:
        """Frees it; harmless when repeated. No fault server over it may run."""
        handle, self._handle = self._handle, None
        if handle is not None:
            lib.pv_space_remove_reader(handle, self._reader)
            lib.pv_space_destroy(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
