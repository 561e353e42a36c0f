"""PATCH: the four content types, and what each makes of an object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypervisor.kube.client import Object, PatchType
from hypervisor.kube.errors import ApiError, bad_request
from hypervisor.master.api.call import Call
from hypervisor.master.api.fit import decode, media_type, note_doubles, unsupported
from hypervisor.master.api.managed import applied
from hypervisor.master.patch.json_patch import json_patch
from hypervisor.master.patch.merge_patch import merge_patch
from hypervisor.master.patch.strategic import strategic_merge
from hypervisor.master.schema.types import Struct

TYPES: dict[str, PatchType] = {
    "application/json-patch+json": "json",
    "application/merge-patch+json": "merge",
    "application/strategic-merge-patch+json": "strategic",
    "application/apply-patch+yaml": "apply",
}


@dataclass(frozen=True, slots=True)
class Patch:
    """:ivar force: an apply takes over fields that others own"""

    how: PatchType
    body: Any
    force: bool = False

    def _names(self, key: str) -> bool:
        metadata = self.body.get("metadata") if isinstance(self.body, dict) else None
        return bool(isinstance(metadata, dict) and metadata.get(key))

    @property
    def names_version(self) -> bool:
        """It only fits one resourceVersion."""
        return self._names("resourceVersion")

    @property
    def names_uid(self) -> bool:
        """It only fits one uid."""
        return self._names("uid")


def parse(call: Call, body: bytes, content_type: str, *, force: bool, manager: str) -> Patch:
    """The patch of a request.

    :param manager: as the request names it; an apply must
    :raises ApiError: UnsupportedMediaType, BadRequest
    """
    media = media_type(content_type)
    how = TYPES.get(media)
    if how is None or (how == "strategic" and call.kind.struct is not None):
        taken = [m for m, t in TYPES.items() if t != "strategic" or call.kind.struct is None]
        raise unsupported(media, tuple(taken))
    if how == "apply" and not manager:
        raise ApiError(
            "BadRequest",
            "PatchOptions.meta.k8s.io is invalid: fieldManager: Required value: is required for apply patch",
            code=400,
        )
    if force and how != "apply":
        raise bad_request("force is for apply patches only")
    value, doubles = decode(body, "application/yaml" if how == "apply" else "application/json")
    note_doubles(call, doubles)
    return Patch(how, value, force)


def patched(call: Call, patch: Patch, old: Object | None, kind: Struct) -> Object:
    """What the patch makes of an object; `old` stays as it is. None: an apply of an object that is not there.

    :raises ApiError: the patch does not fit
    """
    if patch.how == "apply":
        return applied(call, patch.body, old, kind, force=patch.force)
    if old is None:
        raise AssertionError("only an apply makes objects")
    if patch.how == "json":
        new = json_patch(old, patch.body)
    elif patch.how == "merge":
        new = merge_patch(old, patch.body)
    else:
        new = strategic_merge(old, patch.body, kind)
    if not isinstance(new, dict) or not isinstance(new.get("metadata"), dict):
        raise bad_request("the patch leaves no object with metadata")
    return new
