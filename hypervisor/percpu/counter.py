"""A counter with a part on each CPU."""

from __future__ import annotations

from typing import Any, Self

from hypervisor.percpu.area import PerCpuAreas
from hypervisor.percpu.native import failure, ffi, freed, lib, new_error, valid_handle


class PerCpuCounter:
    """A 64-bit counter; each `add` goes to the part of the CPU on which it happens, so adders never meet.

    Atomicity: an `add` happens once or, when it raises, not at all, whatever moves, interrupts or kills the thread.
    Memory order: relaxed. Who sees an add in a `value` sees nothing of what the adder did before, unless something else
    orders it.
    Cost: an add is 0.5 ns of C inside a call from Python of some 150 ns (the GIL is let go of); a `value` some 2 us,
    one system call and one read for each CPU that ever added.

    Any thread and process may call anything at any time. An object may be pickled to nobody: pass `PerCpuAreas.fd` and
    `handle`.

    :param areas: where it lives; kept alive
    :param handle: of a counter that exists, perhaps made by another process; 0: makes one, starting at 0
    :raises InvalidInput: the handle is no number of 64 bits
    :raises NotFound: the handle is of no item of these areas, or of one that was closed
    :raises ResourceExhausted: the areas are full
    """

    def __init__(self, areas: PerCpuAreas, handle: int = 0) -> None:
        self._areas, self._counter = areas, ffi.new("struct pv_face_counter *")
        self._own = handle == 0
        err = new_error()
        if lib.pv_face_counter_open(areas.handle, valid_handle(handle), self._counter, err) < 0:
            raise failure("opening a per-CPU counter", err)

    @property
    def handle(self) -> int:
        """The same number in every process."""
        return int(self._counter.handle)

    def add(self, n: int = 1) -> None:
        """Adds, modulo 2**64.

        :param n: from -2**63 to 2**63 - 1
        :raises NotFound: the counter was closed; nothing was added
        :raises OverflowError: n is out of range
        """
        if lib.pv_face_add(self._counter, n) < 0:
            raise freed("adding to a per-CPU counter")

    def value(self) -> int:
        """The sum of all parts, each read once.

        Every add that happened before the call is in it, none twice; of those that happen meanwhile any may be. Of a
        counter that only grows, values read one after another never fall.

        :raises NotFound: the counter was closed
        """
        out, err = ffi.new("int64_t *"), new_error()
        if lib.pv_face_sum(self._areas.handle, self._counter, out, err) < 0:
            raise failure("reading a per-CPU counter", err)
        return int(out[0])

    def parts(self) -> dict[int, int]:
        """Each CPU's part, where it has one; adds of threads without sequences are under numbers from
        `AreaStats.cpus` on.
        """
        found: dict[int, int] = {}
        area = self._next(0)
        while area >= 0:
            found[area] = int(lib.pv_face_at(self._counter, area))
            area = self._next(area + 1)
        return found

    def _next(self, start: int) -> int:
        return int(lib.pv_face_next(self._areas.handle, self._counter, start))

    def close(self) -> None:
        """Frees the counter, for all processes; its handle stays invalid. Of one opened by handle: only forgets it."""
        if self._own:
            lib.pv_face_counter_free(self._areas.handle, self._counter, new_error())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
