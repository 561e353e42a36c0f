"""What a client of the Kubernetes API can do, whether the server is in the same process or at the end of a connection.

`HttpApiClient` (`hypervisor.kube.http`) speaks to any API server, upstream's as well as this project's; the master's
own controllers use one that calls the server's inside.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from hypervisor.kube.resources import Resource

Object = dict[str, Any]
"""A Kubernetes object as JSON has it."""
PatchType = Literal["json", "merge", "strategic", "apply"]
Propagation = Literal["Background", "Foreground", "Orphan"]
WatchType = Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]


@dataclass(frozen=True, slots=True)
class ObjectList:
    """A page of a list. `resource_version` is where a watch goes on from; `continuation` is empty on the last page."""

    items: Sequence[Object]
    resource_version: str
    continuation: str = ""


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One change. An ``ERROR`` event of the wire is raised as `ApiError` instead."""

    type: WatchType
    object: Object


class ApiClient(Protocol):
    """Every method raises `hypervisor.kube.errors.ApiError` with the server's reason, and `Unavailable` when there is
    no answer. Objects given are not changed; objects returned are the caller's own, except those of `list` and `watch`,
    which may be shared and must not be changed.
    """

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object:
        """One object."""

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
        """Objects of all namespaces where none is given; items carry apiVersion and kind."""

    async def create(
        self,
        resource: Resource,
        obj: Mapping[str, Any],
        namespace: str | None = None,
        *,
        name: str = "",
        subresource: str = "",
    ) -> Object:
        """POST. `name` and `subresource` together reach ``pods/NAME/binding`` and its like."""

    async def update(self, resource: Resource, obj: Mapping[str, Any], *, subresource: str = "") -> Object:
        """PUT; name, namespace and (where set) resourceVersion are those of the object's metadata."""

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
        """DELETE, with preconditions where `uid` or `resource_version` is given. The answer: the object or a Status."""

    def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        resource_version: str = "",
        label_selector: str = "",
        field_selector: str = "",
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchEvent]]:
        """Changes after `resource_version`, bookmarks among them; the iterator ends when the server ends the watch.

        :raises ApiError: ``Expired`` when the version is too old: list again
        """
