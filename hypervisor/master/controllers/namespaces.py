"""Namespaces that are being deleted: everything in them goes first.

Source: Kubernetes, "Namespaces" and its finalizer ``kubernetes`` in ``spec.finalizers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import NAMESPACES, PODS, Resource
from hypervisor.master.controllers.base import Context, own_key, unless_gone

LOOK_AGAIN_S = 1.0


class NamespaceController:
    """Theory of operation: Active -> Terminating (API server) -> emptied, again and again -> finalized -> gone."""

    name = "namespace"

    def __init__(self, context: Context) -> None:
        self._context = context
        self.watches = {NAMESPACES: own_key}

    async def sync(self, key: Key) -> float | None:
        """One turn for one namespace."""
        namespace = self._context.cached(NAMESPACES, "", key[1])
        if namespace is None or not meta.is_deleting(namespace):
            return None
        left = await self._empty(key[1])
        if left:
            await self._tell(namespace, left)
            return LOOK_AGAIN_S
        await self._finalize(namespace)
        return None

    async def _empty(self, name: str) -> dict[str, int]:
        """Deletes what is there; gives what is still there, by kind."""
        left: dict[str, int] = {}
        kinds = [r for r in tuple(self._context.caches) if r.namespaced]
        for resource in sorted(kinds, key=lambda r: r == PODS):  # owners before their pods: nothing is made anew
            # The API server is asked, not the cache: a namespace may only go when it is empty indeed.
            found = (await self._context.client.list(resource, name)).items
            for obj in found:
                await self._delete(resource, obj)
            if found:
                left[resource.qualified] = len(found)
        return left

    async def _delete(self, resource: Resource, obj: Mapping[str, Any]) -> None:
        if meta.is_deleting(obj):
            return
        namespace, name = meta.key_of(obj)
        await unless_gone(
            self._context.client.delete(resource, name, namespace, uid=meta.uid_of(obj), propagation="Background")
        )

    async def _tell(self, namespace: Mapping[str, Any], left: Mapping[str, int]) -> None:
        listed = ", ".join(f"{name} has {count} resource instances" for name, count in sorted(left.items()))
        condition = {
            "type": "NamespaceContentRemaining",
            "status": "True",
            "reason": "SomeResourcesRemain",
            "message": f"Some resources are remaining: {listed}",
        }
        known = meta.get(namespace, "status", "conditions", default=())
        wanted = meta.with_condition(known, condition)
        if wanted == list(known):
            return
        patch = {"status": {"conditions": wanted}}
        name = meta.key_of(namespace)[1]
        await unless_gone(self._context.client.patch(NAMESPACES, name, None, patch, subresource="status"))

    async def _finalize(self, namespace: Mapping[str, Any]) -> None:
        rest = [f for f in meta.get(namespace, "spec", "finalizers", default=()) if f != "kubernetes"]
        obj = {**namespace, "spec": {**(namespace.get("spec") or {}), "finalizers": rest}}
        await unless_gone(self._context.client.update(NAMESPACES, obj, subresource="finalize"))
