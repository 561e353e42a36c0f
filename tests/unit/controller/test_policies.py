"""NetworkPolicies in the packet filter: its rules say of a connection what a plain reading of the policies says."""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.controller.node.policies import compile_policies, matters, policy_name
from hypervisor.net.pods import ConnectedPod, PodFacts
from hypervisor.net.ruleset import PodPort, State, render
from hypervisor.net.table import Table, change

Obj = dict[str, Any]
NAMESPACES = {"x": {"ns": "x", "team": "a"}, "y": {"ns": "y", "team": "b"}, "z": {"ns": "z", "team": "b"}}
NAMES = ("a", "b")
PODS = list(itertools.product(NAMESPACES, NAMES))
OUTSIDE = ("10.1.2.3", "10.1.9.9", "192.0.2.7", "fd77::1", "2001:db8::5")


def addresses(namespace: str, name: str) -> tuple[str, str]:
    number = PODS.index((namespace, name)) + 1
    return f"10.88.0.{number}", f"fd88::{number}"


def labels(name: str) -> dict[str, str]:
    return {"pod": name, "odd" if name == "a" else "even": "yes"}


def pod(namespace: str, name: str) -> Obj:
    ports = [
        {"name": "http", "containerPort": 80 if name == "a" else 81},
        {"name": "ask", "containerPort": 53, "protocol": "UDP"},
    ]
    return {
        "metadata": {"namespace": namespace, "name": name, "uid": f"{namespace}/{name}", "labels": labels(name)},
        "spec": {"containers": [{"ports": ports}]},
        "status": {"podIPs": [{"ip": a} for a in addresses(namespace, name)], "phase": "Running"},
    }


ALL_PODS = [pod(*place) for place in PODS]
ALL_NAMESPACES = [{"metadata": {"name": name, "labels": own}} for name, own in NAMESPACES.items()]
LOCAL = [
    ConnectedPod(f"{ns}/{name}", f"pv{ns}{name}", "", tuple(map(ipaddress.ip_address, addresses(ns, name))), PodFacts())
    for ns, name in PODS
]


def policy(namespace: str, name: str = "p", **spec: Any) -> Obj:
    return {"metadata": {"namespace": namespace, "name": name}, "spec": {"podSelector": {}} | spec}


def compiled(policies: list[Obj]) -> Table:
    made = compile_policies(policies, ALL_PODS, ALL_NAMESPACES, LOCAL)
    ports = tuple(PodPort(p.tap, p.addresses, p.uid) for p in LOCAL)
    return render(State("podvisor-aaaa", "pv", (), ports, (), made))


@dataclass(frozen=True)
class Packet:
    source: str
    target: str
    protocol: str = "tcp"
    port: int = 80


# ---- what the rules say ----------------------------------------------------------------------------------------------


def tap_of(address: str) -> str:
    return next((p.tap for p in LOCAL if ipaddress.ip_address(address) in p.addresses), "eth0")


def value(expression: Mapping[str, Any], packet: Packet) -> Any:
    """A field of the packet; None: it has none (another family)."""
    if "concat" in expression:
        parts = tuple(value(e, packet) for e in expression["concat"])
        return None if None in parts else parts
    if "meta" in expression:
        meta = {"iifname": tap_of(packet.source), "oifname": tap_of(packet.target), "l4proto": packet.protocol}
        return meta[expression["meta"]["key"]]
    payload = expression.get("payload")
    if payload is None:
        return "new"  # ct state
    if payload["field"] == "dport":
        return packet.port if packet.protocol in ("tcp", "udp", "sctp") else None
    address = packet.source if payload["field"] == "saddr" else packet.target
    return address if (payload["protocol"] == "ip6") == (":" in address) else None


