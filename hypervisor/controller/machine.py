"""What a pod VM controller needs of the VM manager, no more: so that its state machine can be tested by itself.

`hypervisor.controller.vmhost` implements this over `hypervisor.vmm`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hypervisor.controller.poddisks import NO_CHAINS, PodDisks
from hypervisor.controller.sizing import VmSize
from hypervisor.controller.spec import NetworkMode
from hypervisor.vsock.address import VsockAddress


@dataclass(frozen=True, slots=True)
class VmRequest:
    """A VM for one pod.

    :ivar directory: the VM's own folder; must not exist, and is the VM manager's from now on
    :ivar images: read-only disks, as (serial, path)
    :ivar label: for people: namespace/name
    :ivar cold: boot from the kernel on, even where a template would do
    :ivar disks: the chains of its disks
    """

    directory: Path
    size: VmSize
    images: tuple[tuple[str, Path], ...]
    network: NetworkMode
    label: str
    cold: bool = False
    disks: PodDisks = NO_CHAINS


class Machine(Protocol):
    """A VM that has been started."""

    @property
    def address(self) -> VsockAddress:
        """Where its agent listens."""

    @property
    def tap(self) -> tuple[str, str] | None:
        """The name of its tap and its MAC address, where it is on the pod network."""

    def disk_serial(self, image: Path) -> str:
        """By which serial the guest finds the disk of this image; of `VmRequest.images`.

        :raises NotFound: it has no such disk
        """

    async def wait_dead(self) -> str:
        """Waits until the VM has ended; why, in one line for a user, with the last of its console."""

    def disk_full(self) -> AsyncIterator[bool]:
        """True when the VM stops because the host's disk is full; False when there is room and it goes on."""

    def note_started(self) -> None:
        """Its first container has started: what it has touched up to here, later clones will touch too."""

    def console_tail(self, limit: int) -> bytes:
        """At most `limit` of the last bytes of the guest's console."""

    def memory_used(self) -> int:
        """Bytes of host memory that its processes use now."""

    async def stats(self) -> Mapping[str, Any]:
        """Counters for ``hv top``."""

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """A QMP command; raises `HvError`."""

    async def save(self, folder: Path, name: str, *, goes_on: bool = False) -> Mapping[str, Any]:
        """Makes the snapshot `folder` of it; what it took.

        :param goes_on: afterwards it goes on; else it stands still, to be ended
        :raises HvError: it could not be made; there is none, and the guest goes on
        """

    async def wake(self) -> bool:
        """Lets a guest go on that stands still, by whomever it was left so; whether it did. Raises `HvError`."""

    async def stop(self, shutdown: Callable[[], Awaitable[None]] | None) -> None:
        """Ends it, gracefully through `shutdown` where given; returns when its processes have gone. Never raises."""

    async def remove(self) -> None:
        """Ends whatever still runs and removes its folder."""

    async def detach(self) -> None:
        """Lets go of it without ending it."""


class Machines(Protocol):
    """The VM manager."""

    async def start(self, request: VmRequest) -> Machine:
        """:raises HvError: it could not be started; nothing of it is left"""

    async def check(self, request: VmRequest, folder: Path) -> None:
        """Does nothing where `resume` would do. Raises `HvError` as it."""

    async def resume(self, request: VmRequest, folder: Path) -> Machine:
        """The VM of the snapshot `folder`, as it was; it stands still until it is woken.

        :raises HvError: it does not fit this host, is damaged, or could not be started; nothing of it is left
        """

    async def adopt(self, directory: Path) -> Machine | None:
        """The VM that an earlier daemon started there; None when it does not run. Believes nothing unchecked."""

    def usage(self) -> Mapping[str, Any]:
        """What it takes beside its VMs: ``page_frames`` of the database, ``pool`` of the warm VMs, where there are."""

    async def sweep(self, directory: Path) -> None:
        """Ends every process of the VM there and removes all that it left; harmless when there is nothing."""
