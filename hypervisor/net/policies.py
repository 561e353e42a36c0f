"""Which connections pods may make and take, as values, and the chains that see to it.

Theory of operation
-------------------
A pod that a policy is about is *guarded* in that direction: only what one of its policies allows passes, and answers.
Each policy is a pair of chains that all its pods share; each guarded pod has one that tries its policies in turn and
then drops. Who a rule is about are *groups*, sets of addresses that rules share: a pod that comes or goes is an element
of those it is in, and no rule changes.

::

    forward, input:  from a tap? ─ guard-out: tap ─▶ out-<tap> ─▶ policy-out-<a> ─ allowed ─▶ accept, next hook
                                                         └──────▶ policy-out-<b> ...      └─▶ drop
    forward:         to a tap?   ─ guard-in:  tap ─▶ in-<tap>  ─▶ policy-in-<a> ...

Both are outside of the guest: on the tap. What the host itself sends to a pod (probes, the agent) is never dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from hypervisor.net.addresses import Address, Subnet
from hypervisor.net.expressions import (
    ACCEPT,
    ADDRESS_TYPE,
    DPORT,
    DROP,
    L4,
    concat,
    daddr,
    match,
    one_of,
    prefix,
    saddr,
)
from hypervisor.net.table import Chain, Expression, Key, Rule, Set

Direction = Literal["in", "out"]
DIRECTIONS: tuple[Direction, Direction] = ("in", "out")


@dataclass(frozen=True)
class Ports:
    """Ports of a protocol, both ends included; 0 to 65535: all of the protocol."""

    protocol: str
    first: int = 0
    last: int = 65535


@dataclass(frozen=True)
class NamedPort:
    """The port that the destination's pod calls so."""

    protocol: str
    name: str


@dataclass(frozen=True)
class Block:
    """A range of addresses without some of it."""

    within: Subnet
    excluded: tuple[Subnet, ...] = ()


@dataclass(frozen=True)
class Allowance:
    """One rule of a policy: these peers, on these ports.

    :ivar peers: None: everyone; else names of groups
    :ivar ports: empty: all, and what has no ports
    """

    peers: tuple[str, ...] | None = None
    blocks: tuple[Block, ...] = ()
    ports: tuple[Ports | NamedPort, ...] = ()


@dataclass(frozen=True)
class Policy:
    """What one policy allows; None: it is not about that direction."""

    name: str
    ingress: tuple[Allowance, ...] | None = None
    egress: tuple[Allowance, ...] | None = None

    def rules(self, direction: Direction) -> tuple[Allowance, ...] | None:
        """Of one direction."""
        return self.ingress if direction == "in" else self.egress


@dataclass(frozen=True)
class Guard:
    """The policies that are about a pod of this host; None: it is free in that direction.

    :ivar resolves: protocols by which it may ask the cluster's name server
    """

    uid: str
    ingress: tuple[str, ...] | None = None
    egress: tuple[str, ...] | None = None
    resolves: frozenset[str] = frozenset(("udp", "tcp"))

    def policies(self, direction: Direction) -> tuple[str, ...] | None:
        """Names, of one direction."""
        return self.ingress if direction == "in" else self.egress


@dataclass(frozen=True)
class Policies:
    """All that a host's pods are guarded by.

    :ivar groups: who the rules' peers are
    :ivar ports: where pods have the ports that rules name
    """

    policies: tuple[Policy, ...] = ()
    guards: tuple[Guard, ...] = ()
    groups: Mapping[str, frozenset[Address]] = field(default_factory=dict)
    ports: Mapping[NamedPort, frozenset[tuple[Address, int]]] = field(default_factory=dict)


NO_POLICIES = Policies()


def guard_map(direction: Direction) -> str:
    """The map from a tap to its pod's chain."""
    return f"guard-{direction}"


def policy_sets(policies: Policies, taps: Mapping[str, str]) -> Iterator[tuple[str, Set]]:
    """All sets and maps, by name.

    :param taps: of this host's pods, by uid
    """
    for name, members in policies.groups.items():
        for version in (4, 6):
            elements: dict[Key, str | None] = {(str(a),): None for a in members if a.version == version}
            yield _group_set(name, version), Set((ADDRESS_TYPE[version],), elements)
    for port, places in policies.ports.items():
        for version in (4, 6):
            yield (
                _port_set(port, version),
                Set(
                    (ADDRESS_TYPE[version], "inet_proto", "inet_service"),
                    {(str(a), port.protocol, number): None for a, number in places if a.version == version},
                ),
            )
    for direction in DIRECTIONS:
        chains: dict[Key, str | None] = {
            (tap,): _pod_chain(direction, tap) for _, tap in _guarded(policies, taps, direction)
        }
        yield guard_map(direction), Set(("ifname",), chains, verdicts=True)


