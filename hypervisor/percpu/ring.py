"""A ring of records on each CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from hypervisor.errors import InvalidInput
from hypervisor.percpu.area import PerCpuAreas
from hypervisor.percpu.native import failure, ffi, freed, lib, new_error, valid_handle

SMALLEST, LARGEST = 4096, 524288
NEVER = 1 << 20
"""Bytes of a record that is too long for any ring."""


class PerCpuRing:
    """Records of any length, written to the ring of the CPU on which the writer runs, read by anyone.

    Atomicity: a record is read whole, by one reader, or not at all. A writer killed in the middle of one leaves no
    trace but a count.
    Memory order: who reads a record sees all that its writer did before. Records of one CPU come out in the order in
    which their writers began them; between CPUs there is none.
    Cost: a `put` never waits; it is some 10 ns and the copy, inside a call from Python of some 500 ns.

    Any thread and process may call anything at any time. Thread ids must mean the same to all (one PID namespace): that
    is how a dead writer is known.

    :param areas: where it lives; kept alive
    :param size: bytes of records that each CPU's ring can hold, a power of two from 4096 to 524288; 8 bytes a record
        are its header
    :param handles: of a ring that exists, instead of `size`
    :raises InvalidInput: a size that is none; handles that are no numbers of 64 bits
    :raises NotFound: the handles are of no ring of these areas, or of one that was closed
    :raises ResourceExhausted: the areas are full
    """

    def __init__(self, areas: PerCpuAreas, size: int = 0, *, handles: tuple[int, int] | None = None) -> None:
        self._areas, self._own = areas, handles is None
        out, err = ffi.new("struct pv_face_ring **"), new_error()
        if handles is None:
            size = size or 65536
            if not SMALLEST <= size <= LARGEST or size & (size - 1):
                raise InvalidInput(f"a per-CPU ring of {size} bytes: take a power of two from {SMALLEST} to {LARGEST}")
        control, data = (valid_handle(handle) for handle in handles or (0, 0))
        if lib.pv_face_ring_open(areas.handle, size if self._own else 0, control, data, out, err) < 0:
            raise failure("opening a per-CPU ring", err)
        self._ring: Any = ffi.gc(out[0], lib.pv_face_ring_close)

    @property
    def handles(self) -> tuple[int, int]:
        """The same numbers in every process."""
        control, data = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        lib.pv_face_ring_handles(self._ring, control, data)
        return int(control[0]), int(data[0])

    def put(self, record: bytes | bytearray | memoryview) -> bool:
        """Writes a record; False when this CPU's ring has no room for it now (that is counted), or never: longer than
        half the ring.

        :raises NotFound: the ring was closed
        """
        data = ffi.from_buffer(record)
        result = int(lib.pv_face_ring_put(self._ring, data, min(len(data), NEVER)))
        if result < 0:
            raise freed("writing to a per-CPU ring")
        return result == 1

    def drain(self) -> Iterator[tuple[int, bytes]]:
        """Takes what is there, CPU by CPU, oldest first: (CPU, record). Ends where it finds nothing more; call it again
        for more.

        :raises NotFound: the ring was closed
        :raises ProtocolError: some process damaged it; what that CPU's ring held is lost
        """
        room = ffi.new("char[]", 1 << 20)
        bytes_, err, area = ffi.new("size_t *"), new_error(), 0
        while area >= 0:
            area = int(lib.pv_face_ring_read(self._ring, area, room, len(room), bytes_, err))
            if area == -2:
                raise failure("reading a per-CPU ring", err)
            if area >= 0:
                yield area, bytes(ffi.buffer(room, bytes_[0]))

    def counts(self) -> dict[str, int]:
        """`dropped`: records refused; `abandoned`: their writers died in them; `waiting_bytes`: not read yet, headers
        included.

        :raises NotFound: the ring was closed
        """
        out, err = ffi.new("struct pv_face_counts *"), new_error()
        if lib.pv_face_ring_count(self._ring, out, err) < 0:
            raise failure("counting a per-CPU ring", err)
        return {name: int(getattr(out, name)) for name in ("dropped", "abandoned", "waiting_bytes")}

    def close(self) -> None:
        """Frees the ring, for all processes; nobody may write or read at that moment. Of one opened by handles: only
        forgets it.
        """
        if self._own:
            lib.pv_face_ring_free(self._ring, new_error())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
