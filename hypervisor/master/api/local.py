"""An `ApiClient` over the server's inside: for the master's own controllers and its scheduler.

No HTTP and no JSON in between; defaults, admission and validation are the same. The user is one, and is not authorized:
whoever holds this client is part of the server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from hypervisor.kube.client import Object, ObjectList, PatchType, Propagation, WatchEvent
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import Resource
from hypervisor.kube.selectors import parse_fields, parse_labels
from hypervisor.master.api import scale
from hypervisor.master.api.actions import ACTIONS
from hypervisor.master.api.call import Call
from hypervisor.master.api.inside import Inside
from hypervisor.master.api.objects import shown
from hypervisor.master.api.patching import Patch
from hypervisor.master.auth.user import AUTHENTICATED, SYSTEM_MASTERS, User
from hypervisor.master.kinds.kind import Kind
from hypervisor.master.patch.values import copy
from hypervisor.master.registry.deletion import DeleteOptions
from hypervisor.master.registry.watch import Watch

CONTROLLER = User("system:kube-controller-manager", (SYSTEM_MASTERS, AUTHENTICATED))


class LocalClient:
    """See the module and `ApiClient`. For the server's event loop.

    :param manager: the field manager of all writes
    """

    def __init__(self, inside: Inside, user: User = CONTROLLER, *, manager: str = "kube-controller-manager") -> None:
        self._inside = inside
        self._user = user
        self._manager = manager

    def _call(self, resource: Resource, namespace: str | None, name: str = "", subresource: str = "") -> Call:
        kind = self._kind(resource)
        place = (namespace or "") if resource.namespaced else ""
        return Call(self._user, kind, place, name, subresource, validation="Ignore", manager=self._manager)

    def _kind(self, resource: Resource) -> Kind:
        kind = self._inside.kinds.get(resource.group, resource.version, resource.plural)
        if kind is None:
            raise ApiError("NotFound", "the server could not find the requested resource")
        return kind

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object:
        """One object."""
        return await self._inside.objects.get(self._call(resource, namespace, name))

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        limit: int = 0,
        continuation: str = "",
    ) -> ObjectList:
        """Shared objects: not to be changed."""
        kind, objects = self._kind(resource), self._inside.objects
        listing = await objects.registry.list(
            objects.kept(kind),
            namespace or "",
            label=parse_labels(label_selector),
            field=parse_fields(field_selector),
            limit=limit,
            continuation=continuation,
        )
        return ObjectList([shown(kind, o) for o in listing.items], str(listing.revision), listing.continuation)

    async def create(
        self,
        resource: Resource,
        obj: Mapping[str, Any],
        namespace: str | None = None,
        *,
        name: str = "",
        subresource: str = "",
    ) -> Object:
        """POST."""
        given = copy(dict(obj))
        if resource.namespaced and namespace is None:
            namespace = str((given.get("metadata") or {}).get("namespace") or "")
        call = self._call(resource, namespace, name, subresource)
        if not subresource:
            return await self._inside.objects.create(call, given)
        action = ACTIONS.get((resource.qualified, subresource))
        if action is None:
            raise ApiError("NotFound", "the server could not find the requested resource")
        return dict(await action(self._inside, call, given))

    async def update(self, resource: Resource, obj: Mapping[str, Any], *, subresource: str = "") -> Object:
        """PUT."""
        given = copy(dict(obj))
        metadata = given["metadata"]
        call = self._call(resource, metadata.get("namespace"), metadata["name"], subresource)
        if subresource == "scale":
            return await scale.update(self._inside.objects, call, given)
        new, _ = await self._inside.objects.update(call, given)
        return new

    async def patch(
        self,
        resource: Resource,
        name: str,
        namespace: str | None,
        patch: Any,
        *,
        how: PatchType = "merge",
        subresource: str = "",
        field_manager: str = "",
        force: bool = False,
    ) -> Object:
        """PATCH."""
        call = self._call(resource, namespace, name, subresource)
        call = replace(call, manager=field_manager) if field_manager else call
        parsed = Patch(how, patch, force)
        if subresource == "scale":
            return await scale.patch(self._inside.objects, call, parsed)
        new, _ = await self._inside.objects.patch(call, parsed)
        return new

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None = None,
        *,
        grace_s: int | None = None,
        propagation: Propagation | None = None,
        uid: str = "",
        resource_version: str = "",
    ) -> Object:
        """DELETE."""
        options = DeleteOptions(grace_s, propagation, uid, resource_version)
        return (await self._inside.objects.delete(self._call(resource, namespace, name), options)).object

    @asynccontextmanager
    async def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        resource_version: str = "",
        label_selector: str = "",
        field_selector: str = "",
    ) -> AsyncIterator[AsyncIterator[WatchEvent]]:
        """Shared objects: not to be changed."""
        kind, objects = self._kind(resource), self._inside.objects
        following = objects.registry.watch(
            objects.kept(kind),
            namespace or "",
            label=parse_labels(label_selector),
            field=parse_fields(field_selector),
            resource_version=resource_version,
            bookmarks=True,
        )
        async with following as events:
            yield _events(kind, events)


async def _events(kind: Kind, events: Watch) -> AsyncIterator[WatchEvent]:
    while True:
        for event in await events.batch():
            yield WatchEvent(event.type, shown(kind, event.object))
