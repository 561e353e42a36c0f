"""A host without HTTP: pods over made-up guests (see `fake_guest`), with back-offs of milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_guest import FakeImages, FakeMachines

from hypervisor.controller.backoff import BackoffPolicy
from hypervisor.controller.hostfiles import prepare
from hypervisor.controller.paths import HostPaths
from hypervisor.controller.podobjects import HostObjects, PodObjects
from hypervisor.controller.pods import Pods
from hypervisor.controller.podvm import PodVm
from hypervisor.controller.services import PodNetwork, Services, Times
from hypervisor.controller.sizing import MemoryLedger

TIMES = Times(boot_s=4, agent_s=2, linger_s=0.2, archive_s=5, storage_s=0.05, backoff=BackoffPolicy(0.05, 0.2))
GIB = 2**30


class Bench:
    """A host without HTTP: pods, and the made-up machines and images that they get."""

    def __init__(self, root: Path) -> None:
        self.paths = HostPaths(root)
        prepare(self.paths)
        self.machines = FakeMachines()
        self.images = FakeImages()
        self.ledger = MemoryLedger(available=lambda: 4 * GIB)
        self.starts = 2
        self.objects: PodObjects = HostObjects()
        self.network: PodNetwork | None = None
        self.pods = self.new_pods()

    def new_pods(self) -> Pods:
        """As a new daemon would have them."""
        services = Services(
            machines=self.machines,
            images=self.images,
            ledger=self.ledger,
            starts=asyncio.Semaphore(self.starts),
            times=TIMES,
            objects=self.objects,
            network=self.network,
        )
        return Pods(self.paths, services)

    async def restart(self) -> None:
        """The daemon goes and another comes."""
        await self.pods.close()
        self.ledger = MemoryLedger(available=lambda: 4 * GIB)
        self.pods = self.new_pods()
        await self.pods.load()

    async def create(self, name: str = "p", policy: str = "Never", **spec: Any) -> PodVm:
        return await self.pods.create(manifest(name, policy, **spec))


def manifest(name: str = "p", policy: str = "Never", **spec: Any) -> dict[str, Any]:
    body = {"restartPolicy": policy, "containers": [{"name": "c", "image": "x"}]} | spec
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": body}


async def until(pod: PodVm, condition: Callable[[], bool], timeout: float = 20) -> None:
    """Waits until a change of the pod's record makes `condition` true."""
    version = -1
    async with asyncio.timeout(timeout):
        while not condition():
            version = await pod.journal.topic.wait_newer(version)
