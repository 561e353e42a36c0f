"""A host's part of the pod network: which pod has which addresses, and what the kernel must hold for that.

Theory of operation
-------------------
``allocate`` gives a pod its addresses and remembers them in a file; ``connect`` makes them reachable once the pod's tap
is there; ``release`` forgets them. What the kernel holds (routes, the packet filter) is a function of that and of the
services and policies: one task (`run`) brings the kernel to it, whenever something changed, by the difference from what
it put there last; every few seconds it looks whether that still is so, and puts back what somebody removed by hand.
Taps and routes go by themselves with a pod's QEMU.

A host of a cluster does not touch what an earlier daemon left in the kernel before it knows the cluster's services and
policies (`hold`), and a pod is connected only when its policies are in force.

::

    allocate ──▶ file ──▶ connect (tap, MAC) ──▶ routes, set of the packet filter ──▶ release
                  │                                     ▲
                  └── a daemon that starts reads it ────┘  run(): again and again
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from hypervisor.errors import HvError, InvalidInput
from hypervisor.net import firewall
from hypervisor.net.addresses import Address, Pool, Subnet, parse_cidr
from hypervisor.net.devices import Devices, enable_forwarding
from hypervisor.net.pods import ConnectedPod, PodFacts
from hypervisor.net.policies import Policies
from hypervisor.net.ruleset import PodPort, Resolver, State, render
from hypervisor.net.services import Endpoint, ServicePort
from hypervisor.net.upkeep import MTU, TABLE, TAP, Upkeep

log = structlog.get_logger(__name__)

REPAIR_S = 10.0
"""Between two looks at whether the kernel still holds what it should, at least."""
REST = 50
"""A look is followed by that many times its own length without one: thousands of services take a while to list."""
HOLD_S = 20.0
"""How long pods wait for a cluster that says nothing."""


@dataclass(frozen=True)
class Ranges:
    """Addresses that matter to a host.

    :param pods: this host's pods', one range of each family at most
    :param cluster: of all pods and services: reached without translation
    """

    pods: tuple[Subnet, ...]
    cluster: tuple[Subnet, ...]


def parse_ranges(pods: Iterable[str], cluster: Iterable[str]) -> Ranges:
    """Checked. Raises `InvalidInput`."""
    own = tuple(parse_cidr(text) for text in pods)
    if not own or len({r.version for r in own}) != len(own):
        raise InvalidInput("a host has one range for its pods, or one of IPv4 and one of IPv6", where="podCIDRs")
    return Ranges(own, (*own, *(parse_cidr(text, where="clusterCIDR") for text in cluster)))


PolicySource = Callable[[Sequence[ConnectedPod]], Policies]
"""What this host's pods are guarded by, as of now. Called in another thread."""


@dataclass(frozen=True)
class _Link:
    """A pod that is connected."""

    tap: str
    mac: str
    facts: PodFacts


