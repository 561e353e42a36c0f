"""How big a pod's VM must be, and whether the host can still hold it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from hypervisor.controller.spec import ContainerSpec, PodSpec
from hypervisor.errors import InvalidInput, ResourceExhausted
from hypervisor.kube.quantity import format_bytes

MIB = 1024 * 1024
CONTAINER_MEMORY = 128 * MIB
"""For a container that sets no limit."""
GUEST_OVERHEAD = 96 * MIB
"""Kernel, agent and crun of an idle guest; docs/pods.md has the measurement."""
PROCESS_OVERHEAD = 160 * MIB
"""QEMU (under TCG most of it translated code) and vmx themselves, beside the guest's RAM; measured, see there."""
HOST_RESERVE = 256 * MIB
"""Left to everything else on the host."""
DEFAULT_DISK = 1024 * MIB
MAX_IMPLIED_DISK = 256 * 1024 * MIB
"""However much volumes and containers may take; who needs more says so."""
MIN_DISK = 16 * MIB
FILE_SYSTEM = 16 * MIB
"""For the file system itself and the logs, beside what limits promise."""
MAX_VCPUS = 64


@dataclass(frozen=True, slots=True)
class VmSize:
    """What a pod's VM is made of. `quotas`: directories of its disk have limits."""

    vcpus: int
    memory_bytes: int
    disk_bytes: int
    quotas: bool = False

    @property
    def promised_bytes(self) -> int:
        """Host memory that the VM may come to use."""
        return self.memory_bytes + PROCESS_OVERHEAD


