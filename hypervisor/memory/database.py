"""The page-frame database of a host: VADs and page-frame entries in shared memory.

Source: US 11341058 (an entry, shared by whoever has the page, leads directly to its VAD).
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from hypervisor.errors import Unavailable
from hypervisor.memory.native import ffi, lib, new_error, raise_for


class SourceKind(enum.IntEnum):
    """Where a VAD's pages come from; ``enum pv_source_kind``."""

    ZERO = 1
    FILE = 2
    ZSTD = 3
    REMOTE = 4


@dataclass(frozen=True)
class DatabaseUsage:
    """What is in use: VADs and entries, each with its bytes; `free_runs` is the writer's, 0 in a reader."""

    vads: int
    vad_bytes: int
    pfes: int
    pfe_bytes: int
    free_runs: int


class PageFrameDatabase:
    """A database in a file (a memfd or a file on tmpfs).

    One process writes; readers map it read-only. Calls that change it are not thread-safe; nothing here blocks but on
    memory. A context manager: left, it is unmapped, and the file keeps its content.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @classmethod
    def create(cls, fd: int, *, max_vads: int, max_pfes: int) -> Self:
        """An empty database in `fd`, whose old content is lost. Memory is used only as VADs are added.

        :param max_pfes: pages that all VADs may describe together
        :raises InvalidInput: a number that is not between 1 and 2**30
        """
        out, err = ffi.new("struct pv_pfdb **"), new_error()
        if lib.pv_pfdb_create(fd, max_vads, max_pfes, out, err) < 0:
            raise raise_for(f"making a page-frame database of {max_vads} VADs and {max_pfes} entries", err)
        return cls(out[0])

    @classmethod
    def open(cls, fd: int, *, writer: bool) -> Self:
        """An existing database; a writer takes over from a dead predecessor.

        :raises InvalidInput: not a database, truncated, or with VADs that overlap
        """
        out, err = ffi.new("struct pv_pfdb **"), new_error()
        if lib.pv_pfdb_open(fd, int(writer), out, err) < 0:
            raise raise_for("opening the page-frame database", err)
        return cls(out[0])

    @property
    def handle(self) -> Any:
        """The C object. :raises Unavailable: closed"""
        if self._handle is None:
            raise Unavailable("the page-frame database is closed")
        return self._handle

    def add(self, kind: SourceKind, *, pages: int, source: int = 0, offset: int = 0) -> int:
        """A new VAD and its entries; its index.

        :param offset: bytes into the source, a multiple of 4096
        :raises InvalidInput: no pages, or an offset that is not page-aligned
        :raises ResourceExhausted: no VAD, or no run of so many entries, is free
        """
        out, err = ffi.new("uint32_t *"), new_error()
        if lib.pv_pfdb_add(self.handle, int(kind), source, offset, pages, out, err) < 0:
            raise raise_for(f"adding a VAD of {pages} pages at offset {offset}", err)
        return int(out[0])

    def remove(self, vad: int) -> None:
        """Withdraws a VAD that no address space maps any more. :raises NotFound: there is none of that index"""
        err = new_error()
        if lib.pv_pfdb_remove(self.handle, vad, err) < 0:
            raise raise_for(f"removing VAD {vad}", err)

    def usage(self) -> DatabaseUsage:
        """Counts the table: O(VADs)."""
        out = ffi.new("struct pv_pfdb_usage *")
        lib.pv_pfdb_usage(self.handle, out)
        return DatabaseUsage(*(int(getattr(out, name)) for name in DatabaseUsage.__dataclass_fields__))

    def close(self) -> None:
        """Unmaps; harmless when repeated. No space over it may live."""
        handle, self._handle = self._handle, None
        if handle is not None:
            lib.pv_pfdb_close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def new_memory_file(name: str) -> int:
    """A descriptor of an empty memfd that may be sealed, closed on exec."""
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
