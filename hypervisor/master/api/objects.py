"""What requests do to objects, without HTTP: checks, defaults, admission, validation, then the registry.

A change passes in this order, as upstream has it: decoded and fitted to its type (`fit`) -> the parts that this request
may not set are taken from what is stored -> defaults -> admission -> validation -> managedFields -> registry. A change
that loses a race is made again on the newest object, all steps of it, unless it named a resourceVersion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from hypervisor.kube.client import Object, PatchType
from hypervisor.kube.errors import ApiError, Cause, bad_request, conflict, invalid
from hypervisor.kube.selectors import FieldSelector, LabelSelector
from hypervisor.master.admission.plugin import AdmissionRequest, Chain, Operation
from hypervisor.master.api.call import Call
from hypervisor.master.api.fit import fit
from hypervisor.master.api.managed import Managed
from hypervisor.master.api.patching import Patch, patched
from hypervisor.master.kinds import strategy
from hypervisor.master.kinds.kind import Kind
from hypervisor.master.kinds.table import Kinds
from hypervisor.master.patch.values import copy
from hypervisor.master.registry.deletion import Deleted, DeleteOptions
from hypervisor.master.registry.registry import Registry
from hypervisor.master.schema.load import Schema

CREATED_BY_PUT = frozenset(
    (
        "events",
        "leases.coordination.k8s.io",
        "endpoints",
        "services",
        "roles.rbac.authorization.k8s.io",
        "rolebindings.rbac.authorization.k8s.io",
        "clusterroles.rbac.authorization.k8s.io",
        "clusterrolebindings.rbac.authorization.k8s.io",
    )
)
"""Where upstream makes a PUT of what is not there a create."""
_STATUS_ON_CREATE = frozenset(("nodes",))


@dataclass(frozen=True, slots=True)
class Objects:
    """For one event loop. Every method raises `ApiError`; objects given may be changed."""

    kinds: Kinds
    registry: Registry
    schema: Schema
    admission: Chain
    managed: Managed

    def kept(self, kind: Kind) -> Kind:
        """The kind as which its objects are stored."""
        return kind if kind.kept_as is None else self.kinds.of(kind.kept_as)

    async def get(self, call: Call, *, resource_version: str = "") -> Object:
        """One object, the caller's own."""
        found = await self.registry.get(
            self.kept(call.kind), call.namespace, call.name, resource_version=resource_version
        )
        return shown(call.kind, found)

    async def create(self, call: Call, obj: Object) -> Object:
        """A new object."""
        kind = call.kind
        _identify(call, obj)
        fit(call, self.schema.of(kind), obj)
        status = obj.get("status") if kind.resource.qualified in _STATUS_ON_CREATE else None
        strategy.prepare_create(kind, obj)
        uid = str(obj["metadata"]["uid"])
        if status is not None:
            obj["status"] = status
        with settling(call):
            await self._admit("CREATE", call, obj, None)
            _refuse(kind, obj, strategy.check(kind, obj))
            self.managed.created(call, obj)
            made = await self.registry.create(
                self.kept(kind), stored(kind, obj), call.namespace, dry_run=call.dry_run, uid=uid
            )
            call.settle(_revision(made))
        return shown(kind, made)

    async def update(self, call: Call, obj: Object) -> tuple[Object, bool]:
        """Replaces an object, or makes it where the kind allows that; True: made."""
        _identify(call, obj)
        fit(call, self.schema.of(call.kind), obj)

        async def change(live: Object) -> Object:
            return await self._change(call, copy(obj), shown(call.kind, live))

        return await self._update_or_create(call, change, obj)

    async def _update_or_create(self, call: Call, change: Any, obj: Object) -> tuple[Object, bool]:
        kept = self.kept(call.kind)
        try:
            with settling(call):
                new = await self.registry.update(kept, call.namespace, call.name, change, dry_run=call.dry_run)
                call.settle(_revision(new))
        except ApiError as e:
            allowed = call.kind.resource.qualified in CREATED_BY_PUT and not call.subresource
            if e.reason != "NotFound" or not allowed:
                raise
            if obj["metadata"].get("resourceVersion"):
                raise _gone(call) from e
            obj["metadata"]["name"] = call.name
            return await self.create(call, obj), True
        return shown(call.kind, new), False

    async def patch(self, call: Call, patch: Patch) -> tuple[Object, bool]:
        """Changes an object by a patch; True: an apply has made it."""
        kind = self.schema.of(call.kind)

        async def change(live: Object) -> Object:
            old = shown(call.kind, live)
            new = patched(call, patch, old, kind)
            _identify(call, new)
            fit(call, kind, new)
            return await self._change(call, new, old, how=patch.how)

        try:
            with settling(call):
                new = await self.registry.update(
                    self.kept(call.kind), call.namespace, call.name, change, dry_run=call.dry_run
                )
                call.settle(_revision(new))
        except ApiError as e:
            if e.reason != "NotFound" or patch.how != "apply" or call.subresource:
                raise
            if patch.names_version or patch.names_uid:
                raise _gone(call) from e
            return await self._apply_new(call, patch), True
        return shown(call.kind, new), False

    async def _apply_new(self, call: Call, patch: Patch) -> Object:
        obj = patched(call, patch, None, self.schema.of(call.kind))
        return await self.create(replace(call, manager=""), obj)

    async def _change(self, call: Call, new: Object, old: Object, *, how: PatchType | None = None) -> Object:
        """What is to be stored in place of `old`."""
        kind = call.kind
        strategy.prepare_update(kind, new, old, call.subresource)
        await self._admit("UPDATE", call, new, old)
        _refuse(kind, new, strategy.check_update(kind, new, old, call.subresource))
        if how != "apply":
            self.managed.updated(call, new, old)
        return stored(kind, new)

    async def delete(self, call: Call, options: DeleteOptions) -> Deleted:
        """Removes an object, or marks it."""
        kept = self.kept(call.kind)
        if self.admission.concerned("DELETE", call.kind):
            old = await self.registry.get(kept, call.namespace, call.name)
            await self._admit("DELETE", call, {}, old)
        deleted = await self.registry.delete(kept, call.namespace, call.name, options)
        return Deleted(shown(call.kind, deleted.object), deleted.removed)

    async def delete_collection(
        self, call: Call, options: DeleteOptions, label: LabelSelector, field: FieldSelector
    ) -> list[Object]:
        """Deletes all that match; gives them as they were. What others delete meanwhile is no error."""
        listing = await self.registry.list(self.kept(call.kind), call.namespace, label=label, field=field)
        for obj in listing.items:
            metadata = obj["metadata"]
            one = replace(call, name=metadata["name"], namespace=metadata.get("namespace", ""))
            try:
                await self.delete(one, options)
            except ApiError as e:
                if e.reason != "NotFound":
                    raise
        return [shown(call.kind, o) for o in listing.items]

    async def _admit(self, operation: Operation, call: Call, obj: Object, old: Mapping[str, Any] | None) -> None:
        if self.admission.concerned(operation, call.kind):
            name = call.name or str((obj.get("metadata") or {}).get("name") or "")
            await self.admission.admit(
                AdmissionRequest(
                    operation,
                    call.kind,
                    call.user,
                    call.namespace,
                    name,
                    obj,
                    old,
                    call.subresource,
                    call.dry_run,
                    call.holds,
                )
            )

    async def connect(self, call: Call) -> None:
        """Asks admission for a stream into an object (exec and the like)."""
        await self._admit("CONNECT", call, {}, None)

    async def admit_action(self, call: Call, body: Object) -> None:
        """Asks admission for what is posted to a subresource."""
        await self._admit("CREATE", call, body, None)


