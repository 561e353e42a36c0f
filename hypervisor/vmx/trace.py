"""What the device process does, event by event: faults served, turns of the vsock device, block requests.

Off until somebody asks: then a trace point costs a load and a branch. The rings are made at the first `start` and kept
until the process ends, since a point that is under way may write to them at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypervisor.percpu.area import PerCpuAreas
from hypervisor.percpu.trace import PerCpuTrace

RECORDS = 8192
"""That each CPU keeps: 256 KiB."""


class DeviceTrace:
    """The trace of one process. Not thread-safe: for its control socket.

    :param modules: each takes a hook, or 0
    """

    def __init__(self, modules: Sequence[Callable[[int], None]]) -> None:
        self._modules = tuple(modules)
        self._trace: PerCpuTrace | None = None

    def start(self) -> None:
        """Events are kept from now on; harmless when they are already.

        :raises ResourceExhausted: no memory
        """
        if self._trace is None:
            self._trace = PerCpuTrace(PerCpuAreas(), RECORDS)
        self._use(self._trace.hook)

    def stop(self) -> None:
        """No more events; what is there stays."""
        self._use(0)

    def take(self, fd: int) -> None:
        """Writes what there is (nothing before the first `start`) as a Chrome trace to `fd`, which stays the caller's.

        :raises HvError: it cannot be written
        """
        if self._trace is not None:
            self._trace.write(fd)

    def stats(self) -> dict[str, int]:
        """What the per-CPU sequences of this process did: committed, started again because the thread was preempted,
        moved or signalled in one; and the memory of the areas. Counters never fall; all 0 before the first `start`.
        """
        if self._trace is None:
            return {"commits": 0, "restarts": 0, "memory_bytes": 0}
        areas = self._trace.areas.stats()
        return {"commits": self._trace.committed, "restarts": areas.aborts, "memory_bytes": areas.memory_bytes}

    def _use(self, hook: int) -> None:
        for module in self._modules:
            module(hook)
