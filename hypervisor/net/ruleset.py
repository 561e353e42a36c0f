"""The packet filter as a value: what nftables is to hold for a host's pods and services.

Every look-up is in a set or a map, so that a packet costs the same with one service as with thousands:

    spoofed?     prerouting, raw: (tap, source address) must be in ``pods4`` or ``pods6``, else the packet is dropped
    a service?   prerouting and output, nat: (address, protocol, port) in ``services4|6`` leads to the chain of that
                 service, which picks an endpoint at random
    allowed?     forward and input: by the policies that are about the pod (`hypervisor.net.policies`)
    outside?     postrouting, nat: from a pod to what is not the cluster's gets the host's address
    to the host? input: from a pod only to a service's endpoint that lives on the host, or ping

One table a host, named after it, so that hosts that share a network namespace (a local cluster) do not touch each
other's. Changes are one transaction each: there is no moment without rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hypervisor.net.addresses import GATEWAY4, Address, Subnet
from hypervisor.net.expressions import (
    ACCEPT,
    ADDRESS_TYPE,
    COUNTER,
    DPORT,
    DROP,
    ESTABLISHED,
    IIFNAME,
    L4,
    OIFNAME,
    PING,
    TRANSLATED,
    concat,
    daddr,
    from_taps,
    match,
    one_of,
    prefix,
    saddr,
    vmap,
)
from hypervisor.net.limits import UNLIMITED, Limits, limit_chains, limit_sets
from hypervisor.net.policies import NO_POLICIES, Policies, guard_map, policy_chains, policy_sets
from hypervisor.net.services import ServicePort, affinity_sets, refusals, service_chains, service_sets, translations
from hypervisor.net.table import Chain, Expression, Hook, Key, Rule, Set, Table

DNS_PORT = 53


@dataclass(frozen=True)
class PodPort:
    """A pod's place on the network: its tap and its addresses."""

    tap: str
    addresses: tuple[Address, ...]
    uid: str = ""
    limits: Limits = UNLIMITED


@dataclass(frozen=True)
class Resolver:
    """The cluster's name server: its Service's addresses, and the port on which this host serves it on every tap."""

    addresses: tuple[Address, ...]
    port: int


@dataclass(frozen=True)
class State:
    """All that the packet filter depends on.

    :param table: the table's name
    :param taps: what the names of this host's taps begin with, and of no other's
    :param cluster: ranges that are not masqueraded: pods' and services'
    """

    table: str
    taps: str
    cluster: tuple[Subnet, ...]
    pods: tuple[PodPort, ...] = ()
    services: tuple[ServicePort, ...] = field(default=())
    policies: Policies = NO_POLICIES
    resolver: Resolver | None = None


def render(state: State) -> Table:
    """The table that the kernel is to have."""
    taps = {pod.uid: pod.tap for pod in state.pods}
    limits = {pod.tap: pod.limits for pod in state.pods}
    sets = {
        **dict(_pod_sets(state)),
        **dict(service_sets(state.services)),
        **dict(affinity_sets(state.services)),
        **dict(policy_sets(state.policies, taps)),
        **dict(limit_sets(limits)),
    }
    chains = {
        **dict(service_chains(state.services)),
        **dict(policy_chains(state.policies, taps)),
        **dict(limit_chains(limits)),
        **dict(_base_chains(state)),
    }
    return Table(state.table, chains, sets)


def _pod_sets(state: State) -> Iterator[tuple[str, Set]]:
    for version, kind in ADDRESS_TYPE.items():
        places = [(pod.tap, str(a)) for pod in state.pods for a in pod.addresses if a.version == version]
        owned: dict[Key, str | None] = dict.fromkeys(places)
        selves: dict[Key, str | None] = {(a, a): None for _, a in places}
        yield f"pods{version}", Set(("ifname", kind), owned)
        yield f"selves{version}", Set((kind, kind), selves)


def _base_chains(state: State) -> Iterator[tuple[str, Chain]]:
    pods = from_taps(state.taps)
    yield "spoofed", Chain(tuple(_spoofed(state)), Hook("filter", "prerouting", -300))
    questions, to_resolver = _questions(state)
    yield "translate", Chain((*questions, *translations()), Hook("nat", "prerouting", -100))
    yield "translate-local", Chain(translations(), Hook("nat", "output", -100))
    yield "leaving", Chain(tuple(_masquerades(state)), Hook("nat", "postrouting", 100))
    free: tuple[Rule, ...] = ((ESTABLISHED, ACCEPT), (PING, ACCEPT), *to_resolver)
    yield "guard-host", Chain((*free, _guard("out")), Hook("filter", "input", -20))
    yield "guard-sender", Chain((*_passes(), _guard("out")), Hook("filter", "forward", -20))
    yield "guard-receiver", Chain((*_passes(), _guard("in")), Hook("filter", "forward", -10))
    to_host: tuple[Rule, ...] = (
        *((pods, allowed, ACCEPT) for allowed in (ESTABLISHED, TRANSLATED, PING)),
        *refusals(),
        (pods, COUNTER, DROP),
    )
    yield "to-host", Chain(to_host, Hook("filter", "input", 0))
    yield "between", Chain(refusals(), Hook("filter", "forward", 0))


def _questions(state: State) -> tuple[tuple[Rule, ...], tuple[Rule, ...]]:
    """Pods' questions go to this host's name server, which itself sees to it who may ask."""
    found = state.resolver
    addresses = [str(a) for a in found.addresses if a.version == 4] if found is not None else []
    if found is None or not addresses:
        return (), ()
    asks = (from_taps(state.taps), one_of(daddr(4), addresses), one_of(L4, ("tcp", "udp")), match(DPORT, DNS_PORT))
    # Every tap has the same address: where a packet came in, it is the one that it goes to.
    redirect: Expression = {"redirect": {"port": found.port}}
    served = (from_taps(state.taps), match(daddr(4), str(GATEWAY4)), match(DPORT, found.port), ACCEPT)
    return ((*asks, redirect),), (served,)


def _guard(direction: str) -> Rule:
    tap: Expression = IIFNAME if direction == "out" else OIFNAME
    return (vmap(tap, guard_map("out" if direction == "out" else "in")),)


def _passes() -> tuple[Rule, ...]:
    """Answers, and what a pod sends to itself through a service."""
    itself = tuple((match(concat(saddr(v), daddr(v)), f"@selves{v}"), ACCEPT) for v in (4, 6))
    return ((ESTABLISHED, ACCEPT), *itself)


def _spoofed(state: State) -> Iterator[Rule]:
    for version in (4, 6):
        unknown = match(concat(IIFNAME, saddr(version)), f"@pods{version}", "!=")
        yield from_taps(state.taps), unknown, COUNTER, DROP


def _masquerades(state: State) -> Iterator[Rule]:
    masquerade: Expression = {"masquerade": None}
    for version in (4, 6):
        ours = [prefix(net) for net in state.cluster if net.version == version]
        if not ours:
            continue
        within = {"set": ours}
        yield match(saddr(version), within), match(daddr(version), within, "!="), masquerade
        yield TRANSLATED, match(saddr(version), within, "!="), masquerade
        # A pod that reaches itself through a service must not see its own address as the source.
        yield TRANSLATED, match(concat(saddr(version), daddr(version)), f"@selves{version}"), masquerade
