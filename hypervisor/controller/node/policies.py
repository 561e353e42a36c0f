"""NetworkPolicies, pods and namespaces become what a host's packet filter guards its pods by. A pure function.

A policy's name in the packet filter is a digest of its namespace and name, a group's one of the selectors: what did not
change keeps its name, and so its place in the kernel.

Source: Kubernetes, "Network Policies" (what selectors mean together; ports by name; answers always pass).
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypervisor.kube.client import Object
from hypervisor.kube.meta import get, uid_of
from hypervisor.kube.selectors import LabelSelector
from hypervisor.net.addresses import Address, Subnet
from hypervisor.net.pods import ConnectedPod
from hypervisor.net.policies import Allowance, Block, Guard, NamedPort, Policies, Policy, Ports

DNS_PORT = 53
PROTOCOLS = ("udp", "tcp")
_GONE = ("Succeeded", "Failed")


@dataclass(frozen=True)
class Member:
    """A pod, as selectors see it."""

    namespace: str
    labels: Mapping[str, str]
    addresses: tuple[Address, ...]
    ports: Mapping[NamedPort, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Selector:
    """Pods of one namespace, or of those that a selector has."""

    pods: LabelSelector
    namespace: str = ""
    namespaces: LabelSelector | None = None

    def matches(self, member: Member, namespaces: Mapping[str, Mapping[str, str]]) -> bool:
        """Whether a pod is one of them."""
        if self.namespaces is None:
            return member.namespace == self.namespace and self.pods.matches(member.labels)
        labels = namespaces.get(member.namespace)
        there = labels is not None and self.namespaces.matches(labels)
        return there and self.pods.matches(member.labels)


def resolver(addresses: tuple[Address, ...]) -> Member:
    """The cluster's name server as the pods that serve it elsewhere: users' policies are written for those.

    :param addresses: its Service's
    """
    ports = {NamedPort("udp", "dns"): DNS_PORT, NamedPort("tcp", "dns-tcp"): DNS_PORT}
    return Member("kube-system", {"k8s-app": "kube-dns"}, addresses, ports)


def compile_policies(
    policies: Iterable[Object],
    pods: Iterable[Object],
    namespaces: Iterable[Object],
    local: Sequence[ConnectedPod],
    dns: Member | None = None,
) -> Policies:
    """What the pods of this host are guarded by.

    :param policies: NetworkPolicy objects, of all namespaces
    :param pods: Pod objects, of all hosts
    :param local: this host's pods; one of them counts with what it is here as long as the API does not show it yet
    :param dns: the cluster's name server, which is no pod here
    """
    labels_of = {str(get(n, "metadata", "name")): get(n, "metadata", "labels", default={}) for n in namespaces}
    members = _members(pods, local)
    compiling = _Compiling(labels_of, [*members.values(), *([dns] if dns is not None else [])])
    guarded: dict[str, tuple[Object, LabelSelector]] = {}
    for policy in policies:
        guarded[policy_name(policy)] = policy, LabelSelector.of(get(policy, "spec", "podSelector", default={}))
    guards = [_guard(pod, members[pod.uid], guarded) for pod in local]
    used = {name for guard in guards for name in (*(guard.ingress or ()), *(guard.egress or ()))}
    made = tuple(compiling.policy(name, guarded[name][0]) for name in sorted(used))
    about = tuple(g for g in guards if g.ingress is not None or g.egress is not None)
    if dns is not None:
        rules = {policy.name: policy.egress or () for policy in made}
        about = tuple(replace(g, resolves=compiling.resolves(g, rules, dns)) for g in about)
    return Policies(made, about, compiling.groups, compiling.ports)


def matters(old: Object, new: Object) -> bool:
    """Whether a change of a pod, namespace or policy can change what is compiled of it; most of a pod's do not."""
    return bool(_relevant(old) != _relevant(new))


def _relevant(obj: Object) -> Any:
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    labels = get(obj, "metadata", "labels", default={})
    if "containers" not in spec:
        return labels, spec
    return labels, status.get("podIPs"), status.get("phase") in _GONE


