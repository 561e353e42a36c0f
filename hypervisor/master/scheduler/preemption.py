"""When no node has room: which node, and which lower pods there would have to go.

Source: Kubernetes, "Pod Priority and Preemption". Victims are of lower priority than the pod; as few and as low as do;
those whose disruption budget forbids it only when nothing else would do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hypervisor.master.scheduler.affinity import NamespaceLabels
from hypervisor.master.scheduler.filters import Filters
from hypervisor.master.scheduler.state import ClusterState, NodeState, Pod


@dataclass(frozen=True)
class Plan:
    """Who must go so that the pod fits on `node`."""

    node: str
    victims: Sequence[Pod]
    broken_budgets: int


def priority(pod: Pod) -> int:
    """0 for a pod that has none."""
    return int(pod["spec"].get("priority") or 0)


def plan(
    pod: Pod,
    cluster: ClusterState,
    nodes: Sequence[NodeState],
    namespaces: NamespaceLabels,
    breaks: Callable[[Pod], bool],
) -> Plan | None:
    """The best plan over `nodes` (those that lower pods leaving could help); None: there is none.

    :param breaks: whether evicting a pod would break its disruption budget
    """
    if pod["spec"].get("preemptionPolicy") == "Never":
        return None
    plans = [p for node in nodes if (p := _on_node(pod, cluster, node, namespaces, breaks)) is not None]
    return min(plans, key=_cost, default=None)


def _cost(found: Plan) -> tuple[int, int, int, int, str]:
    highest = max((priority(v) for v in found.victims), default=-1)
    return (found.broken_budgets, highest, sum(map(priority, found.victims)), len(found.victims), found.node)


def _on_node(
    pod: Pod, cluster: ClusterState, node: NodeState, namespaces: NamespaceLabels, breaks: Callable[[Pod], bool]
) -> Plan | None:
    lower = [p for p in node.pods.values() if priority(p) < priority(pod)]
    if not lower or not _would_fit(pod, cluster, node, lower, namespaces):
        return None
    # Give back as many as possible: those with a budget first, then the highest.
    victims = list(lower)
    for candidate in sorted(lower, key=lambda p: (breaks(p), priority(p)), reverse=True):
        fewer = [v for v in victims if v is not candidate]
        if _would_fit(pod, cluster, node, fewer, namespaces):
            victims = fewer
    return Plan(node.name, victims, sum(1 for v in victims if breaks(v)))


def _would_fit(
    pod: Pod, cluster: ClusterState, node: NodeState, gone: Sequence[Pod], namespaces: NamespaceLabels
) -> bool:
    uids = {p["metadata"]["uid"] for p in gone}
    there = node.without(uids)
    kept = cluster.nodes[node.name]
    cluster.nodes[node.name] = there
    try:
        return Filters(pod, cluster, namespaces).check(there) is None
    finally:
        cluster.nodes[node.name] = kept
