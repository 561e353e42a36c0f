"""Keeps the table of kinds, and the registry's memory, in step with the CustomResourceDefinitions in the store.

Theory of operation
-------------------
::

    created, changed --> names free? --no--> NamesAccepted False: not served
                            | yes
                            v
              objects read into memory --> rows in the table: served --> status: Established
    deletionTimestamp --> no new objects --> its objects deleted --> finalizer removed --> gone: rows and memory go

Every step is found again from what is stored: a server that starts does the same with each definition before it
listens. A changed definition's objects are read anew, so that all are seen pruned and with defaults by the schema as it
is now; their watchers list again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import structlog

from hypervisor.errors import HvError
from hypervisor.kube import meta
from hypervisor.kube.client import ApiClient, Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.informer import Handler, Informer, WorkQueue
from hypervisor.kube.resources import CRDS, Resource
from hypervisor.master.api import usage
from hypervisor.master.custom import structural
from hypervisor.master.custom.definition import FINALIZER, is_served, resource_of, rows_of, storage_version
from hypervisor.master.kinds.kind import Kind
from hypervisor.master.kinds.table import Kinds
from hypervisor.master.registry.registry import Registry

LOOK_AGAIN_S = 0.5
_log = structlog.get_logger()


class Catalog:
    """See the module. For one event loop."""

    def __init__(self, client: ApiClient, kinds: Kinds, registry: Registry) -> None:
        self._client = client
        self._kinds = kinds
        self._registry = registry
        self._active: dict[str, tuple[Any, Kind]] = {}

    async def start(self) -> None:
        """Serves every definition that is there."""
        for definition in (await self._client.list(CRDS)).items:
            await self._tried(str(definition["metadata"]["name"]))

    async def run(self) -> None:
        """Follows the definitions, for ever."""
        queue = WorkQueue[str]()
        following = Informer(self._client, CRDS)

        def put(obj: Object) -> None:
            queue.add(meta.key_of(obj)[1])

        following.add_handler(Handler(added=put, updated=lambda _, new: put(new), deleted=put))

        async def work(name: str) -> None:
            again = await self._sync(name)
            if again is not None:
                queue.add_after(name, again)

        async with asyncio.TaskGroup() as group:
            group.create_task(following.run(), name="definitions of kinds")
            group.create_task(queue.run(work, workers=2), name="kinds that users define")

    async def _tried(self, name: str) -> None:
        try:
            await self._sync(name)
        except HvError as error:
            _log.error("a definition cannot be served", definition=name, error=str(error))

    async def _sync(self, name: str) -> float | None:
        """One step for one definition; seconds until the next where one is left."""
        try:
            definition = await self._client.get(CRDS, name)
        except ApiError as error:
            if error.reason != "NotFound":
                raise
            await self._forget(name)
            return None
        taken = self._conflict(definition)
        if taken:
            await self._forget(name)
            await self._tell(definition, {"NamesAccepted": ("False", "Conflict", taken), "Established": _NOT_ACCEPTED})
            return None
        await self._serve(definition)
        if meta.is_deleting(definition):
            return await self._terminate(definition)
        await self._tell(definition, _established(definition))
        return None

    # ---- serving -----------------------------------------------------------------------------------------------------

    async def _serve(self, definition: Object) -> None:
        name, deleting = definition["metadata"]["name"], meta.is_deleting(definition)
        state = (definition["spec"], deleting)
        known = self._active.get(name)
        if known is not None and known[0] == state:
            return
        rows = [_row(definition, row, deleting) for row in rows_of(definition)]
        if known is None or known[0][0] != definition["spec"]:
            await self._registry.put_kind(rows[0])
        self._kinds.put(name, rows)
        self._active[name] = (state, rows[0])

    async def _forget(self, name: str) -> None:
        known = self._active.pop(name, None)
        if known is not None:
            self._kinds.drop(name)
            self._registry.drop_kind(known[1])

    def _conflict(self, definition: Object) -> str:
        """Which of its names another one has; empty: none."""
        spec, name = definition["spec"], definition["metadata"]["name"]
        group = spec["group"]
        if group in self._kinds.fixed_groups or group == usage.GROUP:
            return f"the group {group} is the server's own"
        others = [k for k in self._kinds if k.resource.group == group and k.resource.plural != spec["names"]["plural"]]
        mine = {str(n).lower() for n in _names(spec["names"])}
        for other in others:
            clash = mine & {n.lower() for n in (other.singular, other.resource.kind, *other.short_names)}
            if clash:
                return f'"{min(clash)}" is already in use by {other.resource.qualified}'
        return "" if name == f"{spec['names']['plural']}.{group}" else "its name is not that of its resource"

    async def _tell(self, definition: Object, wanted: Mapping[str, tuple[str, str, str]]) -> None:
        status = definition.get("status") or {}
        conditions = list(status.get("conditions") or ())
        for named, (state, reason, message) in wanted.items():
            made = {"type": named, "status": state, "reason": reason, "message": message}
            conditions = meta.with_condition(conditions, made)
        conditions = [c for c in conditions if c["type"] in wanted or c["type"] == "Terminating"]
        change: Object = {"conditions": conditions}
        if "Established" in wanted and wanted["Established"][0] == "True":
            stored, names = storage_version(definition), definition["spec"]["names"]
            change["acceptedNames"] = names
            change["storedVersions"] = [*dict.fromkeys([*(status.get("storedVersions") or ()), stored])]
        if any(status.get(key) != value for key, value in change.items()):
            await self._write_status(definition, {**status, **change})

    async def _write_status(self, definition: Object, status: Object) -> None:
        try:
            await self._client.update(CRDS, {**definition, "status": status}, subresource="status")
        except ApiError as error:
            if error.reason not in ("Conflict", "NotFound"):  # a newer one is on its way here
                raise

    # ---- the end -----------------------------------------------------------------------------------------------------

    async def _terminate(self, definition: Object) -> float | None:
        if FINALIZER not in (definition["metadata"].get("finalizers") or ()):
            return None
        resource = resource_of(definition, storage_version(definition))
        left = (await self._client.list(resource)).items
        for obj in left:
            if not meta.is_deleting(obj):
                await self._delete(resource, obj)
        if (await self._client.list(resource)).items:
            return LOOK_AGAIN_S  # their finalizers are somebody's
        rest = [f for f in definition["metadata"]["finalizers"] if f != FINALIZER]
        metadata = {"resourceVersion": meta.version_of(definition), "finalizers": rest or None}
        try:
            await self._client.patch(CRDS, definition["metadata"]["name"], None, {"metadata": metadata})
        except ApiError as error:
            if error.reason not in ("Conflict", "NotFound"):
                raise
            return LOOK_AGAIN_S
        return None

    async def _delete(self, resource: Resource, obj: Mapping[str, Any]) -> None:
        namespace, name = meta.key_of(obj)
        try:
            await self._client.delete(resource, name, namespace or None, uid=meta.uid_of(obj), propagation="Background")
        except ApiError as error:
            if error.reason not in ("Conflict", "NotFound"):
                raise


_NOT_ACCEPTED = ("False", "NotAccepted", "not all names are accepted")
_CHANGING = frozenset(("create", "patch", "update"))


def _row(definition: Object, row: Kind, deleting: bool) -> Kind:
    """A row as it is served: one that is not, or whose definition goes, takes no new objects."""
    row = replace(row, served=is_served(definition, row.resource.version))
    return replace(row, verbs=tuple(v for v in row.verbs if v != "create")) if deleting else row


def _names(names: Mapping[str, Any]) -> Iterable[str]:
    yield names["kind"]
    yield names.get("singular") or names["kind"]
    yield from names.get("shortNames") or ()


def _established(definition: Object) -> dict[str, tuple[str, str, str]]:
    found = {
        "NamesAccepted": ("True", "NoConflicts", "no conflicts found"),
        "Established": ("True", "InitialNamesAccepted", "the initial names have been accepted"),
    }
    if structural.has_rules(definition["spec"]):
        why = "x-kubernetes-validations are kept and not evaluated: objects that they forbid are accepted"
        found["RulesNotEvaluated"] = ("True", "NotSupported", why)
    return found
