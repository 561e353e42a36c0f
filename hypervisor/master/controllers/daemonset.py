"""DaemonSets: one pod on each node that takes it.

A pod is tied to its node by a required affinity to the node's name, and scheduled like any other (as upstream does), so
that room is counted once. Source: Kubernetes, "DaemonSet" and "Perform a Rolling Update on a DaemonSet".
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hypervisor.errors import HvError
from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import DAEMON_SETS, NODES, PODS
from hypervisor.master.controllers import pods as podctl
from hypervisor.master.controllers.base import Context, Unseen, is_gone, own_key, owner_key, unless_gone
from hypervisor.master.controllers.batch import slow_start
from hypervisor.master.controllers.deployment.rollout import resolve
from hypervisor.master.controllers.pods import Pod
from hypervisor.master.controllers.revisions import HASH_LABEL, Revisions
from hypervisor.master.scheduler.affinity import required_node_affinity
from hypervisor.master.scheduler.filters import untolerated
from hypervisor.master.scheduler.state import NodeState

GENERATION_LABEL = "pod-template-generation"
_TOLERATED = (
    ("node.kubernetes.io/not-ready", "NoExecute"),
    ("node.kubernetes.io/unreachable", "NoExecute"),
    ("node.kubernetes.io/disk-pressure", "NoSchedule"),
    ("node.kubernetes.io/memory-pressure", "NoSchedule"),
    ("node.kubernetes.io/pid-pressure", "NoSchedule"),
    ("node.kubernetes.io/unschedulable", "NoSchedule"),
)
"""What every daemon tolerates."""


class DaemonSetController:
    """Theory of operation: revision noted -> nodes and their pods compared -> made and deleted -> update -> status."""

    name = "daemonset"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._unseen = Unseen()
        self._revisions = Revisions(context, DAEMON_SETS)
        self.watches = {DAEMON_SETS: own_key, PODS: owner_key(DAEMON_SETS), NODES: self._all_keys}
        context.caches[PODS].add_handler(self._unseen.handler)

    def _all_keys(self, _: Mapping[str, Any]) -> Iterable[Key]:
        return [meta.key_of(d) for d in self._context.all(DAEMON_SETS)]

    async def sync(self, key: Key) -> float | None:
        """One turn for one DaemonSet."""
        daemon = self._context.cached(DAEMON_SETS, *key)
        if daemon is None or meta.is_deleting(daemon):
            return None
        digest = await self._revisions.note(daemon)
        pods = self._unseen.overlay(meta.uid_of(daemon), self._context.owned(PODS, daemon))
        by_node: dict[str, list[Pod]] = defaultdict(list)
        for pod in pods:
            by_node[_node_of(pod)].append(pod)
        nodes = [NodeState(meta.key_of(n)[1], n) for n in self._context.all(NODES)]
        wanted = {n.name for n in nodes if _should_run(daemon, n)}
        kept = {n.name for n in nodes if _may_stay(daemon, n)}
        await self._balance(daemon, digest, by_node, wanted, kept)
        await self._update(daemon, digest, by_node, wanted)
        await self._tell(daemon, digest, by_node, wanted)
        min_ready_s = int(meta.get(daemon, "spec", "minReadySeconds", default=0))
        return podctl.available_in_s(pods, min_ready_s, time.time()) if min_ready_s else None

    # ---- pods --------------------------------------------------------------------------------------------------------

    async def _balance(
        self,
        daemon: Mapping[str, Any],
        digest: str,
        by_node: Mapping[str, list[Pod]],
        wanted: set[str],
        kept: set[str],
    ) -> None:
        missing = [n for n in sorted(wanted) if not any(not _is_over(p) for p in by_node.get(n, ()))]
        doomed = [
            p for pods in by_node.values() for p in pods if podctl.phase(p) == "Failed" and not meta.is_deleting(p)
        ]
        for node, pods in by_node.items():
            live = sorted(
                (p for p in pods if podctl.is_active(p)), key=lambda p: meta.get(p, "metadata", "creationTimestamp")
            )
            doomed += live if node not in kept else live[1:]
        await self._delete(daemon, doomed)
        queue = list(missing)

        async def one() -> None:
            await self._make(daemon, queue.pop(), digest)

        error = await slow_start(len(missing), one)
        if error is not None and not is_gone(error):
            self._context.events.record(daemon, "Warning", "FailedCreate", f"Error creating: {error}")
            raise error

    async def _make(self, daemon: Mapping[str, Any], node: str, digest: str) -> None:
        pod = podctl.from_template(DAEMON_SETS, daemon, daemon["spec"]["template"])
        labels = pod["metadata"].setdefault("labels", {})
        generation = str(meta.get(daemon, "metadata", "generation", default=1))
        pod["metadata"]["labels"] = labels | {HASH_LABEL: digest, GENERATION_LABEL: generation}
        _tie(pod["spec"], node)
        made = await self._context.client.create(PODS, pod, meta.get(daemon, "metadata", "namespace"))
        self._unseen.made(meta.uid_of(daemon), made)
        message = f"Created pod: {meta.get(made, 'metadata', 'name')}"
        self._context.events.record(daemon, "Normal", "SuccessfulCreate", message)

    async def _delete(self, daemon: Mapping[str, Any], pods: Sequence[Pod]) -> None:
        for pod in pods:
            namespace, name = meta.key_of(pod)
            await unless_gone(self._context.client.delete(PODS, name, namespace, uid=meta.uid_of(pod)))
            self._unseen.deleted(meta.uid_of(pod))
            self._context.events.record(daemon, "Normal", "SuccessfulDelete", f"Deleted pod: {name}")

    # ---- updates -----------------------------------------------------------------------------------------------------

    async def _update(
        self, daemon: Mapping[str, Any], digest: str, by_node: Mapping[str, list[Pod]], wanted: set[str]
    ) -> None:
        strategy = meta.get(daemon, "spec", "updateStrategy", default={})
        if strategy.get("type") == "OnDelete":
            return
        allowed = resolve((strategy.get("rollingUpdate") or {}).get("maxUnavailable", 1), len(wanted), up=True) or 1
        min_ready_s, now = int(meta.get(daemon, "spec", "minReadySeconds", default=0)), time.time()
        unavailable = 0
        old_broken: list[Pod] = []
        old_good: list[Pod] = []
        for node in wanted:
            live = [p for p in by_node.get(node, ()) if podctl.is_active(p)]
            good = any(podctl.is_available(p, min_ready_s, now) for p in live)
            unavailable += not good
            outdated = [p for p in live if meta.labels_of(p).get(HASH_LABEL) != digest]
            (old_good if good else old_broken).extend(outdated)
        room = max(0, allowed - unavailable)
        await self._delete(daemon, [*old_broken, *old_good[:room]])

    # ---- what it tells -----------------------------------------------------------------------------------------------

    async def _tell(
        self, daemon: Mapping[str, Any], digest: str, by_node: Mapping[str, list[Pod]], wanted: set[str]
    ) -> None:
        status = _numbers(daemon, digest, by_node, wanted)
        old = daemon.get("status") or {}
        if all(old.get(k, 0) == v for k, v in status.items()):
            return
        namespace, name = meta.key_of(daemon)
        try:
            await self._context.client.patch(DAEMON_SETS, name, namespace, {"status": status}, subresource="status")
        except HvError as e:
            if not is_gone(e):
                raise


def _numbers(
    daemon: Mapping[str, Any], digest: str, by_node: Mapping[str, list[Pod]], wanted: set[str]
) -> dict[str, int]:
    min_ready_s, now = int(meta.get(daemon, "spec", "minReadySeconds", default=0)), time.time()
    on_wanted = [[p for p in by_node.get(n, ()) if podctl.is_active(p)] for n in wanted]
    there = [pods[0] for pods in on_wanted if pods]
    stray = sum(1 for n, pods in by_node.items() if n not in wanted and any(map(podctl.is_active, pods)))
    available = sum(1 for p in there if podctl.is_available(p, min_ready_s, now))
    return {
        "desiredNumberScheduled": len(wanted),
        "currentNumberScheduled": len(there),
        "numberMisscheduled": stray,
        "numberReady": sum(1 for p in there if podctl.is_ready(p)),
        "updatedNumberScheduled": sum(1 for p in there if meta.labels_of(p).get(HASH_LABEL) == digest),
        "numberAvailable": available,
        "numberUnavailable": len(wanted) - available,
        "observedGeneration": int(meta.get(daemon, "metadata", "generation", default=0)),
    }


def _is_over(pod: Pod) -> bool:
    return podctl.phase(pod) in ("Succeeded", "Failed")


def _node_of(pod: Pod) -> str:
    """The node that it is on, or is tied to."""
    name = meta.get(pod, "spec", "nodeName", default="")
    if name:
        return str(name)
    terms = meta.get(
        pod, "spec", "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms",
        default=(),
    )  # fmt: skip
    fields = [f for t in terms for f in t.get("matchFields") or () if f.get("key") == "metadata.name"]
    return str(fields[0]["values"][0]) if fields else ""


def _tie(spec: Object, node: str) -> None:
    """Ties a pod's spec to a node by affinity, beside what its own affinity asks."""
    field = {"key": "metadata.name", "operator": "In", "values": [node]}
    affinity = dict(spec.get("affinity") or {})
    by_node = dict(affinity.get("nodeAffinity") or {})
    terms = meta.get(by_node, "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms", default=[{}])
    tied = [{**t, "matchFields": [field]} for t in terms]
    by_node["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": tied}
    affinity["nodeAffinity"] = by_node
    spec["affinity"] = affinity
    extra = [{"key": k, "operator": "Exists", "effect": e} for k, e in _TOLERATED]
    own = list(spec.get("tolerations") or ())
    spec["tolerations"] = [*own, *(t for t in extra if t not in own)]


def _as_pod(daemon: Mapping[str, Any]) -> Pod:
    spec = dict(daemon["spec"]["template"]["spec"])
    extra = [{"key": k, "operator": "Exists", "effect": e} for k, e in _TOLERATED]
    spec["tolerations"] = [*(spec.get("tolerations") or ()), *extra]
    return {"metadata": {"namespace": meta.get(daemon, "metadata", "namespace")}, "spec": spec}


def _should_run(daemon: Mapping[str, Any], node: NodeState) -> bool:
    pod = _as_pod(daemon)
    return _fits(pod, node) and untolerated(pod, node, ("NoSchedule", "NoExecute")) is None


def _may_stay(daemon: Mapping[str, Any], node: NodeState) -> bool:
    pod = _as_pod(daemon)
    return _fits(pod, node) and untolerated(pod, node, ("NoExecute",)) is None


def _fits(pod: Pod, node: NodeState) -> bool:
    named = meta.get(pod, "spec", "nodeName", default="")
    return (not named or named == node.name) and required_node_affinity(pod, node)
