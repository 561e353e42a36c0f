"""Definitions as OpenAPI documents have them."""

from __future__ import annotations

from typing import Any

from hypervisor.master.custom.structural import EITHER, EMBEDDED, PRESERVE
from hypervisor.master.kinds.kind import Kind
from hypervisor.master.schema.load import META

Json = dict[str, Any]
_NOT_IN_V2 = ("allOf", "anyOf", "oneOf", "not", "nullable")


def definitions_of(kind: Kind, *, v3: bool) -> dict[str, Json]:
    """The schema of a kind that a user has defined, and of its lists, under their names."""
    resource = kind.resource
    gvk = {"group": resource.group, "version": resource.version, "kind": resource.kind}
    own = _cooked(dict(kind.openapi or {}), v3)
    own["properties"] = {**(own.get("properties") or {}), **_names(META + "ObjectMeta")}
    own |= {"type": "object", "x-kubernetes-group-version-kind": [gvk]}
    listed = {
        "type": "object",
        "description": f"{resource.kind}List is a list of {resource.kind}",
        "required": ["items"],
        "properties": {
            **_names(META + "ListMeta"),
            "items": {"type": "array", "items": {"$ref": f"#/$defs/{kind.schema}"}},
        },
        "x-kubernetes-group-version-kind": [gvk | {"kind": kind.list_kind}],
    }
    return {kind.schema: own, f"{kind.schema}List": listed}


def _names(metadata: str) -> Json:
    return {
        "apiVersion": {"type": "string", "description": "The version of this representation of the object."},
        "kind": {"type": "string", "description": "The kind of this object."},
        "metadata": {"$ref": f"#/$defs/{metadata}"},
    }


def _cooked(schema: Json, v3: bool) -> Json:
    made = {key: value for key, value in schema.items() if v3 or key not in _NOT_IN_V2}
    if not v3 and (schema.get(EITHER) or schema.get(PRESERVE)):
        # Without types clients take anything there; kubectl's validation would refuse what the server takes.
        made.pop("type", None)
        made.pop("properties", None)
    if schema.get(EMBEDDED):
        made["properties"] = {**(schema.get("properties") or {}), **_names(META + "ObjectMeta")}
    if isinstance(made.get("properties"), dict):
        made["properties"] = {key: _cooked(value, v3) for key, value in made["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(made.get(key), dict):
            made[key] = _cooked(made[key], v3)
    return made
