"""Services as values, and the chains and maps that translate them: one look-up a packet, however many there are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from hypervisor.net.addresses import Address
from hypervisor.net.expressions import (
    ADDRESS_TYPE,
    DPORT,
    L4,
    LOCAL,
    REJECT,
    concat,
    daddr,
    family_of,
    match,
    of_family,
    saddr,
    vmap,
)
from hypervisor.net.table import Chain, Expression, Key, Rule, Set


@dataclass(frozen=True)
class Endpoint:
    """Where a service's connections go."""

    address: Address
    port: int


@dataclass(frozen=True)
class ServicePort:
    """One port of a service.

    :param protocol: ``tcp``, ``udp`` or ``sctp``
    :param node_port: 0: none
    :param affinity_s: seconds for which a client keeps its endpoint; 0: none
    """

    name: str
    addresses: tuple[Address, ...]
    protocol: str
    port: int
    endpoints: tuple[Endpoint, ...]
    node_port: int = 0
    affinity_s: int = 0

    def versions(self) -> list[int]:
        """The families of its addresses; of its endpoints', where it is at ports of the host only."""
        return sorted({a.version for a in self.addresses or [e.address for e in self.endpoints]})

    def of_version(self, version: int) -> list[Endpoint]:
        """Its endpoints of one family."""
        return [e for e in self.endpoints if e.address.version == version]


@dataclass(frozen=True)
class HostPort:
    """A port of the host that leads to a pod's.

    :ivar address: the one of the host's that it is at; None: all of them
    """

    number: int
    protocol: str
    pod_port: int
    address: Address | None = None


KEPT = 16384
_SERVICE_KEY = ("inet_proto", "inet_service")


def _chain_of(service: ServicePort, version: int) -> str:
    return f"svc{version}-{service.name}"


def service_sets(services: Iterable[ServicePort]) -> Iterator[tuple[str, Set]]:
    """The maps that lead to the services' chains, and the sets of those that nobody serves."""
    listed = list(services)
    for version in (4, 6):
        by_address: dict[Key, str | None] = {}
        by_node_port: dict[Key, str | None] = {}
        unanswered: dict[Key, str | None] = {}
        for service in listed:
            keys: list[Key] = [
                (str(a), service.protocol, service.port) for a in service.addresses if a.version == version
            ]
            by_address |= dict.fromkeys(keys, _chain_of(service, version))
            if service.node_port and version in service.versions():
                by_node_port[service.protocol, service.node_port] = _chain_of(service, version)
            if not service.of_version(version):
                unanswered |= dict.fromkeys(keys)
        key = (ADDRESS_TYPE[version], *_SERVICE_KEY)
        yield f"services{version}", Set(key, by_address, verdicts=True)
        yield f"nodeports{version}", Set(_SERVICE_KEY, by_node_port, verdicts=True)
        yield f"unanswered{version}", Set(key, unanswered)


def affinity_sets(services: Iterable[ServicePort]) -> Iterator[tuple[str, Set]]:
    """Who was led to which endpoint, for as long as its Service says."""
    for service in services:
        if service.affinity_s:
            for endpoint in service.endpoints:
                version = endpoint.address.version
                kind = (ADDRESS_TYPE[version],)
                yield _clients_of(service, endpoint), Set(kind, timeout_s=service.affinity_s)


def service_chains(services: Iterable[ServicePort]) -> Iterator[tuple[str, Chain]]:
    """A chain for each port of a service and family; with affinity also one for each endpoint."""
    for service in services:
        yield from _chains_of(service)


@lru_cache(maxsize=KEPT)
def _chains_of(service: ServicePort) -> tuple[tuple[str, Chain], ...]:
    """Kept from one table to the next: of thousands of Services one has changed."""
    made: list[tuple[str, Chain]] = []
    for version in service.versions():
        endpoints = service.of_version(version)
        if not service.affinity_s or not endpoints:
            made.append((_chain_of(service, version), Chain(tuple(_picks(service, version)))))
            continue
        made.append((_chain_of(service, version), Chain(tuple(_keeps(service, endpoints, version)))))
        made += [(_endpoint_chain(service, e), Chain((_remembers(service, e),))) for e in endpoints]
    return tuple(made)


def _endpoint_chain(service: ServicePort, endpoint: Endpoint) -> str:
    digest = hashlib.sha256(f"{endpoint.address} {endpoint.port}".encode()).hexdigest()[:8]
    return f"end-{service.name}-{digest}"


def _clients_of(service: ServicePort, endpoint: Endpoint) -> str:
    return _endpoint_chain(service, endpoint).replace("end-", "kept-", 1)


def _picks(service: ServicePort, version: int) -> Iterator[Rule]:
    endpoints = service.of_version(version)
    if not endpoints:
        # nat chains cannot refuse; `input` and `forward` do, for what was not translated and is the cluster's
        return
    picks = [[i, {"concat": [str(e.address), e.port]}] for i, e in enumerate(endpoints)]
    target = {"map": {"key": _any_of(endpoints), "data": {"set": picks}}}
    dnat = {"dnat": {"family": family_of(version), "addr": target}}
    yield match(L4, service.protocol), dnat  # nft wants the protocol before a port's mapping


def _any_of(endpoints: list[Endpoint]) -> Expression:
    return {"numgen": {"mode": "random", "mod": len(endpoints), "offset": 0}}


def _keeps(service: ServicePort, endpoints: list[Endpoint], version: int) -> Iterator[Rule]:
    """A client that was led to an endpoint goes there again; else to any."""
    for endpoint in endpoints:
        kept = match(saddr(version), f"@{_clients_of(service, endpoint)}")
        yield kept, {"goto": {"target": _endpoint_chain(service, endpoint)}}
    picks = [[i, {"goto": {"target": _endpoint_chain(service, e)}}] for i, e in enumerate(endpoints)]
    yield ({"vmap": {"key": _any_of(endpoints), "data": {"set": picks}}},)


def _remembers(service: ServicePort, endpoint: Endpoint) -> Rule:
    version = endpoint.address.version
    client = {"elem": {"val": saddr(version), "timeout": service.affinity_s}}
    kept: Expression = {"set": {"op": "update", "elem": client, "set": f"@{_clients_of(service, endpoint)}"}}
    dnat: Expression = {"dnat": {"family": family_of(version), "addr": str(endpoint.address), "port": endpoint.port}}
    return match(L4, service.protocol), kept, dnat


def translations() -> tuple[Rule, ...]:
    """What is a service's goes to its chain."""
    by_address = [(vmap(concat(daddr(v), L4, DPORT), f"services{v}"),) for v in (4, 6)]
    by_port = [(of_family(v), LOCAL, vmap(concat(L4, DPORT), f"nodeports{v}")) for v in (4, 6)]
    return (*by_address, *by_port)


def refusals() -> tuple[Rule, ...]:
    """A service without endpoints refuses, so that nobody waits for it."""
    return tuple((match(concat(daddr(v), L4, DPORT), f"@unanswered{v}"), REJECT) for v in (4, 6))
