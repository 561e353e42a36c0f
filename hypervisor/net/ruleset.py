"""The packet filter as a value: what nftables is to hold for a host's pods and services.

Every look-up is in a set or a map, so that a packet costs the same with one service as with thousands:

    spoofed?     prerouting, raw: (tap, source address) must be in ``pods4`` or ``pods6``, else the packet is dropped
    a service?   prerouting and output, nat: (address, protocol, port) in ``services4|6`` leads to the chain of that
                 service, which picks an endpoint at random
    outside?     postrouting, nat: from a pod to what is not the cluster's gets the host's address
    to the host? input: from a pod only to a service's endpoint that lives on the host, or ping

One table a host, named after it, so that hosts that share a network namespace (a local cluster) do not touch each
other's. A table is replaced in one transaction: there is no moment without rules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypervisor.net.addresses import Address, Subnet

FAMILY = "inet"


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


@dataclass(frozen=True)
class PodPort:
    """A pod's place on the network: its tap and its addresses."""

    tap: str
    addresses: tuple[Address, ...]


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


def render(state: State) -> dict[str, Any]:
    """The transaction for ``nft -j -f -``: the old table goes, the new one comes, or nothing changes."""
    return {"nftables": [*_table(state), *_pod_sets(state), *_service_chains(state), *_base_chains(state)]}


def _add(kind: str, state: State, **fields: Any) -> dict[str, Any]:
    return {"add": {kind: {"family": FAMILY, "table": state.table, **fields}}}


def _table(state: State) -> list[dict[str, Any]]:
    table = {"family": FAMILY, "name": state.table}
    # To delete what is not there is an error; to add what is there is none.
    return [{"add": {"table": table}}, {"delete": {"table": table}}, {"add": {"table": table}}]


def _pod_sets(state: State) -> list[dict[str, Any]]:
    commands = []
    for version, kind in ((4, "ipv4_addr"), (6, "ipv6_addr")):
        elements = [
            {"concat": [pod.tap, str(address)]}
            for pod in state.pods
            for address in pod.addresses
            if address.version == version
        ]
        commands.append(_add("set", state, name=f"pods{version}", type=["ifname", kind], **_elements(elements)))
        selves = [{"concat": [str(a), str(a)]} for pod in state.pods for a in pod.addresses if a.version == version]
        commands.append(_add("set", state, name=f"selves{version}", type=[kind, kind], **_elements(selves)))
    return commands


def _elements(elements: list[Any]) -> dict[str, Any]:
    return {"elem": elements} if elements else {}


def _saddr(version: int) -> dict[str, Any]:
    return {"payload": {"protocol": "ip" if version == 4 else "ip6", "field": "saddr"}}


def _daddr(version: int) -> dict[str, Any]:
    return {"payload": {"protocol": "ip" if version == 4 else "ip6", "field": "daddr"}}


_DPORT = {"payload": {"protocol": "th", "field": "dport"}}
_L4 = {"meta": {"key": "l4proto"}}