@contextmanager
def settling(call: Call) -> Iterator[None]:
    """What admission holds for a request is let go when it fails; where nobody knows whether it did, later."""
    try:
        yield
    except ApiError as error:
        call.settle("unknown" if error.code >= 500 else "refused")
        raise
    except BaseException:
        call.settle("unknown")
        raise


def _revision(obj: Mapping[str, Any]) -> int:
    return int(obj["metadata"].get("resourceVersion") or 0)  # none of a dry run


def _refuse(kind: Kind, obj: Object, causes: Sequence[Cause]) -> None:
    """:raises ApiError: Invalid, with every cause"""
    if causes:
        metadata = obj["metadata"]
        name = str(metadata.get("name") or metadata.get("generateName") or "")
        raise invalid(kind.resource.group, kind.resource.kind, name, causes)


def shown(kind: Kind, obj: Object) -> Object:
    """A stored object in the form of the kind that was asked for."""
    return obj if kind.kept_as is None else _typed(kind, kind.from_kept(obj))


def stored(kind: Kind, obj: Object) -> Object:
    """An object in the form in which it is stored."""
    return obj if kind.kept_as is None else kind.to_kept(obj)


def _typed(kind: Kind, obj: Object) -> Object:
    return {**obj, "apiVersion": kind.resource.api_version, "kind": kind.resource.kind}


def _gone(call: Call) -> ApiError:
    """409: a precondition on an object that is not there."""
    resource = call.kind.resource
    why = "StorageError: invalid object, Code: 4: Precondition failed: the object does not exist"
    return conflict(resource.group, resource.plural, call.name, why)


def _identify(call: Call, obj: Object) -> None:
    """Completes type, namespace and name from the request.

    :raises ApiError: the object says otherwise
    """
    resource = call.kind.resource
    for key, wanted in (("apiVersion", resource.api_version), ("kind", resource.kind)):
        given = obj.setdefault(key, wanted)
        if given != wanted:
            raise bad_request(f'the {key} in the data ("{given}") does not match the expected one ("{wanted}")')
    metadata = obj.setdefault("metadata", {})
    if not isinstance(metadata, dict):
        raise bad_request("metadata must be an object")
    given = metadata.get("namespace")
    if call.namespace and given and given != call.namespace:
        raise bad_request(
            "the namespace of the provided object does not match the namespace sent on the request: "
            f'"{given}" is not "{call.namespace}"'
        )
    if call.namespace:
        metadata["namespace"] = call.namespace
    if call.name and metadata.setdefault("name", call.name) != call.name:
        raise bad_request(
            f"the name of the object ({metadata['name']}) does not match the name on the URL ({call.name})"
        )
