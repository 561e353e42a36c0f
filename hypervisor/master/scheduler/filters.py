"""Which nodes a pod can go to: each filter says of a node why not, or nothing.

Reasons are worded as upstream words them: people search for these words. Filters look once at the cluster for a pod
(`Filters.prepare`) and then answer for each node in time that does not depend on the number of other pods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypervisor.master.scheduler.affinity import NamespaceLabels, Spread, required_node_affinity, required_terms
from hypervisor.master.scheduler.requests import Amounts, host_ports, pod_request
from hypervisor.master.scheduler.state import ClusterState, NodeState, Pod

UNSCHEDULABLE_TAINT = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}


@dataclass(frozen=True)
class Refusal:
    """Why a node is out.

    :ivar resolvable: lower pods leaving the node could change it
    """

    reason: str
    resolvable: bool = False


Filter = Callable[[NodeState], Refusal | None]


def tolerates(tolerations: list[Mapping[str, Any]], taint: Mapping[str, Any]) -> bool:
    """Source: Kubernetes, "Taints and Tolerations"."""
    return any(_tolerates(t, taint) for t in tolerations)


def _tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    if toleration.get("effect") and toleration["effect"] != taint["effect"]:
        return False
    key = toleration.get("key") or ""
    if key and key != taint["key"]:
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return True
    return bool(key) and (toleration.get("value") or "") == (taint.get("value") or "")


def untolerated(pod: Pod, node: NodeState, effects: tuple[str, ...]) -> Mapping[str, Any] | None:
    """The first taint of these effects that the pod does not tolerate."""
    tolerations = list(pod["spec"].get("tolerations") or ())
    for taint in node.taints:
        if taint.get("effect") in effects and not tolerates(tolerations, taint):
            return taint
    return None


def _name_filter(pod: Pod) -> Filter:
    wanted = pod["spec"].get("nodeName") or ""
    return lambda node: (
        Refusal("node(s) didn't match the requested node name") if wanted and node.name != wanted else None
    )


def _unschedulable_filter(pod: Pod) -> Filter:
    tolerated = tolerates(list(pod["spec"].get("tolerations") or ()), UNSCHEDULABLE_TAINT)

    def check(node: NodeState) -> Refusal | None:
        closed = (node.node.get("spec") or {}).get("unschedulable")
        return Refusal("node(s) were unschedulable") if closed and not tolerated else None

    return check


def _taint_filter(pod: Pod) -> Filter:
    def check(node: NodeState) -> Refusal | None:
        taint = untolerated(pod, node, ("NoSchedule", "NoExecute"))
        if taint is None:
            return None
        return Refusal(f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value') or ''}}}")

    return check


def _affinity_filter(pod: Pod) -> Filter:
    def check(node: NodeState) -> Refusal | None:
        return (
            None if required_node_affinity(pod, node) else Refusal("node(s) didn't match Pod's node affinity/selector")
        )

    return check


def _ports_filter(pod: Pod) -> Filter:
    wanted = host_ports([pod])

    def check(node: NodeState) -> Refusal | None:
        if not wanted:
            return None
        taken = node.used_ports()
        clash = any(_clash(w, t) for w in wanted for t in taken)
        return Refusal("node(s) didn't have free ports for the requested pod ports", resolvable=True) if clash else None

    return check


def _clash(a: tuple[str, str, int], b: tuple[str, str, int]) -> bool:
    return a[0] == b[0] and a[2] == b[2] and (not a[1] or not b[1] or a[1] == b[1])


def fits(request: Amounts, node: NodeState) -> list[str]:
    """Resources of which the node has too little left."""
    return [
        name
        for name, wanted in request.items()
        if wanted and wanted > node.allocatable.get(name, 0) - node.requested.get(name, 0)
    ]


def _resources_filter(pod: Pod) -> Filter:
    request = pod_request(pod)
    own_overhead = bool(pod["spec"].get("overhead"))

    def check(node: NodeState) -> Refusal | None:
        here = request if own_overhead or not node.overhead else _with_memory(request, node.overhead)
        short = fits(here, node)
        if not short:
            return None
        # More than the whole node has: nobody leaving it would help.
        hopeless = any(here[name] > node.allocatable.get(name, 0) for name in short)
        reason = "Too many pods" if short == ["pods"] else ", ".join(f"Insufficient {name}" for name in short)
        return Refusal(reason, resolvable=not hopeless)

    return check


def _with_memory(request: Amounts, overhead: int) -> Amounts:
    return request | {"memory": request.get("memory", 0) + overhead}


def _pod_affinity_filter(pod: Pod, cluster: ClusterState, namespaces: NamespaceLabels) -> Filter:
    terms = required_terms(pod, "podAffinity")
    domains = [term.counts(cluster, namespaces) for term in terms]
    # The first of a group that wants to be together has nobody to be with: it may go anywhere that has the keys.
    first = not any(domains) and all(t.matches(pod, namespaces) for t in terms)

    def check(node: NodeState) -> Refusal | None:
        for term, where in zip(terms, domains, strict=True):
            domain = node.labels.get(term.topology_key)
            if domain is None or (domain not in where and not first):
                return Refusal("node(s) didn't match pod affinity rules")
        return None

    return check


def _anti_affinity_filter(pod: Pod, cluster: ClusterState, namespaces: NamespaceLabels) -> Filter:
    own = [(t.topology_key, t.counts(cluster, namespaces)) for t in required_terms(pod, "podAntiAffinity")]
    theirs: set[tuple[str, str]] = set()
    for node, other in cluster.related():
        for term in required_terms(other, "podAntiAffinity"):
            domain = node.labels.get(term.topology_key)
            if domain is not None and term.matches(pod, namespaces):
                theirs.add((term.topology_key, domain))

    def check(node: NodeState) -> Refusal | None:
        if any(node.labels.get(key) in where for key, where in own):
            return Refusal("node(s) didn't match pod anti-affinity rules", resolvable=True)
        if any(node.labels.get(key) == domain for key, domain in theirs):
            return Refusal("node(s) didn't satisfy existing pods anti-affinity rules", resolvable=True)
        return None

    return check


def _spread_filter(pod: Pod, cluster: ClusterState) -> Filter:
    constraints = [c for c in Spread.all_of(pod) if c.required]
    prepared = [(c, _spread_counts(c, pod, cluster)) for c in constraints]
    labels = pod["metadata"].get("labels") or {}

    def check(node: NodeState) -> Refusal | None:
        for constraint, counts in prepared:
            domain = node.labels.get(constraint.key)
            if domain is None:
                return Refusal("node(s) didn't match pod topology spread constraints (missing required label)")
            least = min(counts.values(), default=0) if len(counts) >= constraint.min_domains else 0
            itself = 1 if constraint.selector.matches(labels) else 0
            if counts.get(domain, 0) + itself - least > constraint.max_skew:
                return Refusal("node(s) didn't match pod topology spread constraints", resolvable=True)
        return None

    return check


def _spread_counts(constraint: Spread, pod: Pod, cluster: ClusterState) -> dict[str, int]:
    def eligible(node: NodeState) -> bool:
        if constraint.honour_affinity and not required_node_affinity(pod, node):
            return False
        return not (constraint.honour_taints and untolerated(pod, node, ("NoSchedule", "NoExecute")))

    return constraint.counts(pod, (n for n in cluster if eligible(n)))


class Filters:
    """All filters, prepared for one pod."""

    def __init__(self, pod: Pod, cluster: ClusterState, namespaces: NamespaceLabels) -> None:
        self._filters: list[Filter] = [
            _unschedulable_filter(pod),
            _name_filter(pod),
            _taint_filter(pod),
            _affinity_filter(pod),
            _ports_filter(pod),
            _resources_filter(pod),
            _pod_affinity_filter(pod, cluster, namespaces),
            _anti_affinity_filter(pod, cluster, namespaces),
            _spread_filter(pod, cluster),
        ]

    def check(self, node: NodeState) -> Refusal | None:
        """The first reason against the node."""
        for one in self._filters:
            refusal = one(node)
            if refusal is not None:
                return refusal
        return None
