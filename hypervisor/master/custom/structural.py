"""Structural schemas: what a definition says of its objects, as types, as rules of its own, and its defaults.

Source: Kubernetes, "Extend the Kubernetes API with CustomResourceDefinitions" (structural schema, pruning, defaulting).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hypervisor.kube.errors import Cause
from hypervisor.master.kinds import rules
from hypervisor.master.patch.values import copy
from hypervisor.master.schema.load import META, Schema
from hypervisor.master.schema.types import AnyValue, ListOf, ListType, MapOf, Struct, Type

Json = Mapping[str, Any]
TYPES = ("array", "boolean", "integer", "number", "object", "string")
MAX_DEPTH = 64
PRESERVE = "x-kubernetes-preserve-unknown-fields"
EITHER = "x-kubernetes-int-or-string"
EMBEDDED = "x-kubernetes-embedded-resource"
_JUNCTORS = ("allOf", "anyOf", "oneOf")
_NOT_SERVED = ("$ref", "definitions", "dependencies", "id", "additionalItems", "patternProperties")


# ---- what a schema must be -------------------------------------------------------------------------------------------


def wrong(schema: Json, path: str) -> Iterator[Cause]:
    """Why a schema is not structural."""
    if schema.get("type") != "object":
        yield rules.invalid(f"{path}.type", schema.get("type", ""), "must be object at the root")
    metadata = (schema.get("properties") or {}).get("metadata") or {}
    extra = set(metadata.get("properties") or ()) - {"name", "generateName"}
    if extra:
        where = f"{path}.properties[metadata]"
        yield rules.forbidden(
            where, "must not specify anything other than name and generateName, but metadata is implicitly specified"
        )
    yield from _wrong(schema, path, 0)


def _wrong(schema: Json, path: str, depth: int) -> Iterator[Cause]:
    if depth > MAX_DEPTH:
        yield rules.invalid(path, "...", f"nested more than {MAX_DEPTH} levels deep")
        return
    for name in _NOT_SERVED:
        if schema.get(name):
            yield rules.forbidden(f"{path}.{name}", f"{name} is not supported")
    named = schema.get("type")
    if named not in TYPES and not schema.get(EITHER) and not (named is None and schema.get(PRESERVE)):
        yield rules.required(f"{path}.type", "must not be empty for specified object fields")
    items, properties, extra = schema.get("items"), schema.get("properties"), schema.get("additionalProperties")
    if named == "array" and not isinstance(items, dict):
        yield rules.required(f"{path}.items", "must be specified")
    if properties and extra:
        yield rules.forbidden(
            f"{path}.additionalProperties", "additionalProperties and properties are mutual exclusive"
        )
    yield from _wrong_list(schema, path)
    for junctor in _JUNCTORS:
        for index, part in enumerate(schema.get(junctor) or ()):
            yield from _no_types(part, f"{path}.{junctor}[{index}]", bool(schema.get(EITHER)))
    if "pattern" in schema:
        yield from _pattern(schema["pattern"], f"{path}.pattern")
    if isinstance(items, dict):
        yield from _wrong(items, f"{path}.items", depth + 1)
    if isinstance(extra, dict):
        yield from _wrong(extra, f"{path}.additionalProperties", depth + 1)
    for key, value in (properties or {}).items():
        yield from _wrong(value, f"{path}.properties[{key}]", depth + 1)


def _wrong_list(schema: Json, path: str) -> Iterator[Cause]:
    how, keys = schema.get("x-kubernetes-list-type"), schema.get("x-kubernetes-list-map-keys")
    if how is not None and how not in ("atomic", "set", "map"):
        yield rules.unsupported(f"{path}.x-kubernetes-list-type", how, ("atomic", "map", "set"))
    if how == "map" and not keys:
        yield rules.required(f"{path}.x-kubernetes-list-map-keys", "must not be empty if x-kubernetes-list-type is map")
    known = ((schema.get("items") or {}).get("properties") or {}) if isinstance(schema.get("items"), dict) else {}
    for key in keys or ():
        if key not in known:
            yield rules.invalid(
                f"{path}.x-kubernetes-list-map-keys", key, "entries must all be names of item properties"
            )


def _no_types(part: Json, path: str, either: bool) -> Iterator[Cause]:
    """What stands below allOf and the like checks values; it does not say of what type they are."""
    if part.get("type") and not either:
        yield rules.forbidden(f"{path}.type", "must be empty to be structural")
    if "default" in part:
        yield rules.forbidden(f"{path}.default", "must be undefined to be structural")


def _pattern(pattern: Any, path: str) -> Iterator[Cause]:
    import re

    try:
        re.compile(str(pattern))
    except re.error as error:
        yield rules.invalid(path, pattern, f"must be a valid regular expression: {error}")


def has_rules(schema: Any) -> bool:
    """Whether ``x-kubernetes-validations`` stand somewhere in it, which are not evaluated here."""
    if isinstance(schema, dict):
        return bool(schema.get("x-kubernetes-validations")) or any(has_rules(v) for v in schema.values())
    return isinstance(schema, list) and any(has_rules(v) for v in schema)


# ---- types -----------------------------------------------------------------------------------------------------------


def struct_of(schema: Json, name: str, published: Schema) -> Struct:
    """The type of the objects: what `conform` prunes by, and what server-side apply knows owners of."""
    made = _type(schema, name)
    fields = dict(made.fields) if isinstance(made, Struct) else {}
    fields |= _object_fields(published)
    preserve = bool(schema.get(PRESERVE)) or isinstance(made, AnyValue)
    return Struct(name, fields, preserve=preserve)


def _object_fields(published: Schema) -> dict[str, Type]:
    return {"apiVersion": AnyValue(), "kind": AnyValue(), "metadata": published.type_of(META + "ObjectMeta")}


def _type(schema: Json, name: str) -> Type:
    """Scalars are of any type here: `hypervisor.master.custom.validation` tells what is wrong with them."""
    items, properties, extra = schema.get("items"), schema.get("properties"), schema.get("additionalProperties")
    atomic = schema.get("x-kubernetes-map-type") == "atomic"
    if schema.get("type") == "array" and isinstance(items, dict):
        how: ListType = schema.get("x-kubernetes-list-type") or "atomic"
        return ListOf(_type(items, name), how, tuple(schema.get("x-kubernetes-list-map-keys") or ()))
    if schema.get("type") != "object":
        return AnyValue()
    if isinstance(extra, dict):
        return MapOf(_type(extra, name), atomic)
    if extra or (schema.get(PRESERVE) and not properties):
        return AnyValue()
    fields = {key: _type(value, f"{name}.{key}") for key, value in (properties or {}).items()}
    if schema.get(EMBEDDED):
        fields |= _object_fields(Schema.load())
    return Struct(name, fields, atomic=atomic, preserve=bool(schema.get(PRESERVE)))


# ---- defaults --------------------------------------------------------------------------------------------------------


def fill(value: Any, schema: Json) -> None:
    """Puts in every default for what is missing, in place."""
    if isinstance(value, dict):
        for key, below in (schema.get("properties") or {}).items():
            if value.get(key) is None and "default" in below and not (key in value and below.get("nullable")):
                value[key] = copy(below["default"])
            if key in value:
                fill(value[key], below)
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict):
            for item in value.values():
                fill(item, extra)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for item in value:
            fill(item, schema["items"])
