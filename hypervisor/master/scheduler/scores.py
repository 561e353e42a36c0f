"""Which of the nodes that a pod can go to is best. Each score is 0 to 100; their weighted sum decides.

The scores and their weights are upstream's defaults, and one of our own: a node that has a template for the pod's size
starts it in a fraction of the time. Source: Kubernetes, "Scheduler Configuration: Scheduling plugins".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hypervisor.kube.selectors import LabelSelector
from hypervisor.master.scheduler.affinity import (
    NamespaceLabels,
    Spread,
    preferred_node_affinity,
    preferred_terms,
)
from hypervisor.master.scheduler.filters import tolerates
from hypervisor.master.scheduler.image_names import full_name
from hypervisor.master.scheduler.requests import scored_request
from hypervisor.master.scheduler.state import ClusterState, NodeState, Pod

TOP = 100
TEMPLATES_ANNOTATION = "podvisor.dev/templates"
"""On a Node: memory sizes in MiB, separated by commas, for which it has a template."""


@dataclass(frozen=True)
class Context:
    """What scores may look at."""

    pod: Pod
    cluster: ClusterState
    nodes: Sequence[NodeState]
    namespaces: NamespaceLabels


Scorer = Callable[[Context], Mapping[str, float]]


def _least_allocated(context: Context) -> dict[str, float]:
    """More room left, in CPU and memory alike."""
    request = scored_request(context.pod)
    return {n.name: sum(_free(n, r, request[r]) for r in ("cpu", "memory")) / 2 for n in context.nodes}


def _free(node: NodeState, resource: str, wanted: int) -> float:
    capacity = node.allocatable.get(resource, 0)
    used = node.scored.get(resource, 0) + wanted
    return TOP * (capacity - used) / capacity if capacity and used <= capacity else 0.0


def _balanced(context: Context) -> dict[str, float]:
    """CPU and memory used to the same degree."""
    request = scored_request(context.pod)

    def score(node: NodeState) -> float:
        cpu, memory = (1 - _free(node, r, request[r]) / TOP for r in ("cpu", "memory"))
        return TOP * (1 - abs(cpu - memory) / 2)

    return {n.name: score(n) for n in context.nodes}


def _node_affinity(context: Context) -> dict[str, float]:
    return normalised({n.name: preferred_node_affinity(context.pod, n) for n in context.nodes})


def _taints(context: Context) -> dict[str, float]:
    """Fewer PreferNoSchedule taints that the pod does not tolerate."""
    tolerations = list(context.pod["spec"].get("tolerations") or ())

    def bad(node: NodeState) -> int:
        return sum(1 for t in node.taints if t.get("effect") == "PreferNoSchedule" and not tolerates(tolerations, t))

    return normalised({n.name: -bad(n) for n in context.nodes})


def _pod_affinity(context: Context) -> dict[str, float]:
    """Preferred terms of the pod, and of the pods that are there towards it."""
    sums: dict[tuple[str, str], float] = {}
    for kind, sign in (("podAffinity", 1), ("podAntiAffinity", -1)):
        for term in preferred_terms(context.pod, kind):
            for domain, count in term.counts(context.cluster, context.namespaces).items():
                _add(sums, (term.topology_key, domain), sign * term.weight * count)
        for node, other in context.cluster.related():
            for term in preferred_terms(other, kind):
                if term.matches(context.pod, context.namespaces):
                    _add(sums, (term.topology_key, node.labels.get(term.topology_key, "")), sign * term.weight)
    return normalised(
        {n.name: sum(v for (key, domain), v in sums.items() if n.labels.get(key) == domain) for n in context.nodes}
    )


def _add(sums: dict[tuple[str, str], float], place: tuple[str, str], value: float) -> None:
    sums[place] = sums.get(place, 0.0) + value


DEFAULT_SPREAD = (("kubernetes.io/hostname", 3), ("topology.kubernetes.io/zone", 5))
"""Upstream's default constraints: key and skew."""


def _spread(context: Context) -> dict[str, float]:
    """Fewer matching pods in the node's domain; pods without constraints of their own spread with their siblings."""
    constraints = [c for c in Spread.all_of(context.pod) if not c.required] or _siblings(context.pod)
    sums = {n.name: 0.0 for n in context.nodes}
    for constraint in constraints:
        counts = constraint.counts(context.pod, context.cluster)
        for node in context.nodes:
            sums[node.name] -= counts.get(node.labels.get(constraint.key, ""), 0)
    return normalised(sums)


def _siblings(pod: Pod) -> list[Spread]:
    owned = any(o.get("controller") for o in pod["metadata"].get("ownerReferences") or ())
    labels = pod["metadata"].get("labels") or {}
    if not owned or not labels:
        return []
    selector = LabelSelector.of({"matchLabels": labels})
    return [Spread(key, skew, False, selector, 1, False, True) for key, skew in DEFAULT_SPREAD]


def _images(context: Context) -> dict[str, float]:
    """The share of the pod's images that the node has already."""
    wanted = {full_name(c.get("image", "")) for c in context.pod["spec"].get("containers", ())}
    return {n.name: TOP * len(wanted & n.images) / max(1, len(wanted)) for n in context.nodes}


def _templates(context: Context) -> dict[str, float]:
    """The node has a template at all; the sizes are rounded on the node, so any is a sign of a warm one."""
    return {
        n.name: TOP if (n.node["metadata"].get("annotations") or {}).get(TEMPLATES_ANNOTATION) else 0.0
        for n in context.nodes
    }


SCORERS: tuple[tuple[Scorer, float], ...] = (
    (_least_allocated, 1),
    (_balanced, 1),
    (_node_affinity, 2),
    (_taints, 3),
    (_pod_affinity, 2),
    (_spread, 2),
    (_images, 1),
    (_templates, 0.5),
)


def normalised(raw: Mapping[str, float]) -> dict[str, float]:
    """Spread over 0 to 100; all equal: all at the top."""
    low, high = min(raw.values(), default=0), max(raw.values(), default=0)
    if high == low:
        return dict.fromkeys(raw, float(TOP))
    return {name: TOP * (value - low) / (high - low) for name, value in raw.items()}


def total(context: Context) -> dict[str, float]:
    """The weighted sums, by node name."""
    sums = {n.name: 0.0 for n in context.nodes}
    for scorer, weight in SCORERS:
        for name, score in scorer(context).items():
            sums[name] += weight * score
    return sums
