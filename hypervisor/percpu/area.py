"""The areas that per-CPU items live in: one for each CPU, in memory that processes can share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Self

from hypervisor.errors import InvalidInput
from hypervisor.percpu.native import failure, ffi, lib, new_error

MOST_CPUS = 65536


class Registration(IntEnum):
    """Who told the kernel of this thread's restartable sequences."""

    NOBODY = 0
    LIBC = 1
    OURS = 2


@dataclass(frozen=True)
class AreaStats:
    """What areas are and cost now.

    :ivar cpus: for how many CPUs they were made
    :ivar items: that exist; `item_bytes`: of one CPU's copies of them
    :ivar memory_bytes: that all areas really take, of every CPU together
    :ivar aborts: sequences that this process had to start again
    :ivar registration: of the calling thread; NOBODY: it works by atomic instructions
    """

    cpus: int
    items: int
    item_bytes: int
    memory_bytes: int
    aborts: int
    registration: Registration


class PerCpuAreas:
    """Areas for all CPUs of the machine, 1 MiB of items in each; memory is taken only on CPUs that use an item.

    Every counter and ring holds its areas; they are unmapped when the last of these is gone. Threads may share one
    object. A child of ``fork`` shares the areas; other processes get `fd` and call `attach`. Processes that share areas
    trust each other: none can take the memory away (it is sealed), but one that writes nonsense there harms all.

    :param cpus: how many CPUs to make room for; 0: as many as the machine can ever have. Threads on others work, too,
        more slowly
    :raises InvalidInput: fewer than none, or more than 65536
    :raises ResourceExhausted: no memory or descriptors
    """

    def __init__(self, cpus: int = 0) -> None:
        if not 0 <= cpus <= MOST_CPUS:
            raise InvalidInput(
                f"per-CPU areas for {cpus} CPUs: take 0 (as many as the machine can have) to {MOST_CPUS}"
            )
        out, err = ffi.new("struct pv_percpu **"), new_error()
        if lib.pv_face_create(cpus, out, err) < 0:
            raise failure("making per-CPU areas", err)
        self.handle: Any = ffi.gc(out[0], lib.pv_face_destroy)

    @classmethod
    def attach(cls, fd: int) -> Self:
        """The areas that another process made.

        :param fd: its `fd`; copied
        :raises InvalidInput: that is no descriptor of such areas
        """
        out, err = ffi.new("struct pv_percpu **"), new_error()
        if not 0 <= fd < 1 << 31:
            raise InvalidInput(f"attaching to per-CPU areas: {fd} is no descriptor")
        if lib.pv_face_attach(fd, out, err) < 0:
            raise failure(f"attaching to the per-CPU areas of descriptor {fd}", err)
        self = cls.__new__(cls)
        self.handle = ffi.gc(out[0], lib.pv_face_destroy)
        return self

    @property
    def fd(self) -> int:
        """For `attach` in another process. Stays the object's: pass it on (``pass_fds``, SCM_RIGHTS), do not close
        it.
        """
        return int(lib.pv_face_fd(self.handle))

    def stats(self) -> AreaStats:
        """Never blocks."""
        counts = ffi.new("struct pv_face_counts *")
        lib.pv_face_count(self.handle, counts)
        return AreaStats(
            cpus=int(counts.cpus),
            items=int(counts.items),
            item_bytes=int(counts.item_bytes),
            memory_bytes=int(counts.memory_bytes),
            aborts=int(counts.aborts),
            registration=Registration(counts.origin),
        )


def slice_extension() -> str:
    """Why the calling thread has no time-slice extension of the kernel (Linux 7.0); empty when it has."""
    code = int(lib.pv_face_slice_supported())
    return os.strerror(code) if code else ""
