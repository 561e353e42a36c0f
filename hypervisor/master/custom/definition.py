"""A CustomResourceDefinition as rows of the table of kinds: one for each version that is served.

All versions hold the same object; only ``apiVersion`` differs (conversion ``None``). The storage version's row keeps
the objects, the others show them in their own form (`Kind.kept_as`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from hypervisor.kube.errors import Cause
from hypervisor.kube.resources import Resource
from hypervisor.master.custom import structural, validation
from hypervisor.master.custom.columns import columns_of
from hypervisor.master.kinds.kind import Kind, Object, ScalePaths
from hypervisor.master.patch.values import copy
from hypervisor.master.schema.conform import conform
from hypervisor.master.schema.load import Schema
from hypervisor.master.schema.types import Struct

FINALIZER = "customresourcecleanup.apiextensions.k8s.io"
_VERSION = re.compile(r"v(\d+)(?:(alpha|beta)(\d+))?")
_RANK = {"alpha": 0, "beta": 1, None: 2}


def priority(version: str) -> tuple[int, ...] | tuple[int, str]:
    """Sorts versions as clients prefer them: stable ones first, then by number; others last, by name."""
    found = _VERSION.fullmatch(version)
    if found is None:
        return (1, version)
    return (0, -_RANK[found[2]], -int(found[1]), -int(found[3] or 0))


def storage_version(definition: Mapping[str, Any]) -> str:
    """The version in which objects are stored."""
    return next(str(v["name"]) for v in definition["spec"]["versions"] if v.get("storage"))


def resource_of(definition: Mapping[str, Any], version: str) -> Resource:
    """Its resource in a version."""
    spec = definition["spec"]
    names = spec["names"]
    return Resource(spec["group"], version, names["plural"], names["kind"], spec.get("scope") == "Namespaced")


def rows_of(definition: Mapping[str, Any]) -> list[Kind]:
    """Its rows, the storage version's first (which is there though it may not be served: `is_served`)."""
    stored = storage_version(definition)
    kept = resource_of(definition, stored)
    versions = sorted(definition["spec"]["versions"], key=lambda v: (v["name"] != stored, priority(v["name"])))
    return [_row(definition, v, kept) for v in versions if v.get("served") or v["name"] == stored]


def is_served(definition: Mapping[str, Any], version: str) -> bool:
    """Whether clients may use a version."""
    return any(v["name"] == version and v.get("served") for v in definition["spec"]["versions"])


def openapi_name(group: str, version: str, kind: str) -> str:
    """The name of a kind's definition in OpenAPI documents."""
    return ".".join([*reversed(group.split(".")), version, kind])


def _row(definition: Mapping[str, Any], version: Mapping[str, Any], kept: Resource) -> Kind:
    spec = definition["spec"]
    names, resource = spec["names"], resource_of(definition, version["name"])
    schema: Mapping[str, Any] = (version.get("schema") or {}).get("openAPIV3Schema") or {"type": "object"}
    name = openapi_name(resource.group, resource.version, resource.kind)
    struct = structural.struct_of(schema, name, Schema.load())
    subresources = version.get("subresources") or {}
    shape = functools.partial(_shaped, schema, struct, resource)
    same = kept == resource
    return Kind(
        resource,
        names.get("singular") or names["kind"].lower(),
        name,
        tuple(names.get("shortNames") or ()),
        tuple(names.get("categories") or ()),
        subresources=tuple(s for s in ("scale", "status") if s in subresources),
        columns=columns_of(version.get("additionalPrinterColumns") or ()),
        selectable=tuple(f["jsonPath"].removeprefix(".") for f in version.get("selectableFields") or ()),
        default=functools.partial(_fill, schema),
        validate=functools.partial(_check, schema),
        kept_as=None if same else kept,
        to_kept=functools.partial(_typed, kept),
        from_kept=shape,
        scale=_scale_paths(subresources.get("scale") or {}),
        struct=struct,
        read=shape if same else None,
        openapi=schema,
    )


def _fill(schema: Mapping[str, Any], obj: Object) -> None:
    structural.fill(obj, schema)


def _check(schema: Mapping[str, Any], obj: Mapping[str, Any]) -> Iterable[Cause]:
    return validation.check(obj, schema)


def _typed(resource: Resource, obj: Mapping[str, Any]) -> Object:
    return {**obj, "apiVersion": resource.api_version, "kind": resource.kind}


def _shaped(schema: Mapping[str, Any], struct: Struct, resource: Resource, obj: Mapping[str, Any]) -> Object:
    """A stored object as its schema has it now: pruned, with its defaults. It may be older than the schema."""
    metadata = obj["metadata"]
    shaped = {k: v for k, v in copy(dict(obj)).items() if k != "metadata"}
    conform(shaped, struct)
    structural.fill(shaped, schema)
    return {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata} | {
        k: v for k, v in shaped.items() if k not in ("apiVersion", "kind")
    }


def _scale_paths(scale: Mapping[str, Any]) -> ScalePaths:
    def steps(field: str) -> tuple[str, ...]:
        return tuple(str(scale.get(field) or "").removeprefix(".").split(".")) if scale.get(field) else ()

    return ScalePaths(steps("specReplicasPath"), steps("statusReplicasPath"), steps("labelSelectorPath"))
