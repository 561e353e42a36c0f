"""What pod VM controllers share on a host, passed explicitly, and the times that they keep to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from hypervisor.controller.backoff import BackoffPolicy
from hypervisor.controller.machine import Machines
from hypervisor.controller.podobjects import HostObjects, PodObjects
from hypervisor.controller.sizing import MemoryLedger
from hypervisor.controller.spec import ContainerSpec
from hypervisor.images.credentials import Credentials
from hypervisor.images.model import Image
from hypervisor.introspect.agent import AgentClient
from hypervisor.net.pods import PodFacts
from hypervisor.vsock.address import VsockAddress


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds.

    :ivar boot_s: from QEMU's start to the agent's first answer
    :ivar agent_s: an agent that does not answer for so long is given up, and its VM with it
    :ivar linger_s: how long an ended pod's VM waits for sessions that still read from it
    :ivar archive_s: for taking the logs out of a VM that is about to go
    :ivar storage_s: between two looks at what a pod with limits takes of its disk
    """

    boot_s: float = 90.0
    agent_s: float = 15.0
    linger_s: float = 10.0
    archive_s: float = 120.0
    storage_s: float = 10.0
    backoff: BackoffPolicy = field(default_factory=BackoffPolicy)


class ImageSource(Protocol):
    """Where a container's image comes from."""

    async def resolve(self, container: ContainerSpec, image_id: str, credentials: Credentials | None = None) -> Image:
        """The image, pulled if it must be.

        :param image_id: where given, the stored image of this id and no other
        :param credentials: for its registry; None: the host's own
        :raises HvError: it cannot be had
        """

    def asks_registry(self, container: ContainerSpec) -> bool:
        """Whether `resolve` will ask the image's registry, rather than take what is stored."""

    def lease(self, image: Image) -> AbstractContextManager[object]:
        """While it is open the image is not removed; raises `NotFound` if it has been."""


class PodNetwork(Protocol):
    """The pod network of a host, as a pod VM controller needs it."""

    def addresses(self, uid: str) -> tuple[str, ...]:
        """A pod's, of an earlier daemon too; empty when it has none."""

    async def allocate(self, uid: str) -> tuple[str, ...]:
        """Gives a pod its addresses, once. Raises `ResourceExhausted`."""

    async def name_servers(self) -> tuple[str, ...]:
        """Those of the cluster, for pods; none: they ask the host's."""

    async def connect(self, uid: str, tap: str, mac: str, facts: PodFacts) -> None:
        """Makes a pod reachable whose tap is there; may be repeated. Raises `HvError`."""

    async def wait_unplugged(self, uid: str) -> None:
        """Waits until somebody has removed its tap: its VM has no network any more."""

    async def release(self, uid: str) -> None:
        """Takes its addresses back; harmless for a pod that has none."""


@dataclass(frozen=True)
class Services:
    """One of each a host.

    :ivar starts: holds back VM starts, so that those that have begun come to their end
    :ivar objects: what volumes are made of
    :ivar network: gives pods their addresses; None: each has QEMU's user-mode network to itself
    """

    machines: Machines
    images: ImageSource
    ledger: MemoryLedger
    starts: asyncio.Semaphore
    times: Times = Times()
    connect: Callable[[VsockAddress], AgentClient] = AgentClient
    objects: PodObjects = field(default_factory=HostObjects)
    network: PodNetwork | None = None