def is_in(found: Any, right: Any, table: Table) -> bool:
    if isinstance(right, str) and right.startswith("@"):
        return (found if isinstance(found, tuple) else (found,)) in table.sets[right[1:]].elements
    if isinstance(right, list):
        return found in right
    if isinstance(right, dict) and "set" in right:
        return any(is_in(found, one, table) for one in right["set"])
    if isinstance(right, dict) and "prefix" in right:
        net = ipaddress.ip_network(f"{right['prefix']['addr']}/{right['prefix']['len']}")
        return ipaddress.ip_address(found) in net
    if isinstance(right, dict):
        return bool(right["range"][0] <= found <= right["range"][1])
    return bool(found == right)


def verdict(table: Table, chain: str, packet: Packet) -> str | None:
    for rule in table.chains[chain].rules:
        for expression in rule:
            if "match" in expression:
                condition = expression["match"]
                found = value(condition["left"], packet)
                if found is None or is_in(found, condition["right"], table) == (condition["op"] == "!="):
                    break
            elif "accept" in expression or "drop" in expression:
                return next(iter(expression))
            elif "counter" not in expression and (said := verdict_of_jump(table, expression, packet)):
                return said
    return None


def verdict_of_jump(table: Table, expression: Mapping[str, Any], packet: Packet) -> str | None:
    if "jump" in expression:
        return verdict(table, expression["jump"]["target"], packet)
    target = table.sets[expression["vmap"]["data"][1:]].elements.get((value(expression["vmap"]["key"], packet),))
    return verdict(table, target, packet) if target else None


def passes(table: Table, packet: Packet) -> bool:
    return all(verdict(table, chain, packet) != "drop" for chain in ("guard-sender", "guard-receiver"))


# ---- what the policies say -------------------------------------------------------------------------------------------


def selects(selector: Obj | None, own: Mapping[str, str]) -> bool:
    for key, wanted in ((selector or {}).get("matchLabels") or {}).items():
        if own.get(key) != wanted:
            return False
    for rule in (selector or {}).get("matchExpressions") or ():
        there = rule["key"] in own
        if not {"In": there and own.get(rule["key"]) in rule.get("values", ()),
                "NotIn": own.get(rule["key"]) not in rule.get("values", ()),
                "Exists": there, "DoesNotExist": not there}[rule["operator"]]:  # fmt: skip
            return False
    return True


def place_of(address: str) -> tuple[str, str] | None:
    return next((p for p in PODS if address in addresses(*p)), None)


def is_peer(peer: Obj, namespace: str, address: str) -> bool:
    if "ipBlock" in peer:
        ip, block = ipaddress.ip_address(address), peer["ipBlock"]
        inside = ip in ipaddress.ip_network(block["cidr"])
        return inside and not any(ip in ipaddress.ip_network(e) for e in block.get("except", ()))
    place = place_of(address)
    if place is None:
        return False
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], NAMESPACES[place[0]]):
            return False
    elif place[0] != namespace:
        return False
    return selects(peer.get("podSelector"), labels(place[1]))


def is_port(port: Obj, packet: Packet) -> bool:
    if port.get("protocol", "TCP").lower() != packet.protocol:
        return False
    wanted = port.get("port")
    if isinstance(wanted, str):
        place = place_of(packet.target)
        if place is None:
            return False
        named = {("http", "tcp"): 80 if place[1] == "a" else 81, ("ask", "udp"): 53}
        return named.get((wanted, packet.protocol)) == packet.port
    return wanted is None or wanted <= packet.port <= port.get("endPort", wanted)


def says_yes(policies: list[Obj], packet: Packet, direction: str) -> bool:
    mine, other = (packet.target, packet.source) if direction == "ingress" else (packet.source, packet.target)
    place = place_of(mine)
    if place is None or mine == other:
        return True
    about = [
        p for p in policies
        if p["metadata"]["namespace"] == place[0] and selects(p["spec"]["podSelector"], labels(place[1]))
        and direction.capitalize() in p["spec"]["policyTypes"]
    ]  # fmt: skip
    side = "from" if direction == "ingress" else "to"
    return not about or any(
        (not rule.get(side) or any(is_peer(peer, place[0], other) for peer in rule[side]))
        and (not rule.get("ports") or any(is_port(port, packet) for port in rule["ports"]))
        for p in about
        for rule in p["spec"].get(direction, ())
    )


