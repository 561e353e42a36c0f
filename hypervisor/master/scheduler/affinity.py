"""Terms of affinity: node selectors, pod (anti-)affinity and topology spread, as predicates over objects.

Source: Kubernetes, "Assigning Pods to Nodes" and "Pod Topology Spread Constraints".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hypervisor.kube.selectors import LabelSelector
from hypervisor.master.scheduler.state import ClusterState, Group, NodeState, Pod

NamespaceLabels = Mapping[str, Mapping[str, str]]


def node_term_matches(term: Mapping[str, Any], node: NodeState) -> bool:
    """A ``NodeSelectorTerm``; one without any expression matches nothing."""
    expressions = term.get("matchExpressions") or ()
    fields = term.get("matchFields") or ()
    if not expressions and not fields:
        return False
    own_fields = {"metadata.name": node.name}
    return all(_expression(e, node.labels) for e in expressions) and all(_expression(e, own_fields) for e in fields)


def _expression(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """One requirement of a node selector; unlike a label selector's it also compares numbers."""
    key, operator, values = expression["key"], expression["operator"], expression.get("values") or ()
    value = labels.get(key)
    match operator:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt" | "Lt":
            return _compare(operator, value, values)
    return False


def _compare(operator: str, value: str | None, values: Iterable[str]) -> bool:
    try:
        own, bound = int(value or ""), int(next(iter(values)))
    except (ValueError, StopIteration):
        return False
    return own > bound if operator == "Gt" else own < bound


def required_node_affinity(pod: Pod, node: NodeState) -> bool:
    """The pod's nodeSelector and the required half of its node affinity."""
    selector = pod["spec"].get("nodeSelector") or {}
    if any(node.labels.get(k) != v for k, v in selector.items()):
        return False
    required = _affinity(pod, "nodeAffinity").get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    return any(node_term_matches(t, node) for t in required.get("nodeSelectorTerms") or ())


def preferred_node_affinity(pod: Pod, node: NodeState) -> int:
    """The sum of the weights of preferred terms that the node matches."""
    preferred = _affinity(pod, "nodeAffinity").get("preferredDuringSchedulingIgnoredDuringExecution") or ()
    return sum(int(p["weight"]) for p in preferred if node_term_matches(p["preference"], node))


def _affinity(pod: Pod, kind: str) -> Mapping[str, Any]:
    affinity: Mapping[str, Any] = (pod["spec"].get("affinity") or {}).get(kind) or {}
    return affinity


@dataclass(frozen=True)
class PodTerm:
    """A ``PodAffinityTerm`` of some pod, ready to be asked about others."""

    topology_key: str
    selector: LabelSelector
    namespaces: frozenset[str]
    namespace_selector: LabelSelector | None
    weight: int = 0

    @classmethod
    def parse(cls, term: Mapping[str, Any], owner: Pod, weight: int = 0) -> PodTerm:
        """`owner`: the pod whose term it is; its namespace is meant where the term names none."""
        named = frozenset(term.get("namespaces") or ())
        by_label = term.get("namespaceSelector")
        if not named and by_label is None:
            named = frozenset((owner["metadata"]["namespace"],))
        selector = dict(term.get("labelSelector") or {})
        _match_label_keys(selector, term, owner)
        # A term without labelSelector matches no pod; an empty one matches every pod.
        nothing = term.get("labelSelector") is None
        return cls(
            term["topologyKey"],
            LabelSelector.nothing() if nothing else LabelSelector.of(selector),
            named,
            None if by_label is None else LabelSelector.of(by_label),
            weight,
        )

    def matches(self, pod: Pod, namespaces: NamespaceLabels) -> bool:
        """Whether `pod` is one of those that the term is about."""
        return self.matches_group(pod["metadata"]["namespace"], pod["metadata"].get("labels") or {}, namespaces)

    def matches_group(self, namespace: str, labels: Mapping[str, str], namespaces: NamespaceLabels) -> bool:
        """The same of pods of one namespace with these labels."""
        inside = namespace in self.namespaces or (
            self.namespace_selector is not None and self.namespace_selector.matches(namespaces.get(namespace) or {})
        )
        return inside and self.selector.matches(labels)

    def counts(self, cluster: ClusterState, namespaces: NamespaceLabels) -> dict[str, int]:
        """By domain: how many pods the term is about are there."""
        matching: dict[Group, bool] = {}
        found: dict[str, int] = {}
        for node in cluster:
            domain = node.labels.get(self.topology_key)
            if domain is None:
                continue
            for group, count in node.groups.items():
                if group not in matching:
                    matching[group] = self.matches_group(group[0], dict(group[1]), namespaces)
                if matching[group]:
                    found[domain] = found.get(domain, 0) + count
        return found


def _match_label_keys(selector: dict[str, Any], term: Mapping[str, Any], owner: Pod) -> None:
    labels = owner["metadata"].get("labels") or {}
    extra = [
        {"key": key, "operator": operator, "values": [labels[key]]}
        for field, operator in (("matchLabelKeys", "In"), ("mismatchLabelKeys", "NotIn"))
        for key in term.get(field) or ()
        if key in labels
    ]
    if extra:
        selector["matchExpressions"] = [*(selector.get("matchExpressions") or ()), *extra]


def required_terms(pod: Pod, kind: str) -> list[PodTerm]:
    """`kind`: ``podAffinity`` or ``podAntiAffinity``."""
    terms = _affinity(pod, kind).get("requiredDuringSchedulingIgnoredDuringExecution") or ()
    return [PodTerm.parse(t, pod) for t in terms]


def preferred_terms(pod: Pod, kind: str) -> list[PodTerm]:
    """With their weights."""
    terms = _affinity(pod, kind).get("preferredDuringSchedulingIgnoredDuringExecution") or ()
    return [PodTerm.parse(t["podAffinityTerm"], pod, int(t["weight"])) for t in terms]


@dataclass(frozen=True)
class Spread:
    """A ``TopologySpreadConstraint`` of a pod."""

    key: str
    max_skew: int
    required: bool
    selector: LabelSelector
    min_domains: int
    honour_taints: bool
    honour_affinity: bool

    @classmethod
    def all_of(cls, pod: Pod) -> Iterator[Spread]:
        """The pod's constraints."""
        for c in pod["spec"].get("topologySpreadConstraints") or ():
            selector = dict(c.get("labelSelector") or {})
            _match_label_keys(selector, c, pod)
            yield cls(
                c["topologyKey"],
                int(c["maxSkew"]),
                c.get("whenUnsatisfiable") != "ScheduleAnyway",
                LabelSelector.of(selector) if c.get("labelSelector") is not None else LabelSelector.nothing(),
                int(c.get("minDomains") or 1),
                c.get("nodeTaintsPolicy") == "Honor",
                c.get("nodeAffinityPolicy", "Honor") == "Honor",
            )

    def counts(self, pod: Pod, eligible: Iterable[NodeState]) -> dict[str, int]:
        """By domain: how many pods of the same namespace match, over nodes that the pod could go to at all."""
        namespace = pod["metadata"]["namespace"]
        matching: dict[Group, bool] = {}
        found: dict[str, int] = {}
        for node in eligible:
            domain = node.labels.get(self.key)
            if domain is None:
                continue
            found.setdefault(domain, 0)
            for group, count in node.groups.items():
                if group not in matching:
                    matching[group] = group[0] == namespace and self.selector.matches(dict(group[1]))
                if matching[group]:
                    found[domain] += count
        return found