def policy_chains(policies: Policies, taps: Mapping[str, str]) -> Iterator[tuple[str, Chain]]:
    """All chains, by name."""
    for policy in policies.policies:
        for direction in DIRECTIONS:
            allowances = policy.rules(direction)
            if allowances is not None:
                rules = tuple(rule for a in allowances for rule in _allow(a, direction))
                yield _policy_chain(direction, policy.name), Chain(rules)
    for direction in DIRECTIONS:
        for guard, tap in _guarded(policies, taps, direction):
            names = guard.policies(direction) or ()
            jumps = tuple(({"jump": {"target": _policy_chain(direction, name)}},) for name in names)
            yield _pod_chain(direction, tap), Chain((*jumps, ({"counter": None}, DROP)))


def _guarded(policies: Policies, taps: Mapping[str, str], direction: Direction) -> Iterator[tuple[Guard, str]]:
    for guard in policies.guards:
        if guard.policies(direction) is not None and guard.uid in taps:
            yield guard, taps[guard.uid]


def _policy_chain(direction: Direction, name: str) -> str:
    return f"policy-{direction}-{name}"


def _pod_chain(direction: Direction, tap: str) -> str:
    return f"{direction}-{tap}"


def _group_set(name: str, version: int) -> str:
    return f"group{version}-{name}"


def _port_set(port: NamedPort, version: int) -> str:
    digest = hashlib.sha256(f"{port.protocol}/{port.name}".encode()).hexdigest()[:12]
    return f"port{version}-{digest}"


_Match = tuple[int, tuple[Expression, ...]]
"""Conditions, and the family that they are about (0: both)."""


def _allow(allowance: Allowance, direction: Direction) -> Iterator[Rule]:
    for (family, peer), (other, port) in product(_peers(allowance, direction), _ports(allowance.ports)):
        if not family or not other or family == other:
            yield (*peer, *port, ACCEPT)


def _peers(allowance: Allowance, direction: Direction) -> list[_Match]:
    if allowance.peers is None:
        return [(0, ())]
    address = saddr if direction == "in" else daddr
    found: list[_Match] = [
        (version, (match(address(version), f"@{_group_set(name, version)}"),))
        for name in allowance.peers
        for version in (4, 6)
    ]
    for block in allowance.blocks:
        version = block.within.version
        within = match(address(version), prefix(block.within))
        without = [one_of(address(version), map(prefix, _disjoint(block.excluded)), "!=")] if block.excluded else []
        found.append((version, (within, *without)))
    return found


def _disjoint(networks: Iterable[Subnet]) -> list[Subnet]:
    """Those that are in no other one: a set with overlapping ranges is an error to nft."""
    listed = sorted(set(networks), key=lambda n: (n.prefixlen, int(n.network_address)))
    return [n for i, n in enumerate(listed) if not any(n.subnet_of(m) for m in listed[:i])]  # type: ignore[arg-type]


def _ports(ports: tuple[Ports | NamedPort, ...]) -> Iterator[_Match]:
    if not ports:
        yield 0, ()
    ranges: dict[str, list[Ports]] = {}
    for port in ports:
        if isinstance(port, Ports):
            ranges.setdefault(port.protocol, []).append(port)
            continue
        for version in (4, 6):
            yield version, (match(concat(daddr(version), L4, DPORT), f"@{_port_set(port, version)}"),)
    for protocol, some in ranges.items():
        this = match(L4, protocol)
        merged = _merged(some)
        if merged == [(0, 65535)]:
            yield 0, (this,)
        else:
            yield 0, (this, one_of(DPORT, (a if a == b else {"range": [a, b]} for a, b in merged)))


def _merged(ports: Iterable[Ports]) -> list[tuple[int, int]]:
    """Ranges that neither overlap nor touch."""
    merged: list[tuple[int, int]] = []
    for port in sorted(ports, key=lambda p: (p.first, p.last)):
        if merged and port.first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], port.last))
        else:
            merged.append((port.first, port.last))
    return merged