def _from_pod(state: State) -> dict[str, Any]:
    return {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": f"{state.taps}*"}}


def _chain_of(service: ServicePort, version: int) -> str:
    return f"svc{version}-{service.name}"


def _service_chains(state: State) -> list[dict[str, Any]]:
    """A chain for each port of a service and family, and the maps that lead to them."""
    commands: list[dict[str, Any]] = []
    elements: dict[str, list[Any]] = {"services4": [], "services6": [], "nodeports4": [], "nodeports6": []}
    for service in state.services:
        for version in sorted({a.version for a in service.addresses}):
            chain = _chain_of(service, version)
            commands += _service_chain(state, service, version, chain)
            verdict = {"goto": {"target": chain}}
            for address in service.addresses:
                if address.version == version:
                    key = {"concat": [str(address), service.protocol, service.port]}
                    elements[f"services{version}"].append([key, verdict])
            if service.node_port:
                elements[f"nodeports{version}"].append([{"concat": [service.protocol, service.node_port]}, verdict])
    return [*commands, *_service_maps(state, elements)]


def _service_maps(state: State, elements: dict[str, list[Any]]) -> list[dict[str, Any]]:
    types = {
        "services4": ["ipv4_addr", "inet_proto", "inet_service"],
        "services6": ["ipv6_addr", "inet_proto", "inet_service"],
        "nodeports4": ["inet_proto", "inet_service"],
        "nodeports6": ["inet_proto", "inet_service"],
    }
    return [
        _add("map", state, name=name, type=kinds, map="verdict", **_elements(elements[name]))
        for name, kinds in types.items()
    ]


def _service_chain(state: State, service: ServicePort, version: int, chain: str) -> list[dict[str, Any]]:
    endpoints = [e for e in service.endpoints if e.address.version == version]
    commands = [_add("chain", state, name=chain)]
    if not endpoints:
        # nat chains cannot refuse; `input` and `forward` do, for what was not translated and is the cluster's
        return commands
    picks = [[i, {"concat": [str(e.address), e.port]}] for i, e in enumerate(endpoints)]
    number: dict[str, Any] = {"numgen": {"mode": "random", "mod": len(endpoints), "offset": 0}}
    if service.affinity_s:
        # A hash of the client's address keeps a client on its endpoint for as long as the endpoints are the same ones.
        number = {"jhash": {"mod": len(endpoints), "offset": 0, "expr": _saddr(version)}}
    target = {"map": {"key": number, "data": {"set": picks}}}
    dnat = {"dnat": {"family": "ip" if version == 4 else "ip6", "addr": target}}
    protocol = {"match": {"op": "==", "left": _L4, "right": service.protocol}}  # nft wants it before a port's mapping
    return [*commands, _rule(state, chain, protocol, dnat)]


def _rule(state: State, chain: str, *expr: Any) -> dict[str, Any]:
    return _add("rule", state, chain=chain, expr=list(expr))


def _base(state: State, name: str, kind: str, hook: str, priority: int) -> dict[str, Any]:
    return _add("chain", state, name=name, type=kind, hook=hook, prio=priority, policy="accept")


def _base_chains(state: State) -> list[dict[str, Any]]:
    return [
        _base(state, "spoofed", "filter", "prerouting", -300),
        *(_not_spoofed(state, version) for version in (4, 6)),
        _base(state, "translate", "nat", "prerouting", -100),
        _base(state, "translate-local", "nat", "output", -100),
        *(rule for chain in ("translate", "translate-local") for rule in _translations(state, chain)),
        _base(state, "masquerade", "nat", "postrouting", 100),
        *_masquerades(state),
        _base(state, "to-host", "filter", "input", 0),
        *_to_host(state),
        _base(state, "between", "filter", "forward", 0),
        *_unanswered_services(state, "between"),
    ]


def _not_spoofed(state: State, version: int) -> dict[str, Any]:
    pair = {"concat": [{"meta": {"key": "iifname"}}, _saddr(version)]}
    unknown = {"match": {"op": "!=", "left": pair, "right": f"@pods{version}"}}
    return _rule(state, "spoofed", _from_pod(state), unknown, {"counter": None}, {"drop": None})


def _translations(state: State, chain: str) -> list[dict[str, Any]]:
    rules = []
    for version in (4, 6):
        key = {"concat": [_daddr(version), _L4, _DPORT]}
        rules.append(_rule(state, chain, {"vmap": {"key": key, "data": f"@services{version}"}}))
    local = {"match": {"op": "==", "left": {"fib": {"result": "type", "flags": ["daddr"]}}, "right": "local"}}
    for version in (4, 6):
        family = {"match": {"op": "==", "left": {"meta": {"key": "nfproto"}}, "right": f"ipv{version}"}}
        vmap = {"vmap": {"key": {"concat": [_L4, _DPORT]}, "data": f"@nodeports{version}"}}
        rules.append(_rule(state, chain, family, local, vmap))
    return rules


def _prefixes(state: State, version: int) -> list[Any]:
    return [
        {"prefix": {"addr": str(net.network_address), "len": net.prefixlen}}
        for net in state.cluster
        if net.version == version
    ]


def _masquerades(state: State) -> list[dict[str, Any]]:
    rules = []
    for version in (4, 6):
        ours = _prefixes(state, version)
        if not ours:
            continue
        source = {"match": {"op": "==", "left": _saddr(version), "right": {"set": ours}}}
        elsewhere = {"match": {"op": "!=", "left": _daddr(version), "right": {"set": ours}}}
        rules.append(_rule(state, "masquerade", source, elsewhere, {"masquerade": None}))
        translated = {"match": {"op": "in", "left": {"ct": {"key": "status"}}, "right": "dnat"}}
        host = {"match": {"op": "!=", "left": _saddr(version), "right": {"set": ours}}}
        rules.append(_rule(state, "masquerade", translated, host, {"masquerade": None}))
        # A pod that reaches itself through a service must not see its own address as the source.
        pair = {"concat": [_saddr(version), _daddr(version)]}
        itself = {"match": {"op": "==", "left": pair, "right": f"@selves{version}"}}
        rules.append(_rule(state, "masquerade", translated, itself, {"masquerade": None}))
    return rules


def _to_host(state: State) -> list[dict[str, Any]]:
    """A pod reaches the host's own sockets only where a service says so."""
    allowed = {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}}
    translated = {"match": {"op": "in", "left": {"ct": {"key": "status"}}, "right": "dnat"}}
    ping = {"match": {"op": "==", "left": _L4, "right": {"set": ["icmp", "ipv6-icmp"]}}}
    return [
        _rule(state, "to-host", _from_pod(state), allowed, {"accept": None}),
        _rule(state, "to-host", _from_pod(state), translated, {"accept": None}),
        _rule(state, "to-host", _from_pod(state), ping, {"accept": None}),
        *_unanswered_services(state, "to-host"),
        _rule(state, "to-host", _from_pod(state), {"counter": None}, {"drop": None}),
    ]


def _unanswered_services(state: State, chain: str) -> list[dict[str, Any]]:
    """A service without endpoints refuses, so that nobody waits for it."""
    rules = []
    for version in (4, 6):
        elements = [
            {"concat": [str(address), service.protocol, service.port]}
            for service in state.services
            for address in service.addresses
            if address.version == version and not any(e.address.version == version for e in service.endpoints)
        ]
        if elements:
            key = {"concat": [_daddr(version), _L4, _DPORT]}
            match = {"match": {"op": "==", "left": key, "right": {"set": elements}}}
            rules.append(_rule(state, chain, match, {"reject": {"type": "icmpx", "expr": "port-unreachable"}}))
    return rules
