"""ControllerRevisions: the templates that an owner has had, for its updates, `kubectl rollout history` and undo.

Source: Kubernetes, "DaemonSet" and "StatefulSets" (revision history).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hypervisor.errors import HvError
from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import CONTROLLER_REVISIONS, PODS, Resource
from hypervisor.master.controllers.base import Context, is_gone

HASH_LABEL = "controller-revision-hash"
"""Of pods and revisions; of a StatefulSet's pods the revision's whole name."""


class Revisions:
    """Of the owners of one kind."""

    def __init__(self, context: Context, resource: Resource) -> None:
        self._context = context
        self._resource = resource

    async def note(self, owner: Mapping[str, Any]) -> str:
        """The hash of the owner's template, which a revision keeps from now on."""
        data = {"spec": {"template": {**owner["spec"]["template"], "$patch": "replace"}}}
        digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:10]
        known = self._context.owned(CONTROLLER_REVISIONS, owner)
        mine = next((r for r in known if meta.labels_of(r).get(HASH_LABEL) == digest), None)
        number = max((int(r.get("revision") or 0) for r in known if r is not mine), default=0) + 1
        namespace = meta.key_of(owner)[0]
        if mine is None:
            await self._make(owner, digest, data, number)
        elif int(mine.get("revision") or 0) < number:
            await self._context.client.patch(
                CONTROLLER_REVISIONS, meta.key_of(mine)[1], namespace, {"revision": number}
            )
        await self._forget(owner, [r for r in known if r is not mine], digest)
        return digest

    def template(self, owner: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        """The template that a revision keeps; the owner's own where it is not there."""
        found = self._context.cached(CONTROLLER_REVISIONS, meta.key_of(owner)[0], name)
        kept: Mapping[str, Any] = meta.get(found or {}, "data", "spec", "template", default=owner["spec"]["template"])
        return {key: value for key, value in kept.items() if key != "$patch"}

    async def _make(self, owner: Mapping[str, Any], digest: str, data: Object, number: int) -> None:
        namespace, name = meta.key_of(owner)
        labels = meta.get(owner, "spec", "template", "metadata", "labels", default={})
        revision = {
            "apiVersion": "apps/v1",
            "kind": "ControllerRevision",
            "metadata": {
                "name": f"{name}-{digest}",
                "namespace": namespace,
                "labels": {**labels, HASH_LABEL: digest},
                "annotations": meta.get(owner, "metadata", "annotations", default={}),
                "ownerReferences": [meta.owner_reference(self._resource, owner)],
            },
            "data": data,
            "revision": number,
        }
        try:
            await self._context.client.create(CONTROLLER_REVISIONS, revision, namespace)
        except ApiError as e:
            if e.reason != "AlreadyExists":
                raise

    async def _forget(self, owner: Mapping[str, Any], old: Sequence[Mapping[str, Any]], digest: str) -> None:
        limit = int(meta.get(owner, "spec", "revisionHistoryLimit", default=10))
        used = {meta.labels_of(p).get(HASH_LABEL) for p in self._context.owned(PODS, owner)} | {digest}
        used.add(meta.get(owner, "status", "currentRevision", default=""))
        idle = [r for r in old if not {meta.labels_of(r).get(HASH_LABEL), meta.key_of(r)[1]} & used]
        idle.sort(key=lambda r: int(r.get("revision") or 0))
        for revision in idle[: max(0, len(idle) - limit)]:
            namespace, name = meta.key_of(revision)
            try:
                await self._context.client.delete(CONTROLLER_REVISIONS, name, namespace)
            except HvError as e:
                if not is_gone(e):
                    raise
