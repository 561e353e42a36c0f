"""``metadata.managedFields`` of requests: who has set which field, and server-side apply.

Source: Kubernetes, "Server-Side Apply".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypervisor.kube.client import Object
from hypervisor.kube.errors import ApiError
from hypervisor.master.api.call import Call
from hypervisor.master.schema.load import Schema
from hypervisor.master.schema.types import Struct


@dataclass(frozen=True, slots=True)
class Managed:
    """Keeps the record of ordinary writes."""

    schema: Schema

    def created(self, call: Call, obj: Object) -> None:
        """An object that is to be created."""

    def updated(self, call: Call, new: Object, old: Mapping[str, Any], *, patch: bool) -> None:
        """An object that is to replace another."""


def applied(call: Call, given: Any, old: Object | None, kind: Struct, *, force: bool) -> Object:
    """What a server-side apply makes of an object; None: it is not there yet.

    :raises ApiError: Conflict: fields that others own, without `force`
    """
    raise ApiError("UnsupportedMediaType", "server-side apply is not served yet")
