"""The Deployment controller: one step of a rollout at a time, each from what the caches show."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import DEPLOYMENTS, REPLICA_SETS
from hypervisor.kube.selectors import LabelSelector
from hypervisor.master.controllers.base import Context, Unseen, own_key, owner_key, unless_gone
from hypervisor.master.controllers.deployment import progress, revisions, rollout

Set = Mapping[str, Any]


class DeploymentController:
    """Theory of operation: claim ReplicaSets -> the newest one made if missing -> sizes -> clean-up -> status."""

    name = "deployment"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._unseen = Unseen()
        self.watches = {DEPLOYMENTS: own_key, REPLICA_SETS: owner_key(DEPLOYMENTS)}
        context.caches[REPLICA_SETS].add_handler(self._unseen.handler)

    async def sync(self, key: Key) -> float | None:
        """One turn for one Deployment."""
        deployment = self._context.cached(DEPLOYMENTS, *key)
        if deployment is None or meta.is_deleting(deployment):
            return None
        sets = await self._claim(deployment)
        new = revisions.newest(deployment, sets)
        paused = bool(meta.get(deployment, "spec", "paused", default=False))
        limits = rollout.bounds(deployment)
        if paused or rollout.resized(limits, sets):
            await self._scale(deployment, sets, rollout.proportional(limits, sets))
        else:
            new = await self._newest(deployment, new, sets)
            old = [s for s in sets if new is None or meta.uid_of(s) != meta.uid_of(new)]
            await self._step(deployment, limits, new, old)
        await self._forget(deployment, new, sets)
        return await self._tell(deployment, new, sets)

    # ---- whose ReplicaSets -------------------------------------------------------------------------------------------

    async def _claim(self, deployment: Mapping[str, Any]) -> list[Set]:
        selector = LabelSelector.of(deployment["spec"]["selector"])
        mine = [s for s in self._context.owned(REPLICA_SETS, deployment) if selector.matches(meta.labels_of(s))]
        namespace = meta.get(deployment, "metadata", "namespace")
        for orphan in self._context.orphans(REPLICA_SETS, namespace):
            if selector.matches(meta.labels_of(orphan)) and not meta.is_deleting(orphan):
                references = [*meta.owners_of(orphan), meta.owner_reference(DEPLOYMENTS, deployment)]
                patch = {"metadata": {"uid": meta.uid_of(orphan), "ownerReferences": references}}
                mine.append(await self._patch(orphan, patch))
        return self._unseen.overlay(meta.uid_of(deployment), mine)

    async def _patch(self, rs: Set, patch: Object) -> Object:
        namespace, name = meta.key_of(rs)
        return await self._context.client.patch(REPLICA_SETS, name, namespace, patch)

    # ---- the newest --------------------------------------------------------------------------------------------------

    async def _newest(self, deployment: Mapping[str, Any], new: Set | None, sets: Sequence[Set]) -> Set | None:
        others = [s for s in sets if new is None or meta.uid_of(s) != meta.uid_of(new)]
        number = max(map(revisions.revision, others), default=0) + 1
        if new is None:
            new = await self._make(deployment, number, others)
        else:
            known = meta.get(new, "metadata", "annotations", default={})
            annotations = revisions.annotations_for(deployment, known, max(number, revisions.revision(new)))
            if not annotations.items() <= known.items():  # its revision, or the change-cause that was noted afterwards
                new = await self._patch(new, {"metadata": {"annotations": annotations}})
        if new is not None:
            await self._note_revision(deployment, revisions.revision(new))
        return new

    async def _make(self, deployment: Mapping[str, Any], number: int, others: Sequence[Set]) -> Set | None:
        recreate = meta.get(deployment, "spec", "strategy", "type") == "Recreate"
        replicas = rollout.new_set_size(rollout.bounds(deployment), others, recreate)
        wanted = revisions.make_set(deployment, number, replicas)
        namespace, name = meta.key_of(wanted)
        try:
            made = await self._context.client.create(REPLICA_SETS, wanted, namespace)
        except ApiError as e:
            if e.reason == "AlreadyExists":
                return await self._collision(deployment, wanted)
            raise
        self._unseen.made(meta.uid_of(deployment), made)
        if replicas:
            message = f"Scaled up replica set {name} from 0 to {replicas}"
            self._context.events.record(deployment, "Normal", "ScalingReplicaSet", message)
        return made

    async def _collision(self, deployment: Mapping[str, Any], wanted: Object) -> Set | None:
        """The name is taken: by our own that the cache does not show yet, or by another, and the next hash is tried."""
        namespace, name = meta.key_of(wanted)
        there = await self._context.client.get(REPLICA_SETS, name, namespace)
        owner = meta.controller_of(there)
        if owner is not None and owner.get("uid") == meta.uid_of(deployment) and revisions.newest(deployment, [there]):
            return there
        count = int(meta.get(deployment, "status", "collisionCount", default=0)) + 1
        await self._patch_status(deployment, {"collisionCount": count})
        return None

    async def _note_revision(self, deployment: Mapping[str, Any], number: int) -> None:
        if revisions.revision(deployment) != number:
            namespace, name = meta.key_of(deployment)
            patch = {"metadata": {"annotations": {revisions.REVISION: str(number)}}}
            await self._context.client.patch(DEPLOYMENTS, name, namespace, patch)

    # ---- sizes -------------------------------------------------------------------------------------------------------

    async def _step(
        self, deployment: Mapping[str, Any], limits: rollout.Bounds, new: Set | None, old: Sequence[Set]
    ) -> None:
        if meta.get(deployment, "spec", "strategy", "type") == "Recreate":
            sizes = rollout.recreate_step(limits, new, old)
        else:
            sizes = rollout.rolling_step(limits, new, old) if new is not None else {}
        await self._scale(deployment, [*old, *([new] if new else [])], sizes)

    async def _scale(self, deployment: Mapping[str, Any], sets: Sequence[Set], sizes: rollout.Sizes) -> None:
        for rs in sets:
            name, before = rollout.name_of(rs), rollout.asked(rs)
            after = sizes.get(name, before)
            annotations = meta.get(rs, "metadata", "annotations", default={})
            told = revisions.replicas_annotations(deployment)
            active = bool(after or before)
            if after == before and (not active or told.items() <= annotations.items()):
                continue
            # Only of the state that was counted: another may have been resized since the cache was written.
            metadata = {"annotations": told, "resourceVersion": meta.version_of(rs)}
            await self._patch(rs, {"metadata": metadata, "spec": {"replicas": after}})
            if after != before:
                direction = "up" if after > before else "down"
                message = f"Scaled {direction} replica set {name} from {before} to {after}"
                self._context.events.record(deployment, "Normal", "ScalingReplicaSet", message)

    async def _forget(self, deployment: Mapping[str, Any], new: Set | None, sets: Sequence[Set]) -> None:
        """Old ReplicaSets beyond ``revisionHistoryLimit`` go."""
        limit = int(meta.get(deployment, "spec", "revisionHistoryLimit", default=10))
        done = [
            s
            for s in sets
            if (new is None or meta.uid_of(s) != meta.uid_of(new))
            and not (rollout.asked(s) or rollout.running(s) or meta.is_deleting(s))
        ]
        for rs in sorted(done, key=revisions.revision)[: max(0, len(done) - limit)]:
            namespace, name = meta.key_of(rs)
            await unless_gone(self._context.client.delete(REPLICA_SETS, name, namespace, uid=meta.uid_of(rs)))

    # ---- what it tells -----------------------------------------------------------------------------------------------

    async def _tell(self, deployment: Mapping[str, Any], new: Set | None, sets: Sequence[Set]) -> float | None:
        shown = [*(s for s in sets if new is None or meta.uid_of(s) != meta.uid_of(new)), *([new] if new else [])]
        numbers = progress.counts(deployment, new, shown)
        now = time.time()
        status: Object = {k: v or None for k, v in numbers.items() if k != "observedGeneration"}
        status["observedGeneration"] = numbers["observedGeneration"]
        status["conditions"] = progress.conditions(deployment, new, numbers, shown, now)
        old = deployment.get("status") or {}
        if any((old.get(k) or None) != (v or None) for k, v in status.items()):
            await self._patch_status(deployment, status)
        wait = progress.overdue_in_s(deployment, now)
        return None if not wait else wait + 0.1

    async def _patch_status(self, deployment: Mapping[str, Any], status: Object) -> None:
        namespace, name = meta.key_of(deployment)
        await unless_gone(
            self._context.client.patch(DEPLOYMENTS, name, namespace, {"status": status}, subresource="status")
        )
