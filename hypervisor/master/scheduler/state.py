"""The cluster as the scheduler sees it: nodes with the pods on them, assumed ones included.

Not thread-safe: one loop owns it. A pod is counted from the moment it was assumed, before the API server has
acknowledged its binding, so that the next pod does not count on the same room.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hypervisor.master.scheduler.image_names import full_name
from hypervisor.master.scheduler.requests import (
    OVERHEAD_ANNOTATION,
    Amounts,
    add,
    amount,
    amounts,
    host_ports,
    pod_request,
    scored_request,
)

Pod = Mapping[str, Any]
Node = Mapping[str, Any]
Group = tuple[str, frozenset[tuple[str, str]]]
"""Namespace and labels of pods that selectors cannot tell apart."""


def group_of(pod: Pod) -> Group:
    """The group that `pod` counts in."""
    metadata = pod["metadata"]
    return metadata["namespace"], frozenset((metadata.get("labels") or {}).items())


@dataclass
class NodeState:
    """A node, and what is on it.

    Invariants: `requested` is the sum of `charged` over `pods`; `groups` counts those that are not being deleted by
    namespace and labels (pods of one owner are alike, so a selector is matched once for all of them); `related` are
    those with affinity to, or anti-affinity against, other pods.
    """

    name: str
    node: Node
    allocatable: Amounts = field(default_factory=dict)
    overhead: int = 0
    requested: Amounts = field(default_factory=dict)
    scored: Amounts = field(default_factory=dict)
    pods: dict[str, Pod] = field(default_factory=dict)
    images: frozenset[str] = frozenset()
    groups: dict[Group, int] = field(default_factory=dict)
    related: dict[str, Pod] = field(default_factory=dict)

    @property
    def labels(self) -> Mapping[str, str]:
        """Its labels."""
        labels: Mapping[str, str] = self.node["metadata"].get("labels") or {}
        return labels

    @property
    def taints(self) -> list[Mapping[str, Any]]:
        """Its taints."""
        return list(self.node.get("spec", {}).get("taints") or ())

    def set_node(self, node: Node) -> None:
        """The node object has changed."""
        self.node = node
        status = node.get("status") or {}
        self.allocatable = amounts(status.get("allocatable") or status.get("capacity"))
        annotations = node["metadata"].get("annotations") or {}
        self.overhead = amount("memory", annotations.get(OVERHEAD_ANNOTATION, 0))
        self.images = frozenset(full_name(n) for image in status.get("images") or () for n in image.get("names") or ())
        self._recount()

    def _recount(self) -> None:
        self.requested, self.scored, self.groups, self.related = {}, {}, {}, {}
        for uid, pod in self.pods.items():
            self._count(uid, pod, 1)

    def _count(self, uid: str, pod: Pod, sign: int) -> None:
        add(self.requested, self.charged(pod), sign)
        add(self.scored, scored_request(pod), sign)
        if not pod["metadata"].get("deletionTimestamp"):
            group = group_of(pod)
            left = self.groups.get(group, 0) + sign
            self.groups[group] = left
            if not left:
                del self.groups[group]
        affinity = pod["spec"].get("affinity") or {}
        if affinity.get("podAffinity") or affinity.get("podAntiAffinity"):
            self.related[uid] = pod
        if sign < 0:
            self.related.pop(uid, None)

    def charged(self, pod: Pod) -> Amounts:
        """What `pod` takes here: its request, and its VM's memory unless its own overhead says it."""
        request = pod_request(pod)
        if not pod["spec"].get("overhead") and self.overhead:
            request["memory"] = request.get("memory", 0) + self.overhead
        return request

    def put(self, pod: Pod) -> None:
        """Adds a pod, or a newer version of it."""
        uid = pod["metadata"]["uid"]
        self.drop(uid)
        self.pods[uid] = pod
        self._count(uid, pod, 1)

    def drop(self, uid: str) -> None:
        """Takes a pod away; one that is not here changes nothing."""
        pod = self.pods.pop(uid, None)
        if pod is not None:
            self._count(uid, pod, -1)

    def without(self, uids: set[str]) -> NodeState:
        """A copy as if these pods were not there."""
        copy = NodeState(self.name, self.node, images=self.images)
        copy.pods = {uid: pod for uid, pod in self.pods.items() if uid not in uids}
        copy.set_node(self.node)
        return copy

    def used_ports(self) -> set[tuple[str, str, int]]:
        """Host ports that are taken."""
        return host_ports(self.pods.values())


def is_over(pod: Pod) -> bool:
    """It has ended and takes nothing any more."""
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


class ClusterState:
    """All nodes. `assume` and `forget` bracket a binding; what the API server says always wins."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeState] = {}
        self._where: dict[str, str] = {}
        self._homeless: dict[str, dict[str, Pod]] = {}
        self.generation = 0

    def __iter__(self) -> Iterator[NodeState]:
        return iter(self.nodes.values())

    def set_node(self, node: Node) -> None:
        """A node came or changed."""
        name = node["metadata"]["name"]
        state = self.nodes.get(name)
        if state is None:
            state = self.nodes[name] = NodeState(name, node)
            for pod in self._homeless.pop(name, {}).values():
                state.put(pod)
        state.set_node(node)
        self.generation += 1

    def drop_node(self, name: str) -> None:
        """A node went; its pods are remembered, for it may come back before they are deleted."""
        state = self.nodes.pop(name, None)
        if state is not None and state.pods:
            self._homeless[name] = dict(state.pods)
        self.generation += 1

    def set_pod(self, pod: Pod) -> None:
        """A pod with a node came or changed; an ended one is no longer counted."""
        uid, name = pod["metadata"]["uid"], pod["spec"].get("nodeName") or ""
        if self._where.get(uid, name) != name or is_over(pod):
            self.drop_pod(uid)
        if name and not is_over(pod):
            self._where[uid] = name
            self._put(name, pod)
        self.generation += 1

    def _put(self, name: str, pod: Pod) -> None:
        if name in self.nodes:
            self.nodes[name].put(pod)
        else:
            self._homeless.setdefault(name, {})[pod["metadata"]["uid"]] = pod

    def drop_pod(self, uid: str) -> None:
        """A pod went, ended, or was not bound after all."""
        name = self._where.pop(uid, None)
        if name in self.nodes:
            self.nodes[name].drop(uid)
        elif name is not None and name in self._homeless:
            self._homeless[name].pop(uid, None)
        self.generation += 1

    def assume(self, pod: Pod, node: str) -> None:
        """Counts `pod` on `node` from now on, although its binding is only under way."""
        self.set_pod({**pod, "spec": {**pod["spec"], "nodeName": node}})

    def related(self) -> Iterator[tuple[NodeState, Pod]]:
        """Every pod on a node that has terms about other pods."""
        return ((state, pod) for state in self.nodes.values() for pod in state.related.values())
