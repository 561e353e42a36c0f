"""The scheduler: pods without a node get one.

Theory of operation
-------------------
::

    pods, nodes, namespaces, budgets (informers) --> ClusterState, SchedulingQueue
                                                            |
    pop --> filters --> scores --> assume --> bind (POST pods/binding, several at a time) --> the informer says so
              | none                                 | refused
              v                                      v
           preempt: lower pods deleted,           forget, back into the queue
           nominatedNodeName set; sleep

Choosing is done one pod at a time, so that each counts on what the one before it took; binding is not waited for. The
cluster state holds an assumed pod until the informer shows it on its node, or its binding failed. Nothing is kept
outside the API server: after a kill the next scheduler begins with a list.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import structlog

from hypervisor.errors import HvError
from hypervisor.kube.client import ApiClient
from hypervisor.kube.errors import ApiError
from hypervisor.kube.events import EventRecorder
from hypervisor.kube.resources import PODS
from hypervisor.master.scheduler import preemption
from hypervisor.master.scheduler.conditions import scheduled_condition
from hypervisor.master.scheduler.filters import Filters, Refusal
from hypervisor.master.scheduler.preemption import priority
from hypervisor.master.scheduler.queue import SchedulingQueue, Waiting
from hypervisor.master.scheduler.scores import Context, total
from hypervisor.master.scheduler.state import ClusterState, NodeState, Pod, is_over

NAME = "default-scheduler"
BINDINGS_AT_ONCE = 32

log = structlog.get_logger(__name__)


class Budgets:
    """Disruption budgets, as far as preemption asks about them."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[Any, int]] = {}

    def put(self, namespace: str, name: str, matches: Any, allowed: int) -> None:
        """`matches`: a selector with ``matches(labels)``; `allowed`: disruptions that the budget still allows."""
        self._known[namespace, name] = (matches, allowed)

    def drop(self, namespace: str, name: str) -> None:
        """The budget went."""
        self._known.pop((namespace, name), None)

    def breaks(self, pod: Pod) -> bool:
        """Whether one pod less would break a budget."""
        labels = pod["metadata"].get("labels") or {}
        return any(
            namespace == pod["metadata"]["namespace"] and allowed <= 0 and selector.matches(labels)
            for (namespace, _), (selector, allowed) in self._known.items()
        )