def model(policies: list[Obj], packet: Packet) -> bool:
    return all(says_yes(policies, packet, direction) for direction in ("ingress", "egress"))


# ---- any policies ----------------------------------------------------------------------------------------------------

SELECTORS = st.sampled_from(
    [
        {},
        {"matchLabels": {"pod": "a"}},
        {"matchLabels": {"pod": "b"}},
        {"matchLabels": {"team": "b"}},
        {"matchLabels": {"ns": "y"}},
        {"matchExpressions": [{"key": "ns", "operator": "NotIn", "values": ["x"]}]},
        {"matchExpressions": [{"key": "odd", "operator": "Exists"}]},
        {"matchExpressions": [{"key": "odd", "operator": "DoesNotExist"}]},
        {"matchExpressions": [{"key": "pod", "operator": "In", "values": ["a", "c"]}]},
    ]
)
BLOCKS = st.sampled_from(
    [
        {"cidr": "0.0.0.0/0"},
        {"cidr": "::/0", "except": ["fd77::/16", "fd77::/64"]},
        {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16", "10.1.2.0/24", "10.88.0.0/31"]},
        {"cidr": "fd88::/64"},
        {"cidr": "10.88.0.4/30"},
    ]
)
PEERS = st.one_of(
    BLOCKS.map(lambda b: {"ipBlock": b}),
    SELECTORS.map(lambda s: {"podSelector": s}),
    SELECTORS.map(lambda s: {"namespaceSelector": s}),
    st.tuples(SELECTORS, SELECTORS).map(lambda s: {"podSelector": s[0], "namespaceSelector": s[1]}),
)
PORTS = st.sampled_from(
    [
        {},
        {"protocol": "UDP"},
        {"port": 80},
        {"port": 81, "protocol": "TCP"},
        {"port": "http"},
        {"port": "ask", "protocol": "UDP"},
        {"port": "ask"},
        {"port": 79, "endPort": 81},
        {"port": 80, "endPort": 90},
        {"port": 53, "protocol": "UDP"},
        {"port": 1, "endPort": 65535, "protocol": "SCTP"},
    ]
)


def rules(side: str) -> st.SearchStrategy[list[Obj]]:
    return st.lists(
        st.fixed_dictionaries({}, optional={side: st.lists(PEERS, max_size=3), "ports": st.lists(PORTS, max_size=3)}),
        max_size=3,
    )


SPECS = st.fixed_dictionaries(
    {
        "podSelector": SELECTORS,
        "policyTypes": st.sampled_from([["Ingress"], ["Egress"], ["Ingress", "Egress"]]),
        "ingress": rules("from"),
        "egress": rules("to"),
    }
)
POLICIES = st.lists(st.tuples(st.sampled_from(list(NAMESPACES)), SPECS), max_size=4).map(
    lambda made: [policy(namespace, f"p{i}", **spec) for i, (namespace, spec) in enumerate(made)]
)
VISITS = [("tcp", 80), ("tcp", 81), ("tcp", 8080), ("udp", 53), ("udp", 80), ("sctp", 7), ("icmp", 0)]
PLACES = [a for place in PODS for a in addresses(*place)] + list(OUTSIDE)
PACKETS = [
    Packet(source, target, *visit)
    for source, target in itertools.product(PLACES, PLACES)
    for visit in VISITS
    if source != target and (":" in source) == (":" in target)
]


@settings(max_examples=80, deadline=None)
@given(POLICIES, st.data())
def test_the_rules_say_what_the_policies_say(policies: list[Obj], data: st.DataObject) -> None:
    table = compiled(policies)
    for packet in data.draw(st.lists(st.sampled_from(PACKETS), min_size=150, max_size=150)):
        assert passes(table, packet) == model(policies, packet), packet


# ---- cases of one's own ----------------------------------------------------------------------------------------------


def allowed(policies: list[Obj], *packet: Any) -> bool:
    return passes(compiled(policies), Packet(*packet))


XA, XB, YA = (addresses(*place)[0] for place in (("x", "a"), ("x", "b"), ("y", "a")))


def test_nothing_is_guarded_without_policies() -> None:
    assert all(passes(compiled([]), packet) for packet in PACKETS[::7])


def test_default_deny() -> None:
    shut = policy("x", policyTypes=["Ingress", "Egress"])
    assert not allowed([shut], YA, XA)
    assert not allowed([shut], XA, YA)
    assert not allowed([shut], XA, OUTSIDE[0])
    assert allowed([shut], YA, OUTSIDE[0])


def test_what_a_rule_without_peers_and_a_policy_without_rules_mean() -> None:
    assert allowed([policy("x", policyTypes=["Ingress"], ingress=[{}])], YA, XA)
    assert not allowed([policy("x", policyTypes=["Ingress"], ingress=[])], YA, XA)
    assert not allowed([policy("x", policyTypes=["Ingress"])], YA, XA)


def test_a_policy_that_nobody_here_needs_is_no_chain() -> None:
    table = compile_policies([policy("x", policyTypes=["Ingress"])], ALL_PODS, ALL_NAMESPACES, LOCAL[2:])
    assert (table.policies, table.guards) == ((), ())


def test_a_pod_that_the_api_does_not_show_yet_is_guarded() -> None:
    new = ConnectedPod("new", "pvnew", "", (ipaddress.ip_address("10.88.0.99"),), PodFacts("x", {"pod": "a"}))
    shut = policy("x", policyTypes=["Ingress"], podSelector={"matchLabels": {"pod": "a"}})
    (guard,) = compile_policies([shut], ALL_PODS, ALL_NAMESPACES, [new]).guards
    assert (guard.uid, guard.ingress, guard.egress) == ("new", (policy_name(shut),), None)


def test_a_pod_that_has_ended_is_in_no_group() -> None:
    ended = [
        p | {"status": p["status"] | {"phase": "Succeeded"}} if p["metadata"]["uid"] == "x/b" else p for p in ALL_PODS
    ]
    rule = policy("x", policyTypes=["Ingress"], ingress=[{"from": [{"podSelector": {}}]}])
    made = compile_policies([rule], ended, ALL_NAMESPACES, LOCAL[:1])
    (group,) = made.groups.values()
    assert set(map(str, group)) == set(addresses("x", "a"))


def test_one_pod_more_touches_its_own_elements_only() -> None:
    rule = policy("x", policyTypes=["Ingress"], ingress=[{"from": [{"podSelector": {}}]}])
    taps = tuple(PodPort(p.tap, p.addresses, p.uid) for p in LOCAL[:1])

    def table(pods: list[Obj]) -> Table:
        made = compile_policies([rule], pods, ALL_NAMESPACES, LOCAL[:1])
        return render(State("podvisor-aaaa", "pv", (), taps, (), made))

    commands = change(table(ALL_PODS[:1]), table(ALL_PODS[:2]))
    assert [list(c["add"]) for c in commands] == [["element"], ["element"]]
    assert [c["add"]["element"]["elem"] for c in commands] == [[addresses("x", "b")[0]], [addresses("x", "b")[1]]]


def test_which_changes_of_a_pod_matter() -> None:
    before = ALL_PODS[0]
    status = before["status"]
    assert not matters(before, before | {"status": status | {"conditions": [{"type": "Ready", "status": "True"}]}})
    assert matters(before, before | {"status": status | {"podIPs": []}})
    assert matters(before, before | {"status": status | {"phase": "Failed"}})
    assert matters(before, before | {"metadata": before["metadata"] | {"labels": {}}})
