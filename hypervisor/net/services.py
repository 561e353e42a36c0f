"""Services as values, and the chains and maps that translate them: one look-up a packet, however many there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

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
        """The families of its addresses."""
        return sorted({address.version for address in self.addresses})

    def of_version(self, version: int) -> list[Endpoint]:
        """Its endpoints of one family."""
        return [e for e in self.endpoints if e.address.version == version]


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
            if keys and service.node_port:
                by_node_port[service.protocol, service.node_port] = _chain_of(service, version)
            if not service.of_version(version):
                unanswered |= dict.fromkeys(keys)
        key = (ADDRESS_TYPE[version], *_SERVICE_KEY)
        yield f"services{version}", Set(key, by_address, verdicts=True)
        yield f"nodeports{version}", Set(_SERVICE_KEY, by_node_port, verdicts=True)
        yield f"unanswered{version}", Set(key, unanswered)


def service_chains(services: Iterable[ServicePort]) -> Iterator[tuple[str, Chain]]:
    """A chain for each port of a service and family."""
    for service in services:
        for version in service.versions():
            yield _chain_of(service, version), Chain(tuple(_picks(service, version)))


def _picks(service: ServicePort, version: int) -> Iterator[Rule]:
    endpoints = service.of_version(version)
    if not endpoints:
        # nat chains cannot refuse; `input` and `forward` do, for what was not translated and is the cluster's
        return
    picks = [[i, {"concat": [str(e.address), e.port]}] for i, e in enumerate(endpoints)]
    number: Expression = {"numgen": {"mode": "random", "mod": len(endpoints), "offset": 0}}
    if service.affinity_s:
        # A hash of the client's address keeps a client on its endpoint for as long as the endpoints are the same ones.
        number = {"jhash": {"mod": len(endpoints), "offset": 0, "expr": saddr(version)}}
    target = {"map": {"key": number, "data": {"set": picks}}}
    dnat = {"dnat": {"family": family_of(version), "addr": target}}
    yield match(L4, service.protocol), dnat  # nft wants the protocol before a port's mapping


def translations() -> tuple[Rule, ...]:
    """What is a service's goes to its chain."""
    by_address = [(vmap(concat(daddr(v), L4, DPORT), f"services{v}"),) for v in (4, 6)]
    by_port = [(of_family(v), LOCAL, vmap(concat(L4, DPORT), f"nodeports{v}")) for v in (4, 6)]
    return (*by_address, *by_port)


def refusals() -> tuple[Rule, ...]:
    """A service without endpoints refuses, so that nobody waits for it."""
    return tuple((match(concat(daddr(v), L4, DPORT), f"@unanswered{v}"), REJECT) for v in (4, 6))
