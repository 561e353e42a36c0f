"""Garbage collection: objects whose owners are gone go too.

Theory of operation
-------------------
A graph of all objects by uid, fed by every cache, says who owns what. A change puts the object and what it owns to
work::

    all owners gone (asked of the API server, not only of the graph) --> deleted in the background
    some owners gone                                                 --> their references removed
    deletionTimestamp and finalizer foregroundDeletion               --> dependents deleted; then finalizer removed
    deletionTimestamp and finalizer orphan                           --> dependents let go; then finalizer removed

Source: Kubernetes, "Garbage Collection: Cascading deletion".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from hypervisor.errors import HvError
from hypervisor.kube import meta
from hypervisor.kube.client import Propagation
from hypervisor.kube.errors import ApiError
from hypervisor.kube.informer import Handler
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import Resource
from hypervisor.master.controllers.base import Context, is_gone

FOREGROUND, ORPHAN = "foregroundDeletion", "orphan"

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Place:
    """Where an object is, as far as the graph has seen it."""

    resource: Resource
    key: Key


class GarbageCollector:
    """Its keys are uids, as ``("", uid)``."""

    name = "garbage"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._places: dict[str, Place] = {}
        self._dependents: dict[str, set[str]] = {}
        self._owners: dict[str, set[str]] = {}
        self.watches: Mapping[Resource, Callable[[Mapping[str, Any]], Iterable[Key]]] = {
            resource: self._noting(resource) for resource in context.caches
        }

    def noting(self, resource: Resource, put: Callable[[Key], None]) -> Handler:
        """For the informer of one more resource: what it tells goes into the graph, and to work."""
        keys = self._noting(resource)

        def note(obj: Mapping[str, Any]) -> None:
            for key in keys(obj):
                put(key)

        return Handler(added=note, updated=lambda _, new: note(new), deleted=note)

    # ---- the graph ---------------------------------------------------------------------------------------------------

    def _noting(self, resource: Resource) -> Callable[[Mapping[str, Any]], Iterable[Key]]:
        def keys(obj: Mapping[str, Any]) -> Iterable[Key]:
            uid, key = meta.uid_of(obj), meta.key_of(obj)
            cache = self._context.caches.get(resource)
            there = cache.store.get(key) if cache else None
            if there is None or meta.uid_of(there) != uid:
                return self._note_gone(uid)
            return self._note(uid, Place(resource, key), there)

        return keys

    def _note(self, uid: str, place: Place, obj: Mapping[str, Any]) -> list[Key]:
        self._places[uid] = place
        owners = {str(o.get("uid")) for o in meta.owners_of(obj)}
        self._set_owners(uid, owners)
        # Everything without an owner, a finalizer of ours, or dependents is nobody's business here.
        worth = owners or (meta.is_deleting(obj) and {FOREGROUND, ORPHAN} & set(_finalizers(obj)))
        return [("", uid)] if worth else []

    def _note_gone(self, uid: str) -> list[Key]:
        self._places.pop(uid, None)
        owners = self._owners.get(uid, set())
        self._set_owners(uid, set())
        return [("", u) for u in (*self._dependents.get(uid, ()), *owners)]

    def _set_owners(self, uid: str, owners: set[str]) -> None:
        for owner in self._owners.pop(uid, set()) - owners:
            self._dependents[owner].discard(uid)
            if not self._dependents[owner]:
                del self._dependents[owner]
        if owners:
            self._owners[uid] = owners
            for owner in owners:
                self._dependents.setdefault(owner, set()).add(uid)

    def _object(self, uid: str) -> Mapping[str, Any] | None:
        place = self._places.get(uid)
        cache = self._context.caches.get(place.resource) if place else None
        obj = cache.store.get(place.key) if place and cache else None
        return obj if obj is not None and meta.uid_of(obj) == uid else None

    # ---- one object --------------------------------------------------------------------------------------------------

    async def sync(self, key: Key) -> float | None:
        """One turn for one object."""
        uid = key[1]
        obj, place = self._object(uid), self._places.get(uid)
        if obj is None or place is None:
            return None
        finalizers = _finalizers(obj)
        if meta.is_deleting(obj) and ORPHAN in finalizers:
            await self._orphan(uid, obj, place)
        elif meta.is_deleting(obj) and FOREGROUND in finalizers:
            await self._foreground(uid, obj, place)
        elif meta.owners_of(obj) and not meta.is_deleting(obj):
            await self._attempt(obj, place)
        return None

    async def _attempt(self, obj: Mapping[str, Any], place: Place) -> None:
        """Deletes what nobody owns any more."""
        owners = meta.owners_of(obj)
        states = [await self._owner_state(o, place.key[0]) for o in owners]
        if all(s == "gone" for s in states):
            await self._delete(obj, place, "Background")
        elif "gone" in states and "there" in states:
            kept = [o for o, s in zip(owners, states, strict=True) if s != "gone"]
            await self._set_references(obj, place, kept)
        elif "there" not in states and "waits" in states:
            # Its owners are being deleted in the foreground: so is it, with what it owns itself.
            await self._delete(obj, place, "Foreground" if self._dependents.get(meta.uid_of(obj)) else "Background")

    async def _owner_state(self, owner: Mapping[str, Any], namespace: str) -> str:
        """``there``, ``gone``, ``waits`` (deleted in the foreground) or ``unknown`` (a kind that is not served)."""
        uid = str(owner.get("uid"))
        found: Mapping[str, Any] | str | None = self._object(uid) or await self._ask(owner, namespace)
        if not isinstance(found, Mapping):
            return str(found)
        if meta.is_deleting(found) and FOREGROUND in _finalizers(found):
            return "waits"
        return "there"

    async def _ask(self, owner: Mapping[str, Any], namespace: str) -> Mapping[str, Any] | str:
        resource = self._resource(str(owner.get("apiVersion")), str(owner.get("kind")))
        if resource is None:
            return "unknown"
        try:
            scope = namespace if resource.namespaced else None
            found = await self._context.client.get(resource, str(owner.get("name")), scope)
        except ApiError as e:
            if e.reason == "NotFound":
                return "gone"
            raise
        return found if meta.uid_of(found) == owner.get("uid") else "gone"

    def _resource(self, api_version: str, kind: str) -> Resource | None:
        group, _, version = api_version.rpartition("/")
        of_kind = [r for r in self._context.caches if (r.group, r.kind) == (group, kind)]
        # A version in which objects are not stored is as good a way to them.
        exact = [r for r in of_kind if r.version == version]
        return next(iter(exact or of_kind), None)

    async def _foreground(self, uid: str, obj: Mapping[str, Any], place: Place) -> None:
        blocking = 0
        for dependent in list(self._dependents.get(uid, ())):
            found, where = self._object(dependent), self._places.get(dependent)
            if found is None or where is None:
                continue
            blocking += any(o.get("uid") == uid and o.get("blockOwnerDeletion") for o in meta.owners_of(found))
            if not meta.is_deleting(found):
                await self._attempt(found, where)
        if not blocking:
            await self._drop_finalizer(obj, place, FOREGROUND)

    async def _orphan(self, uid: str, obj: Mapping[str, Any], place: Place) -> None:
        for dependent in list(self._dependents.get(uid, ())):
            found, where = self._object(dependent), self._places.get(dependent)
            if found is not None and where is not None:
                kept = [o for o in meta.owners_of(found) if o.get("uid") != uid]
                await self._set_references(found, where, kept)
        await self._drop_finalizer(obj, place, ORPHAN)

    # ---- calls -------------------------------------------------------------------------------------------------------

    async def _delete(self, obj: Mapping[str, Any], place: Place, propagation: Propagation) -> None:
        namespace, name = place.key
        # Only this very state: it may have found another owner meanwhile.
        call = self._context.client.delete(
            place.resource,
            name,
            namespace or None,
            uid=meta.uid_of(obj),
            resource_version=meta.version_of(obj),
            propagation=propagation,
        )
        await _unless_missing(call)
        log.info("owner gone: deleted", kind=place.resource.kind, object=meta.shown(place.key))

    async def _set_references(self, obj: Mapping[str, Any], place: Place, kept: list[Mapping[str, Any]]) -> None:
        namespace, name = place.key
        metadata = {
            "uid": meta.uid_of(obj),
            "resourceVersion": meta.version_of(obj),
            "ownerReferences": kept or None,
        }
        patch = self._context.client.patch(place.resource, name, namespace or None, {"metadata": metadata})
        await _unless_missing(patch)

    async def _drop_finalizer(self, obj: Mapping[str, Any], place: Place, finalizer: str) -> None:
        namespace, name = place.key
        rest = [f for f in _finalizers(obj) if f != finalizer]
        metadata = {"uid": meta.uid_of(obj), "resourceVersion": meta.version_of(obj), "finalizers": rest or None}
        patch = self._context.client.patch(place.resource, name, namespace or None, {"metadata": metadata})
        await _unless_missing(patch)


def _finalizers(obj: Mapping[str, Any]) -> list[str]:
    return list(meta.get(obj, "metadata", "finalizers", default=()))


async def _unless_missing(call: Any) -> None:
    """A conflict is raised: the key comes again, and the newer state is looked at."""
    try:
        await call
    except HvError as e:
        if not (is_gone(e) and isinstance(e, ApiError) and e.reason == "NotFound"):
            raise
