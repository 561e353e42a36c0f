"""Nodes that stopped telling: marked, tainted, their pods replaced; and pods of nodes that went for good.

Theory of operation
-------------------
::

    Ready --no lease for GRACE_S--> Unknown: conditions Unknown, taint unreachable (NoSchedule, NoExecute)
      ^                                          |  each pod: its toleration of the NoExecute taint runs out
      +----------- the lease is renewed ---------+--> deleted (it stays Terminating: its node must end it)
                                                 node object deleted --> its pods are removed at once

A pod on a lost host is *not* removed from the API before its node is known to have ended it (or was deleted): its
replacement is made as soon as it is Terminating, and when the host comes back it ends what it still runs. So a pod's
identity is never held by two VMs at once. Times are counted by this process's own clock from what it saw change, as
clocks of hosts need not agree. Source: Kubernetes, "Nodes: Node controller", "Taint based evictions".
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import LEASES, NODES, PODS
from hypervisor.master.controllers import pods as podctl
from hypervisor.master.controllers.base import BY_NODE, Context, own_key, unless_gone
from hypervisor.master.controllers.pods import Pod
from hypervisor.master.scheduler.filters import tolerates

GRACE_S = 40.0
"""Without a sign of life for so long, a node is taken for lost (upstream's node-monitor-grace-period)."""
LEASE_NAMESPACE = "kube-node-lease"
UNREACHABLE, NOT_READY = "node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready"
_CONDITIONS = ("Ready", "MemoryPressure", "DiskPressure", "PIDPressure")
_BY_CONDITION = {
    "MemoryPressure": "node.kubernetes.io/memory-pressure",
    "DiskPressure": "node.kubernetes.io/disk-pressure",
    "PIDPressure": "node.kubernetes.io/pid-pressure",
}


@dataclass(frozen=True)
class _Sign:
    """The latest sign of life: what it was, and when this process saw it (monotonic)."""

    what: tuple[Any, ...]
    seen: float


class NodeLifecycleController:
    """One turn a node; comes back when the next thing is due."""

    name = "nodelifecycle"

    def __init__(self, context: Context, *, grace_s: float = GRACE_S) -> None:
        self._context = context
        self._grace_s = grace_s
        self._signs: dict[str, _Sign] = {}
        self._evict_at: dict[str, float] = {}
        self.watches = {NODES: own_key, LEASES: self._node_of_lease, PODS: self._node_of_pod}

    @staticmethod
    def _node_of_lease(lease: Mapping[str, Any]) -> Iterable[Key]:
        namespace, name = meta.key_of(lease)
        return [("", name)] if namespace == LEASE_NAMESPACE else []

    def _node_of_pod(self, pod: Pod) -> Iterable[Key]:
        name = meta.get(pod, "spec", "nodeName", default="")
        node = self._context.cached(NODES, "", name) if name else None
        # Pods of healthy nodes are nobody's business here.
        return [("", name)] if name and (node is None or _taints(node)) else []

    async def sync(self, key: Key) -> float | None:
        """One turn for one node."""
        name = key[1]
        node = self._context.cached(NODES, "", name)
        if node is None:
            self._signs.pop(name, None)
            await self._remove_pods(name)
            return None
        alive_for = self._grace_s - (time.monotonic() - self._sign(name, node).seen)
        if alive_for <= 0:
            await self._mark_lost(node)
        await self._taint(node, lost=alive_for <= 0)
        wait = await self._evict(name, node)
        waits = [w for w in (wait, alive_for if alive_for > 0 else None) if w is not None]
        return min(waits, default=None)

    def _sign(self, name: str, node: Mapping[str, Any]) -> _Sign:
        lease = self._context.cached(LEASES, LEASE_NAMESPACE, name)
        ready = meta.condition(node, "Ready") or {}
        heartbeat = None if ready.get("status") == "Unknown" else ready.get("lastHeartbeatTime")
        what = (meta.get(lease, "spec", "renewTime"), heartbeat)
        known = self._signs.get(name)
        if known is None or (known.what != what and what != (known.what[0], None)):
            known = self._signs[name] = _Sign(what, time.monotonic())
        return known

    # ---- the node ----------------------------------------------------------------------------------------------------

    async def _mark_lost(self, node: Mapping[str, Any]) -> None:
        known = meta.get(node, "status", "conditions", default=())
        wanted = [dict(c) for c in known]
        for kind in _CONDITIONS:
            wanted = meta.with_condition(wanted, _unknown(kind, next((c for c in known if c["type"] == kind), None)))
        if wanted != list(known):
            await self._patch(node, {"status": {"conditions": wanted}}, "status")
            name = meta.key_of(node)[1]
            self._context.events.record(node, "Normal", "NodeNotReady", f"Node {name} status is now: NodeNotReady")
            await self._unready_pods(name)

    async def _unready_pods(self, node: str) -> None:
        """Nobody can say whether its pods answer: services must not count on them."""
        for pod in self._pods(node):
            if not podctl.is_ready(pod):
                continue
            conditions = meta.get(pod, "status", "conditions", default=())
            ready = {"type": "Ready", "status": "False", "reason": "NodeNotReady", "message": f"node {node} is lost"}
            namespace, name = meta.key_of(pod)
            patch = {
                "metadata": {"uid": meta.uid_of(pod)},
                "status": {"conditions": meta.with_condition(conditions, ready)},
            }
            await unless_gone(self._context.client.patch(PODS, name, namespace, patch, subresource="status"))

    async def _taint(self, node: Mapping[str, Any], *, lost: bool) -> None:
        known = _taints(node)
        wanted = [t for t in known if t.get("key") not in (UNREACHABLE, NOT_READY, *_BY_CONDITION.values())]
        ready = (meta.condition(node, "Ready") or {}).get("status")
        key = UNREACHABLE if lost or ready == "Unknown" else NOT_READY if ready != "True" else ""
        if key:
            wanted += [self._taint_of(known, key, effect) for effect in ("NoSchedule", "NoExecute")]
        wanted += [
            self._taint_of(known, taint, "NoSchedule")
            for kind, taint in _BY_CONDITION.items()
            if meta.is_true(node, kind)
        ]
        if sorted(map(str, wanted)) != sorted(map(str, known)):
            await self._patch(
                node, {"metadata": {"resourceVersion": meta.version_of(node)}, "spec": {"taints": wanted or None}}
            )

    @staticmethod
    def _taint_of(known: list[Object], key: str, effect: str) -> Object:
        same = next((t for t in known if t.get("key") == key and t.get("effect") == effect), None)
        if same is not None:
            return same
        added = {"timeAdded": meta.now()} if effect == "NoExecute" else {}
        return {"key": key, "effect": effect, **added}

    async def _patch(self, node: Mapping[str, Any], patch: Object, subresource: str = "") -> None:
        name = meta.key_of(node)[1]
        await unless_gone(self._context.client.patch(NODES, name, None, patch, subresource=subresource))

    # ---- its pods ----------------------------------------------------------------------------------------------------

    def _pods(self, node: str) -> list[Pod]:
        return list(self._context.caches[PODS].store.by_index(BY_NODE, node))

    async def _evict(self, name: str, node: Mapping[str, Any]) -> float | None:
        """Deletes pods whose toleration of the node's NoExecute taints has run out."""
        taints = [t for t in _taints(node) if t.get("effect") == "NoExecute"]
        waits = []
        for pod in self._pods(name):
            uid = meta.uid_of(pod)
            if meta.is_deleting(pod) or not podctl.is_active(pod):
                continue
            left = _tolerated_for_s(pod, taints)
            if left is None:
                self._evict_at.pop(uid, None)
                continue
            due = self._evict_at.setdefault(uid, time.monotonic() + left)
            if due > time.monotonic():
                waits.append(due - time.monotonic())
                continue
            self._evict_at.pop(uid, None)
            await self._delete(
                pod, "Normal", "TaintManagerEviction", f"Marking for deletion Pod {meta.shown(meta.key_of(pod))}"
            )
        return min(waits, default=None)

    async def _delete(self, pod: Pod, kind: Any, reason: str, message: str, grace_s: int | None = None) -> None:
        namespace, name = meta.key_of(pod)
        self._context.events.record(pod, kind, reason, message)
        await unless_gone(self._context.client.delete(PODS, name, namespace, uid=meta.uid_of(pod), grace_s=grace_s))

    async def _remove_pods(self, node: str) -> None:
        """The node object is gone, so nobody will ever end its pods: they are removed."""
        for pod in self._pods(node):
            await self._delete(pod, "Warning", "NodeGone", f"node {node} was removed", grace_s=0)


def _taints(node: Mapping[str, Any]) -> list[Object]:
    return list(meta.get(node, "spec", "taints", default=()))


def _unknown(kind: str, known: Mapping[str, Any] | None) -> Object:
    kept = {k: v for k, v in (known or {}).items() if k == "lastHeartbeatTime"}
    return {
        **kept,
        "type": kind,
        "status": "Unknown",
        "reason": "NodeStatusUnknown" if known else "NodeStatusNeverUpdated",
        "message": "Kubelet stopped posting node status." if known else "Kubelet never posted node status.",
    }


def _tolerated_for_s(pod: Pod, taints: list[Object]) -> float | None:
    """Seconds that a pod may stay under these taints; 0: none; None: for ever."""
    tolerations = list(meta.get(pod, "spec", "tolerations", default=()))
    left: float | None = None
    for taint in taints:
        matching = [t for t in tolerations if tolerates([t], taint)]
        if not matching:
            return 0.0
        bounded = [float(t["tolerationSeconds"]) for t in matching if t.get("tolerationSeconds") is not None]
        if bounded:
            left = min([*bounded, *([left] if left is not None else [])])
    return left