class Scheduler:
    """Owned by one loop: the notes of informers and `run` are called in it."""

    def __init__(self, client: ApiClient, events: EventRecorder) -> None:
        self._client = client
        self._events = events
        self._cluster = ClusterState()
        self._queue = SchedulingQueue()
        self._nominated: dict[str, tuple[Pod, str]] = {}
        self._namespaces: dict[str, Mapping[str, str]] = {}
        self._binding: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(BINDINGS_AT_ONCE)
        self.budgets = Budgets()

    # ---- what informers say ------------------------------------------------------------------------------------------

    def node_changed(self, node: Mapping[str, Any]) -> None:
        """A node came or changed. A heartbeat alone helps nobody who waits."""
        name = node["metadata"]["name"]
        known = self._cluster.nodes.get(name)
        if known is not None and _same_offer(known.node, node):
            known.node = node
            return
        self._cluster.set_node(node)
        self._queue.cluster_changed()

    def node_gone(self, node: Mapping[str, Any]) -> None:
        """A node was deleted."""
        self._cluster.drop_node(node["metadata"]["name"])

    def namespace_changed(self, namespace: Mapping[str, Any]) -> None:
        """A namespace came or changed: terms may select by its labels."""
        self._namespaces[namespace["metadata"]["name"]] = namespace["metadata"].get("labels") or {}

    def pod_changed(self, pod: Pod) -> None:
        """A pod came or changed."""
        uid = pod["metadata"]["uid"]
        if pod["spec"].get("nodeName") or is_over(pod):
            self._queue.drop(uid)
            self._nominated.pop(uid, None)
            self._cluster.set_pod(pod)
            if is_over(pod):
                self._queue.cluster_changed()
        elif self._is_ours(pod):
            self._queue.put(pod)

    def pod_gone(self, pod: Pod) -> None:
        """A pod was removed."""
        uid = pod["metadata"]["uid"]
        self._queue.drop(uid)
        self._nominated.pop(uid, None)
        self._cluster.drop_pod(uid)
        self._queue.cluster_changed()

    @staticmethod
    def _is_ours(pod: Pod) -> bool:
        spec = pod["spec"]
        wanted = spec.get("schedulerName") or NAME
        return wanted == NAME and not spec.get("schedulingGates") and not pod["metadata"].get("deletionTimestamp")

    # ---- the loop ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Schedules until it is cancelled; bindings under way are then given up, and found done or not by the next."""
        try:
            while True:
                waiting = await self._queue.pop()
                await self._slots.acquire()
                self._try(waiting)
        finally:
            for task in self._binding:
                task.cancel()
            await asyncio.gather(*self._binding, return_exceptions=True)

    def _try(self, waiting: Waiting) -> None:
        """Chooses for one pod and starts what follows; the slot is given back by that task."""
        node, refusals = self._choose(waiting.pod)
        if node is not None:
            self._cluster.assume(waiting.pod, node)
            work = self._bind(waiting, node)
        else:
            work = self._no_node(waiting, refusals)
        task = asyncio.create_task(work, name=f"schedule {waiting.pod['metadata']['name']}")
        self._binding.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._slots.release()
        self._binding.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("scheduling a pod failed", task=task.get_name(), exc_info=task.exception())

    def _choose(self, pod: Pod) -> tuple[str | None, dict[str, Refusal]]:
        filters = Filters(pod, self._cluster, self._namespaces)
        refusals: dict[str, Refusal] = {}
        good: list[NodeState] = []
        for node in self._cluster:
            refusal = filters.check(self._with_nominated(node, pod))
            if refusal is None:
                good.append(node)
            else:
                refusals[node.name] = refusal
        if len(good) <= 1:
            return (good[0].name if good else None), refusals
        sums = total(Context(pod, self._cluster, good, self._namespaces))
        best = max(good, key=lambda n: (sums[n.name], -len(n.pods), n.name))
        return best.name, refusals

    def _with_nominated(self, node: NodeState, pod: Pod) -> NodeState:
        """The node with the pods on it for which others were sent away: nobody lower takes the room meanwhile."""
        uid = pod["metadata"]["uid"]
        reserved = [
            p
            for other, (p, where) in self._nominated.items()
            if where == node.name and other != uid and priority(p) >= priority(pod)
        ]
        if not reserved:
            return node
        there = node.without(set())
        for other_pod in reserved:
            there.put(other_pod)
        return there

    # ---- what follows ------------------------------------------------------------------------------------------------

    async def _bind(self, waiting: Waiting, node: str) -> None:
        metadata = waiting.pod["metadata"]
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        try:
            await self._client.create(
                PODS, binding, metadata["namespace"], name=metadata["name"], subresource="binding"
            )
        except HvError as e:
            if not isinstance(e, ApiError) or e.reason not in ("NotFound", "Conflict"):
                log.warning("a pod could not be bound", pod=metadata["name"], node=node, error=str(e))
            self._cluster.drop_pod(metadata["uid"])
            self._queue.sleep(waiting)
            return
        self._nominated.pop(metadata["uid"], None)
        message = f"Successfully assigned {metadata['namespace']}/{metadata['name']} to {node}"
        self._events.record(waiting.pod, "Normal", "Scheduled", message)

    async def _no_node(self, waiting: Waiting, refusals: Mapping[str, Refusal]) -> None:
        message = why_nowhere(refusals)
        self._events.record(waiting.pod, "Warning", "FailedScheduling", message)
        plan = self._plan_preemption(waiting.pod, refusals)
        try:
            if plan is not None:
                self._nominated[waiting.uid] = (waiting.pod, plan.node)
                await self._send_away(waiting.pod, plan)
            await self._note_unschedulable(waiting.pod, message, plan.node if plan else "")
        except HvError as e:
            log.warning(
                "a pod that fits nowhere could not be marked", pod=waiting.pod["metadata"]["name"], error=str(e)
            )
        finally:
            self._queue.sleep(waiting)

    def _plan_preemption(self, pod: Pod, refusals: Mapping[str, Refusal]) -> preemption.Plan | None:
        nominated = self._nominated.get(pod["metadata"]["uid"])
        if nominated is not None and self._leaving(nominated[1], priority(pod)):
            return None  # those that were sent away are still on their way out
        nodes = [self._cluster.nodes[n] for n, r in refusals.items() if r.resolvable and n in self._cluster.nodes]
        return preemption.plan(pod, self._cluster, nodes, self._namespaces, self.budgets.breaks)

    def _leaving(self, node: str, below: int) -> bool:
        state = self._cluster.nodes.get(node)
        pods = state.pods.values() if state else ()
        return any(p["metadata"].get("deletionTimestamp") and priority(p) < below for p in pods)

    async def _send_away(self, pod: Pod, plan: preemption.Plan) -> None:
        for victim in plan.victims:
            metadata = victim["metadata"]
            message = f"Preempted by pod {pod['metadata']['uid']} on node {plan.node}"
            self._events.record(victim, "Normal", "Preempted", message)
            try:
                await self._client.delete(PODS, metadata["name"], metadata["namespace"], uid=metadata["uid"])
            except ApiError as e:
                if e.reason not in ("NotFound", "Conflict"):
                    raise

    async def _note_unschedulable(self, pod: Pod, message: str, nominated: str) -> None:
        condition = scheduled_condition(pod, message)
        status: dict[str, Any] = {}
        if condition is not None:
            status["conditions"] = [condition]
        if nominated:
            status["nominatedNodeName"] = nominated
        if status:
            metadata = pod["metadata"]
            patch = {"metadata": {"uid": metadata["uid"]}, "status": status}
            await self._client.patch(
                PODS, metadata["name"], metadata["namespace"], patch, how="strategic", subresource="status"
            )


def why_nowhere(refusals: Mapping[str, Refusal]) -> str:
    """As upstream words it: ``0/3 nodes are available: 1 Insufficient cpu, 2 node(s) were unschedulable.``"""
    if not refusals:
        return "no nodes available to schedule pods"
    counted = Counter(part for r in refusals.values() for part in r.reason.split(", "))
    parts = sorted(f"{count} {reason}" for reason, count in counted.items())
    return f"0/{len(refusals)} nodes are available: {', '.join(parts)}."


def _same_offer(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Nothing differs that filters or scores look at."""
    return _offer(old) == _offer(new)


def _offer(node: Mapping[str, Any]) -> Sequence[Any]:
    metadata, status = node["metadata"], node.get("status") or {}
    return (
        node.get("spec"),
        metadata.get("labels"),
        metadata.get("annotations"),
        status.get("allocatable"),
        status.get("images"),
    )
