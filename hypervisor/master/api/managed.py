"""``metadata.managedFields`` of requests: who has set which field, and server-side apply.

Source: Kubernetes, "Server-Side Apply".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypervisor.kube.client import Object
from hypervisor.kube.errors import bad_request
from hypervisor.master.api.call import Call
from hypervisor.master.api.fit import fit
from hypervisor.master.patch.apply import apply
from hypervisor.master.patch.track import track_update
from hypervisor.master.patch.values import copy
from hypervisor.master.schema.load import Schema
from hypervisor.master.schema.types import Struct


@dataclass(frozen=True, slots=True)
class Managed:
    """Keeps the record of ordinary writes."""

    schema: Schema

    def created(self, call: Call, obj: Object) -> None:
        """An object that is to be created; one that an apply makes has its record."""
        if call.manager:
            track_update(None, obj, call.manager, "Update", call.subresource, self.schema.of(call.kind))

    def updated(self, call: Call, new: Object, old: Mapping[str, Any]) -> None:
        """An object that is to replace another."""
        track_update(old, new, call.manager, "Update", call.subresource, self.schema.of(call.kind))


def applied(call: Call, given: Any, old: Object | None, kind: Struct, *, force: bool) -> Object:
    """What a server-side apply makes of an object; None: it is not there yet.

    :raises ApiError: Conflict: fields that others own, without `force`; BadRequest: no object of that kind
    """
    if not isinstance(given, dict):
        raise bad_request("an apply patch is an object, with apiVersion, kind and metadata.name")
    resource = call.kind.resource
    for key, wanted in (("apiVersion", resource.api_version), ("kind", resource.kind)):
        if given.get(key) != wanted:
            raise bad_request(f"invalid object type: {key} must be {wanted}, not {given.get(key)}")
    wish = copy(given)
    fit(call, kind, wish)
    reset = ("spec",) if call.subresource == "status" else ("status",) if call.kind.has_status else ()
    return apply(old, wish, call.manager, kind, force, subresource=call.subresource, reset=reset)