def policy_name(policy: Object) -> str:
    """As the packet filter calls it."""
    return _digest(f"{get(policy, 'metadata', 'namespace')}/{get(policy, 'metadata', 'name')}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _members(pods: Iterable[Object], local: Sequence[ConnectedPod]) -> dict[str, Member]:
    here = {pod.uid: pod for pod in local}
    members = {pod.uid: Member(pod.facts.namespace, pod.facts.labels, pod.addresses) for pod in local}
    for pod in pods:
        uid = uid_of(pod)
        if uid not in here and (get(pod, "status", "phase") in _GONE or get(pod, "spec", "hostNetwork")):
            continue
        addresses = here[uid].addresses if uid in here else tuple(_addresses(pod))
        labels = get(pod, "metadata", "labels", default={})
        members[uid] = Member(str(get(pod, "metadata", "namespace")), labels, addresses, dict(_named_ports(pod)))
    return members


def _addresses(pod: Object) -> Iterator[Address]:
    for entry in get(pod, "status", "podIPs", default=()):
        yield ipaddress.ip_address(entry["ip"])


def _named_ports(pod: Object) -> Iterator[tuple[NamedPort, int]]:
    spec = pod.get("spec") or {}
    for container in (*(spec.get("containers") or ()), *(spec.get("initContainers") or ())):
        for port in container.get("ports") or ():
            if port.get("name"):
                named = NamedPort(str(port.get("protocol") or "TCP").lower(), str(port["name"]))
                yield named, int(port["containerPort"])


def _guard(pod: ConnectedPod, member: Member, policies: Mapping[str, tuple[Object, LabelSelector]]) -> Guard:
    about = sorted(
        name
        for name, (policy, selector) in policies.items()
        if get(policy, "metadata", "namespace") == member.namespace and selector.matches(member.labels)
    )

    def of(kind: str) -> tuple[str, ...] | None:
        return tuple(n for n in about if kind in _types(policies[n][0])) or None

    return Guard(pod.uid, of("Ingress"), of("Egress"))


def _types(policy: Object) -> Sequence[str]:
    spec = policy.get("spec") or {}
    return spec.get("policyTypes") or (("Ingress", "Egress") if spec.get("egress") else ("Ingress",))


class _Compiling:
    """Policies become chains; which groups and named ports they use is kept."""

    def __init__(self, namespaces: Mapping[str, Mapping[str, str]], members: Sequence[Member]) -> None:
        self.groups: dict[str, frozenset[Address]] = {}
        self.ports: dict[NamedPort, frozenset[tuple[Address, int]]] = {}
        self._namespaces = namespaces
        self._members = members

    def policy(self, name: str, policy: Object) -> Policy:
        """One policy."""
        types = _types(policy)
        ingress = self._rules(policy, "ingress", "from") if "Ingress" in types else None
        egress = self._rules(policy, "egress", "to") if "Egress" in types else None
        return Policy(name, ingress, egress)

    def resolves(self, guard: Guard, rules: Mapping[str, tuple[Allowance, ...]], dns: Member) -> frozenset[str]:
        """The protocols by which a guarded pod may ask the name server."""
        if guard.egress is None:
            return frozenset(PROTOCOLS)
        allowances = [allowance for name in guard.egress for allowance in rules[name]]
        return frozenset(p for p in PROTOCOLS if any(self._leads_to(a, dns, p) for a in allowances))

    def _leads_to(self, allowance: Allowance, dns: Member, protocol: str) -> bool:
        ports = not allowance.ports or any(
            dns.ports.get(port) == DNS_PORT and port.protocol == protocol
            if isinstance(port, NamedPort)
            else port.protocol == protocol and port.first <= DNS_PORT <= port.last
            for port in allowance.ports
        )
        peers = allowance.peers is None or any(
            address in self.groups[name] for name in allowance.peers for address in dns.addresses
        )
        return ports and (peers or any(_is_within(a, block) for a in dns.addresses for block in allowance.blocks))

    def _rules(self, policy: Object, direction: str, side: str) -> tuple[Allowance, ...]:
        namespace = str(get(policy, "metadata", "namespace"))
        return tuple(
            self._rule(rule, rule.get(side) or (), namespace)
            for rule in get(policy, "spec", direction, default=()) or ()
        )

    def _rule(self, rule: Mapping[str, Any], peers: Sequence[Mapping[str, Any]], namespace: str) -> Allowance:
        ports = tuple(self._port(port) for port in rule.get("ports") or ())
        if not peers:
            return Allowance(None, (), ports)
        groups = tuple(self._group(peer, namespace) for peer in peers if peer.get("ipBlock") is None)
        blocks = tuple(_block(peer["ipBlock"]) for peer in peers if peer.get("ipBlock") is not None)
        return Allowance(groups, blocks, ports)

    def _port(self, port: Mapping[str, Any]) -> Ports | NamedPort:
        protocol, number = str(port.get("protocol") or "TCP").lower(), port.get("port")
        if number is None:
            return Ports(protocol)
        if isinstance(number, str):
            named = NamedPort(protocol, number)
            self.ports[named] = frozenset(
                (a, m.ports[named]) for m in self._members if named in m.ports for a in m.addresses
            )
            return named
        return Ports(protocol, int(number), int(port.get("endPort") or number))

    def _group(self, peer: Mapping[str, Any], namespace: str) -> str:
        by_namespace = peer.get("namespaceSelector")
        home = namespace if by_namespace is None else ""
        name = _digest(json.dumps([peer.get("podSelector"), by_namespace, home], sort_keys=True))
        if name not in self.groups:
            selector = Selector(
                LabelSelector.of(peer.get("podSelector") or {}),
                home,
                None if by_namespace is None else LabelSelector.of(by_namespace),
            )
            self.groups[name] = frozenset(
                a for m in self._members if selector.matches(m, self._namespaces) for a in m.addresses
            )
        return name


def _is_within(address: Address, block: Block) -> bool:
    return address in block.within and not any(address in some for some in block.excluded)


def _block(block: Mapping[str, Any]) -> Block:
    excluded = tuple(_network(text) for text in block.get("except") or ())
    return Block(_network(block["cidr"]), excluded)


def _network(text: str) -> Subnet:
    return ipaddress.ip_network(text, strict=False)
