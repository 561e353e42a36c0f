"""A pod VM's network: the pod's addresses and name servers, and its tap's connection to the pod network.

Where the host has no pod network each VM has QEMU's user-mode network to itself, and nothing is to be done here.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from hypervisor.controller.machine import Machine
from hypervisor.controller.manifest import CLUSTER_DOMAIN
from hypervisor.controller.podfacts import facts_of
from hypervisor.controller.resolving import resolving
from hypervisor.controller.services import PodNetwork
from hypervisor.controller.spec import PodSpec
from hypervisor.controller.wanted import Wanted
from hypervisor.errors import VmFailed


class VmNetwork:
    """Of one pod."""

    def __init__(self, network: PodNetwork | None, uid: str, wanted: Wanted) -> None:
        self._network = network
        self._uid = uid
        self._wanted = wanted

    def recalled(self, pod: PodSpec) -> PodSpec:
        """The pod with the addresses that an earlier daemon gave it."""
        return _addressed(pod, self._network.addresses(self._uid) if self._network else ())

    async def allocated(self, pod: PodSpec) -> PodSpec:
        """The pod with addresses of its own; without when it is no longer wanted. Raises `ResourceExhausted`."""
        if self._network is None or pod.network.mode == "none":
            return pod
        return _addressed(pod, await self._wanted.interruptible(self._network.allocate(self._uid)) or ())

    async def resolved(self, pod: PodSpec) -> PodSpec:
        """The pod with the name servers that its guest is to ask, where its DNS policy says so."""
        if self._network is None or pod.network.mode == "none":
            return pod
        servers = await self._wanted.interruptible(self._network.name_servers()) or ()
        network = resolving(pod.network, pod.namespace, CLUSTER_DOMAIN, servers)
        return replace(pod, network=network)

    async def connect(self, machine: Machine, pod: PodSpec) -> None:
        """Makes the pod reachable in its VM; may be repeated. Raises `HvError`."""
        if self._network is not None and machine.tap is not None:
            await self._network.connect(self._uid, *machine.tap, facts_of(pod))

    async def wait_unplugged(self) -> None:
        """:raises VmFailed: the VM's tap was removed; QEMU does not hear of that, and only another VM has another"""
        if self._network is None:
            await asyncio.Event().wait()
            return
        await self._network.wait_unplugged(self._uid)
        raise VmFailed("its tap was removed from the host; a VM with another one takes its place")

    async def release(self) -> None:
        """Gives the pod's addresses back; harmless when it has none."""
        if self._network is not None:
            await self._network.release(self._uid)


def _addressed(pod: PodSpec, addresses: tuple[str, ...]) -> PodSpec:
    return replace(pod, network=replace(pod.network, routed=addresses))