class HostNetwork:
    """The pod network on one host; for one event loop. `run` keeps the kernel as it should be.

    :param file: remembers the ranges and who has which address
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        host = hashlib.sha256(str(file).encode()).hexdigest()[:4]
        self.tap_prefix = f"{TAP}{host}"
        self.table = f"{TABLE}{host}"
        self._upkeep = Upkeep(self.table, self.tap_prefix)
        self._ranges = Ranges((), ())
        self._texts: tuple[list[str], list[str]] = ([], [])
        self._pools: dict[int, Pool] = {}
        self._addresses: dict[str, tuple[Address, ...]] = {}
        self._links: dict[str, _Link] = {}
        self._services: tuple[ServicePort, ...] = ()
        self._policies: PolicySource = lambda _: Policies()
        self._resolver: Resolver | None = None
        self._resolves: dict[str, frozenset[str]] = {}
        self._unplugged: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._told = asyncio.Event()
        self._told.set()
        self._known = asyncio.Event()
        self._saving = asyncio.Lock()
        self._changed = asyncio.Event()
        self._settled = asyncio.Condition()
        self._wanted = self._done = 0
        self._load()

    def _load(self) -> None:
        try:
            saved = json.loads(self._file.read_text())
            self.set_ranges(saved["pods"], saved["cluster"])
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            log.warning("addresses of pods are forgotten: the file is damaged", file=str(self._file))
            return
        for uid, texts in saved["addresses"].items():
            self._restore(uid, tuple(ipaddress.ip_address(text) for text in texts))

    def _restore(self, uid: str, addresses: tuple[Address, ...]) -> None:
        try:
            for address in addresses:
                self._pools[address.version].reserve(address)
        except (InvalidInput, KeyError):
            return  # of a range that this host no longer has: the pod gets another when it starts anew
        self._addresses[uid] = addresses

    async def _save(self) -> None:
        """Writes of two pods never cross: the later one has both."""
        async with self._saving:
            await asyncio.to_thread(self._write, self._text())

    def _text(self) -> str:
        addresses = {uid: [str(a) for a in own] for uid, own in self._addresses.items()}
        return json.dumps({"pods": self._texts[0], "cluster": self._texts[1], "addresses": addresses})

    def _write(self, text: str) -> None:
        beside = self._file.with_suffix(".new")
        with beside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(self._file)

    def set_ranges(self, pods: Iterable[str], cluster: Iterable[str]) -> None:
        """Tells the host its part of the cluster's addresses; pods wait for it. Raises `InvalidInput`."""
        texts = (list(pods), list(cluster))
        if texts == self._texts:
            return
        self._ranges, self._texts = parse_ranges(*texts), texts
        self._pools, before = {int(r.version): Pool(r) for r in self._ranges.pods}, self._addresses
        self._addresses = {}
        for uid, addresses in before.items():
            self._restore(uid, addresses)
        self._known.set()
        self._touch()

    def addresses(self, uid: str) -> tuple[str, ...]:
        """A pod's, IPv4 first; empty when it has none."""
        return tuple(str(address) for address in self._addresses.get(uid, ()))

    async def allocate(self, uid: str) -> tuple[str, ...]:
        """Gives a pod its addresses; the same ones when it has them already. Waits until the host knows its ranges.

        :raises ResourceExhausted: there are none left
        """
        await self._known.wait()
        if uid not in self._addresses:
            taken: list[Address] = []
            try:
                taken.extend(pool.allocate() for _, pool in sorted(self._pools.items()))
            except HvError:
                for address in taken:
                    self._pools[address.version].free(address)
                raise
            self._addresses[uid] = tuple(taken)
            await self._save()
        return self.addresses(uid)

    async def connect(self, uid: str, tap: str, mac: str, facts: PodFacts) -> None:
        """Makes a pod reachable; returns when it is, and its policies are in force. Raises `HvError`."""
        self._links[uid] = _Link(tap, mac, facts)
        self._unplugged[uid].clear()
        async with Devices.opened() as devices:
            await devices.connect(tap, mac, self._addresses[uid], mtu=MTU)
        await self._settle()

    async def wait_unplugged(self, uid: str) -> None:
        """Waits until a pod's tap was removed by hand; noticed within seconds."""
        await self._unplugged[uid].wait()

    async def release(self, uid: str) -> None:
        """Takes a pod's addresses back; harmless for one that has none."""
        self._links.pop(uid, None)
        self._unplugged.pop(uid, None)
        for address in self._addresses.pop(uid, ()):
            self._pools[address.version].free(address)
        await self._save()
        self._touch()

    def keep_only(self, uids: set[str]) -> None:
        """Frees what belongs to pods that are no more. Before the first pod starts."""
        for uid in set(self._addresses) - uids:
            for address in self._addresses.pop(uid):
                self._pools[address.version].free(address)
        self._write(self._text())

    def set_services(self, services: tuple[ServicePort, ...]) -> None:
        """What services there are now."""
        if services != self._services:
            self._services = services
            self._touch()

    def set_policies(self, source: PolicySource) -> None:
        """Whom to ask for the pods' policies from now on; also to be called when what it says has changed."""
        self._policies = source
        self._told.set()
        self._touch()

    def set_resolver(self, resolver: Resolver | None) -> None:
        """Where pods' questions about names go; None: nobody answers them."""
        if resolver != self._resolver:
            self._resolver = resolver
            self._touch()

    async def name_servers(self) -> tuple[str, ...]:
        """The cluster's, as pods are to ask them; waits a while for a cluster that has not said yet."""
        try:
            async with asyncio.timeout(HOLD_S):
                await self._told.wait()
        except TimeoutError:
            return ()
        return tuple(str(a) for a in self._resolver.addresses if a.version == 4) if self._resolver else ()

    def may_ask(self, address: str, protocol: str) -> bool:
        """Whether an address is a pod's of this host, and its policies let it ask the cluster's name server."""
        return protocol in self._resolves.get(address, ())

    def hold(self) -> None:
        """A cluster will tell of services and policies: until then the kernel stays as it is."""
        self._told.clear()

    def connected(self) -> tuple[ConnectedPod, ...]:
        """The pods that are."""
        return tuple(
            ConnectedPod(uid, link.tap, link.mac, self._addresses[uid], link.facts)
            for uid, link in sorted(self._links.items())
        )

    def state(self) -> State:
        """What the packet filter should be, but for the policies."""
        connected = self.connected()
        pods = tuple(PodPort(pod.tap, pod.addresses, pod.uid, pod.facts.limits) for pod in connected)
        services = (*self._services, *(s for pod in connected for s in _host_services(pod)))
        return State(self.table, self.tap_prefix, self._ranges.cluster, pods, services, resolver=self._resolver)

    def _touch(self) -> None:
        self._wanted += 1
        self._changed.set()

    async def _settle(self) -> None:
        self._touch()
        mine = self._wanted
        async with self._settled:
            await self._settled.wait_for(lambda: self._done >= mine)

    async def run(self) -> None:
        """Keeps the kernel as it should be, until it is cancelled; then takes the packet filter back."""
        enable_forwarding()
        try:
            await self._upkeep.sweep()
            await self._wait_told()
            next_look = time.monotonic() + REPAIR_S
            while True:
                await self._once()
                try:
                    async with asyncio.timeout(next_look - time.monotonic()):
                        await self._changed.wait()
                except TimeoutError:
                    next_look = await self._look()
        finally:
            await asyncio.shield(self._upkeep.take_back())

    async def _wait_told(self) -> None:
        """Waits for the cluster, as long as a daemon before this one left something that works in the kernel."""
        try:
            async with asyncio.timeout(HOLD_S):
                await self._told.wait()
        except TimeoutError:
            log.warning("the cluster says nothing of its services and policies; pods start nevertheless")
        try:
            if self._told.is_set() or self.table not in await firewall.tables():
                return
        except HvError:
            return
        while not self._told.is_set():
            self._changed.clear()
            await self._finish(self._wanted)
            await self._changed.wait()

    async def _once(self) -> None:
        """Brings the kernel to what is wanted now. What fails is tried again at the next look."""
        self._changed.clear()
        aim = self._wanted
        if aim != self._done or not self._upkeep.is_whole:
            state, connected, source = self.state(), self.connected(), self._policies
            try:
                policies = await asyncio.to_thread(source, connected)
                self._resolves = _resolves(connected, policies)
                await self._upkeep.bring(await asyncio.to_thread(render, replace(state, policies=policies)))
            except HvError as error:
                log.warning("packet filter is not as it should be", reason=str(error))
            except Exception:  # an object that nobody expects: what is in force stays, and the next look tries again
                log.exception("packet filter could not be made out")
                self._upkeep.forget()
        await self._finish(aim)

    async def _look(self) -> float:
        """Looks at what the kernel has; when the next look is to be."""
        began = time.monotonic()
        for uid in await self._upkeep.look(self.connected()):
            self._unplugged[uid].set()
        ended = time.monotonic()
        return ended + max(REPAIR_S, REST * (ended - began))

    async def _finish(self, aim: int) -> None:
        async with self._settled:
            self._done = max(self._done, aim)
            self._settled.notify_all()


def _host_services(pod: ConnectedPod) -> Iterator[ServicePort]:
    """Ports of the host are as a Service's with one endpoint: at one address, or as a node port at all."""
    for port in pod.facts.host_ports:
        name = f"host-{pod.tap}-{port.protocol}{port.number}"
        endpoints = tuple(Endpoint(address, port.pod_port) for address in pod.addresses)
        at = (port.address,) if port.address is not None else ()
        yield ServicePort(name, at, port.protocol, port.number, endpoints, 0 if at else port.number)


def _resolves(connected: Sequence[ConnectedPod], policies: Policies) -> dict[str, frozenset[str]]:
    guarded = {guard.uid: guard.resolves for guard in policies.guards}
    everything = frozenset(("udp", "tcp"))
    return {str(address): guarded.get(pod.uid, everything) for pod in connected for address in pod.addresses}