def vm_size(pod: PodSpec, *, host_cpus: int | None = None) -> VmSize:
    """The size of a pod's VM: the sum of its containers' limits, and what the guest itself needs.

    Limits above the host's CPUs are held by the containers' quotas; the VM gets no more CPUs than the host has.

    :raises InvalidInput: more CPUs requested than the host has, or a disk too small to hold a file system
    """
    cpus = host_cpus or os.cpu_count() or 1
    requested = sum(c.resources.cpu_request_millis or 0 for c in pod.containers)
    if requested > cpus * 1000:
        raise InvalidInput(
            f"the pod requests {requested}m of CPU; this host has {cpus * 1000}m", where="spec.containers"
        )
    groups = running_together(pod)
    wanted = max(*map(_millis, groups), 1)
    memory = max(*map(_memory, groups), 0)
    return VmSize(
        vcpus=min(-(-wanted // 1000), cpus, MAX_VCPUS),
        memory_bytes=-(-(memory + GUEST_OVERHEAD) // MIB) * MIB,
        disk_bytes=_disk(pod),
        quotas=has_disk_limits(pod),
    )


def default_size() -> VmSize:
    """Of a pod with one container that asks for nothing."""
    return VmSize(vcpus=1, memory_bytes=CONTAINER_MEMORY + GUEST_OVERHEAD, disk_bytes=DEFAULT_DISK)


def running_together(pod: PodSpec) -> list[list[ContainerSpec]]:
    """Containers that run at the same time: sidecars so far and each init container, then all sidecars and the rest."""
    groups: list[list[ContainerSpec]] = []
    sidecars: list[ContainerSpec] = []
    for container in pod.init_containers:
        groups.append([*sidecars, container])
        if container.sidecar:
            sidecars.append(container)
    return [*groups, [*sidecars, *pod.containers]]


def _millis(containers: Iterable[ContainerSpec]) -> int:
    return sum(c.resources.cpu_limit_millis or c.resources.cpu_request_millis or 0 for c in containers)


def _memory(containers: Iterable[ContainerSpec]) -> int:
    limits = (c.resources.memory_limit or max(c.resources.memory_request or 0, CONTAINER_MEMORY) for c in containers)
    return sum(limits)


def has_disk_limits(pod: PodSpec) -> bool:
    """Whether any part of it may take so much of the disk and no more."""
    limited = any(c.resources.disk_limit for c in (*pod.init_containers, *pod.containers))
    return limited or any(v.medium == "disk" and v.size_bytes for v in pod.volumes)


def _disk(pod: PodSpec) -> int:
    """What was asked for by name, else room for all limits and for what has none."""
    if pod.disk_bytes is not None and pod.disk_bytes < MIN_DISK:
        least = format_bytes(MIN_DISK)
        raise InvalidInput(f"a disk of {pod.disk_bytes} bytes; a pod needs {least} at least", where="spec")
    limits = [c.resources.disk_limit for c in (*pod.init_containers, *pod.containers)]
    volumes = sum(v.size_bytes or 0 for v in pod.volumes if v.medium == "disk")
    unlimited = DEFAULT_DISK if None in limits else 0
    wanted = pod.disk_bytes or sum(limit or 0 for limit in limits) + volumes + unlimited
    if pod.disk_bytes is None and has_disk_limits(pod):
        wanted = min(wanted + wanted // 32 + FILE_SYSTEM, MAX_IMPLIED_DISK)
    return -(-wanted // MIB) * MIB


def available_memory() -> int:
    """Bytes that the host's kernel says could be used without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return 0


class MemoryLedger:
    """Memory promised to VMs, so that no two starts count on the same free memory. Not thread-safe.

    A VM's promise holds from before its start until it has ended; what it uses already is missing from the kernel's
    figure and is counted once (`measure`).

    *Spare* VMs (the warm pool's) hold their promise until another one needs it: then they are told to go, and count as
    free memory from that moment on, for what they use is on its way back to the kernel.
    """

    def __init__(self, *, available: Callable[[], int] = available_memory, reserve: int = HOST_RESERVE) -> None:
        self._available = available
        self._reserve = reserve
        self._promised: dict[str, int] = {}
        self._used: dict[str, Callable[[], int]] = {}
        self._spares: dict[str, Callable[[], None]] = {}
        self._leaving: set[str] = set()

    def promise(self, uid: str, size: VmSize) -> None:
        """Promises a VM its memory; harmless if it has been promised already.

        :raises ResourceExhausted: it does not fit
        """
        if uid in self._promised:
            return
        free = self._free()
        worth = {spare: max(self._promised[spare], self._used_by(spare)) for spare in self._spares}
        if size.promised_bytes > free + sum(worth.values()):
            raise self._refusal(size, max(0, free + sum(worth.values())))
        for spare, gives in worth.items():
            if size.promised_bytes <= free:
                break
            free += gives
            self._give_up(spare)
        self._promised[uid] = size.promised_bytes

    def promise_spare(self, uid: str, size: VmSize, give_up: Callable[[], None]) -> None:
        """As `promise`, for a VM that nobody needs yet: it takes nothing from other spares.

        :param give_up: called once, when its memory is needed; the VM is to end soon then, and `release` follows
        :raises ResourceExhausted: it does not fit
        """
        free = self._free()
        if size.promised_bytes > free:
            raise self._refusal(size, max(0, free))
        self._promised[uid] = size.promised_bytes
        self._spares[uid] = give_up

    def relieve(self) -> None:
        """Gives a spare up when the host's memory has become short by something else than VMs' promises."""
        if self._spares and self._free() < 0:
            self._give_up(next(iter(self._spares)))

    def _give_up(self, spare: str) -> None:
        self._leaving.add(spare)
        self._spares.pop(spare)()

    def _free(self) -> int:
        """Bytes that nobody has or was promised; below zero when promises cannot be kept any more."""
        staying = {uid: amount for uid, amount in self._promised.items() if uid not in self._leaving}
        outstanding = sum(max(0, amount - self._used_by(uid)) for uid, amount in staying.items())
        coming_back = sum(self._used_by(uid) for uid in self._leaving)
        return self._available() - self._reserve - outstanding + coming_back

    def _refusal(self, size: VmSize, free: int) -> ResourceExhausted:
        return ResourceExhausted(
            f"the pod's VM needs {_mib(size.promised_bytes)} of memory ({_mib(size.memory_bytes)} for the guest); "
            f"the host has {_mib(free)} free beside what its {len(self._promised)} other VMs were promised; lower "
            "resources.limits.memory or remove a pod"
        )

    def _used_by(self, uid: str) -> int:
        measure = self._used.get(uid)
        return measure() if measure else 0

    def measure(self, uid: str, used: Callable[[], int]) -> None:
        """The VM runs: `used` tells how many bytes of host memory it uses now. Until then it is taken to use none."""
        self._used[uid] = used

    def hold(self, uid: str, size: VmSize) -> None:
        """Records the promise of a VM that runs already; never refused."""
        self._promised[uid] = size.promised_bytes

    def release(self, uid: str) -> None:
        """The VM has ended; harmless if it had no promise."""
        self._promised.pop(uid, None)
        self._used.pop(uid, None)
        self._spares.pop(uid, None)
        self._leaving.discard(uid)


def _mib(count: int) -> str:
    return f"{count // MIB} MiB"
