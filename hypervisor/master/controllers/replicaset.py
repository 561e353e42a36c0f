"""ReplicaSets: as many pods of a template as were asked for."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hypervisor.errors import HvError
from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import PODS, REPLICA_SETS
from hypervisor.kube.selectors import LabelSelector
from hypervisor.master.controllers import pods as podctl
from hypervisor.master.controllers.base import Context, Unseen, is_gone, own_key, owner_key, unless_gone
from hypervisor.master.controllers.batch import slow_start
from hypervisor.master.controllers.pods import Pod

BURST = 500
"""Pods made or deleted in one turn, at most."""


class ReplicaSetController:
    """Makes and deletes pods; adopts those that fit its selector and belong to nobody, and lets go of others."""

    name = "replicaset"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._unseen = Unseen()
        self.watches = {REPLICA_SETS: own_key, PODS: self._keys_of_pod}
        context.caches[PODS].add_handler(self._unseen.handler)

    def _keys_of_pod(self, pod: Mapping[str, Any]) -> Sequence[Key]:
        if meta.controller_of(pod) is not None:
            return list(owner_key(REPLICA_SETS)(pod))
        namespace = meta.get(pod, "metadata", "namespace")
        return [
            meta.key_of(rs)
            for rs in self._context.all(REPLICA_SETS)
            if meta.get(rs, "metadata", "namespace") == namespace and _selector(rs).matches(meta.labels_of(pod))
        ]

    async def sync(self, key: Key) -> float | None:
        """One turn for one ReplicaSet."""
        found = self._context.cached(REPLICA_SETS, *key)
        if found is None:
            return None
        pods = await self._claim(found)
        active = [p for p in pods if podctl.is_active(p)]
        problem = ""
        if not meta.is_deleting(found):
            problem = await self._scale(found, active)
        await self._update_status(found, active, problem)
        min_ready_s = int(meta.get(found, "spec", "minReadySeconds", default=0))
        return podctl.available_in_s(active, min_ready_s, time.time()) if min_ready_s else None

    # ---- whose pods --------------------------------------------------------------------------------------------------

    async def _claim(self, rs: Mapping[str, Any]) -> list[Pod]:
        selector, namespace = _selector(rs), meta.get(rs, "metadata", "namespace")
        mine: list[Pod] = []
        for pod in self._context.owned(PODS, rs):
            if selector.matches(meta.labels_of(pod)):
                mine.append(pod)
            else:
                await self._release(rs, pod)
        if not meta.is_deleting(rs):
            orphans = self._context.orphans(PODS, namespace)
            for pod in orphans:
                if selector.matches(meta.labels_of(pod)) and podctl.is_active(pod):
                    mine += await self._adopt(rs, pod)
        return self._unseen.overlay(meta.uid_of(rs), mine)

    async def _adopt(self, rs: Mapping[str, Any], pod: Pod) -> list[Pod]:
        references = [*meta.owners_of(pod), meta.owner_reference(REPLICA_SETS, rs)]
        patch = {"metadata": {"uid": meta.uid_of(pod), "ownerReferences": references}}
        return await self._patch_pod(pod, patch)

    async def _release(self, rs: Mapping[str, Any], pod: Pod) -> None:
        references = [o for o in meta.owners_of(pod) if o.get("uid") != meta.uid_of(rs)]
        await self._patch_pod(pod, {"metadata": {"uid": meta.uid_of(pod), "ownerReferences": references or None}})

    async def _patch_pod(self, pod: Pod, patch: Object) -> list[Pod]:
        namespace, name = meta.key_of(pod)
        try:
            return [await self._context.client.patch(PODS, name, namespace, patch)]
        except HvError as e:
            if is_gone(e):
                return []
            raise

    # ---- how many ----------------------------------------------------------------------------------------------------

    async def _scale(self, rs: Mapping[str, Any], active: Sequence[Pod]) -> str:
        """Brings the number of pods nearer to what it should be; gives what stood in the way."""
        wanted = int(meta.get(rs, "spec", "replicas", default=1))
        difference = len(active) - wanted
        if difference < 0:
            return await self._make(rs, min(-difference, BURST))
        if difference > 0:
            await self._delete(rs, self._surplus(active, min(difference, BURST)))
        return ""

    async def _make(self, rs: Mapping[str, Any], count: int) -> str:
        async def one() -> None:
            pod = podctl.from_template(REPLICA_SETS, rs, rs["spec"]["template"])
            made = await self._context.client.create(PODS, pod, meta.get(rs, "metadata", "namespace"))
            self._unseen.made(meta.uid_of(rs), made)
            name = meta.get(made, "metadata", "name")
            self._context.events.record(rs, "Normal", "SuccessfulCreate", f"Created pod: {name}")

        error = await slow_start(count, one)
        if error is None:
            return ""
        if isinstance(error, ApiError) and error.reason == "NotFound":
            return ""  # its namespace is going
        self._context.events.record(rs, "Warning", "FailedCreate", f"Error creating: {error}")
        await self._update_status(rs, [], str(error), count_pods=False)
        raise error

    async def _delete(self, rs: Mapping[str, Any], victims: Sequence[Pod]) -> None:
        async def one(pod: Pod) -> None:
            namespace, name = meta.key_of(pod)
            await unless_gone(self._context.client.delete(PODS, name, namespace, uid=meta.uid_of(pod)))
            self._unseen.deleted(meta.uid_of(pod))
            self._context.events.record(rs, "Normal", "SuccessfulDelete", f"Deleted pod: {name}")

        await asyncio.gather(*map(one, victims))

    @staticmethod
    def _surplus(active: Sequence[Pod], count: int) -> list[Pod]:
        crowd = Counter(str(meta.get(p, "spec", "nodeName", default="")) for p in active)
        return sorted(active, key=lambda p: podctl.deletion_order(p, crowd))[:count]

    # ---- what it tells -----------------------------------------------------------------------------------------------

    async def _update_status(
        self, rs: Mapping[str, Any], active: Sequence[Pod], problem: str, *, count_pods: bool = True
    ) -> None:
        old: Mapping[str, Any] = rs.get("status") or {}
        status = dict(old)
        if count_pods:
            status |= replica_counts(rs, active)
        conditions = [c for c in old.get("conditions") or () if c.get("type") != "ReplicaFailure"]
        if problem:
            failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": problem}
            conditions = meta.with_condition(old.get("conditions") or (), failure)
        status.pop("conditions", None)
        if conditions:
            status["conditions"] = conditions
        if status == old:
            return
        namespace, name = meta.key_of(rs)
        patch = {"status": {"conditions": None} | status}
        await unless_gone(self._context.client.patch(REPLICA_SETS, name, namespace, patch, subresource="status"))


def _selector(rs: Mapping[str, Any]) -> LabelSelector:
    return LabelSelector.of(rs["spec"]["selector"])


def replica_counts(rs: Mapping[str, Any], active: Sequence[Pod]) -> dict[str, int]:
    """The numbers of a ReplicaSet's status."""
    template_labels = meta.get(rs, "spec", "template", "metadata", "labels", default={})
    min_ready_s, now = int(meta.get(rs, "spec", "minReadySeconds", default=0)), time.time()
    like_template = LabelSelector.of({"matchLabels": template_labels})
    return {
        "replicas": len(active),
        "fullyLabeledReplicas": sum(1 for p in active if like_template.matches(meta.labels_of(p))),
        "readyReplicas": sum(1 for p in active if podctl.is_ready(p)),
        "availableReplicas": sum(1 for p in active if podctl.is_available(p, min_ready_s, now)),
        "observedGeneration": int(meta.get(rs, "metadata", "generation", default=0)),
    }
