"""The published OpenAPI schema, from the newest release that the distribution ``kubernetes-validate`` carries.

Of its 860 definitions only those that somebody asks for become nodes; the prose is read anew where it is wanted
(`definitions`), so that a server keeps a megabyte of types and not ten of text. Reading takes 15 ms.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, Protocol

from hypervisor.kube.published import newest
from hypervisor.master.schema.types import AnyValue, ListOf, MapOf, Scalar, Struct, Type

META = "io.k8s.apimachinery.pkg.apis.meta.v1."
_SPECIAL: dict[str, Type] = {
    "io.k8s.apimachinery.pkg.api.resource.Quantity": Scalar("quantity"),
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": Scalar("int-or-string"),
    META + "Time": Scalar("time"),
    META + "MicroTime": Scalar("micro-time"),
    META + "FieldsV1": AnyValue(),
    "io.k8s.apimachinery.pkg.runtime.RawExtension": AnyValue(),
}
# References that merge field by field though their definition is atomic: the schema says so beside the reference.
_GRANULAR = "granular"


class Described(Protocol):
    """A kind, as far as its type goes."""

    @property
    def schema(self) -> str:
        """The name of its definition."""

    @property
    def struct(self) -> Struct | None:
        """Its type, where that is no published one."""


def definitions() -> dict[str, dict[str, Any]]:
    """Every definition by its full name, prose and all; read anew at each call (15 ms, 10 MB)."""
    _, path = newest()
    loaded: dict[str, dict[str, Any]] = json.loads((path / "_definitions.json").read_bytes())["$defs"]
    return loaded


def referred(schema: Mapping[str, Any]) -> str:
    """The name of the definition that `schema` refers to; empty when it does not."""
    return str(schema["$ref"]).rpartition("/")[2] if "$ref" in schema else ""


class Schema:
    """The types of all definitions, made when first asked for.

    Not thread-safe while types are still being made; a type that was handed out is never changed again.
    """

    def __init__(self, source: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._source: Mapping[str, Mapping[str, Any]] | None = source
        self._made: dict[str, Type] = {}

    @classmethod
    @functools.cache
    def load(cls) -> Schema:
        """The schema of the newest release, one per process."""
        return cls()

    def type_of(self, name: str) -> Struct:
        """The type of a definition.

        :raises KeyError: there is no such definition, or it is no object
        """
        made = self._type(name)
        if not isinstance(made, Struct):
            raise KeyError(name)
        return made

    def of(self, kind: Described) -> Struct:
        """The type of a kind's objects."""
        return kind.struct or self.type_of(kind.schema)

    def preload(self, *names: str) -> None:
        """Make the types of `names` and all they reach, then let the source go."""
        for name in names:
            self._type(name)
        self._source = None

    def _definition(self, name: str) -> Mapping[str, Any]:
        if self._source is None:
            self._source = definitions()
        return self._source[name]

    def _type(self, name: str) -> Type:
        made = self._made.get(name) or _SPECIAL.get(name)
        return made or self._make(name, self._definition(name))

    def _make(self, name: str, schema: Mapping[str, Any]) -> Type:
        if "properties" not in schema:
            if schema.get("type") == ["object", "null"] and name.startswith("io.k8s.api."):
                self._made[name] = Struct(name, {})
            else:
                self._made[name] = AnyValue()
            return self._made[name]
        fields: dict[str, Type] = {}
        atomic = schema.get("x-kubernetes-map-type") == "atomic"
        # Noted before its fields are made: they may lead back to it.
        self._made[name] = Struct(name, fields, tuple(schema.get("required", ())), atomic)
        for key, value in schema["properties"].items():
            fields[key] = self._inline(value)
        return self._made[name]

    def _inline(self, schema: Mapping[str, Any]) -> Type:
        if name := referred(schema):
            return self._reference(name, schema)
        named = _plain(schema.get("type"))
        if named == "array":
            return self._list(schema)
        if named == "object":
            extra = schema.get("additionalProperties")
            atomic = schema.get("x-kubernetes-map-type") == "atomic"
            return MapOf(self._inline(extra), atomic) if extra else AnyValue()
        return _scalar(named, schema)

    def _reference(self, name: str, schema: Mapping[str, Any]) -> Type:
        target = self._type(name)
        wanted = schema.get("x-kubernetes-map-type")
        if wanted and isinstance(target, Struct) and target.atomic != (wanted == "atomic"):
            return Struct(target.name, target.fields, target.required, wanted == "atomic")
        return target

    def _list(self, schema: Mapping[str, Any]) -> ListOf:
        strategy = schema.get("x-kubernetes-patch-strategy", "").split(",")
        return ListOf(
            self._inline(schema["items"]),
            schema.get("x-kubernetes-list-type", "atomic"),
            tuple(schema.get("x-kubernetes-list-map-keys", ())),
            "merge" in strategy,
            schema.get("x-kubernetes-patch-merge-key", ""),
            "retainKeys" in strategy,
        )


def _plain(types: object) -> str:
    """A type without its ``null``."""
    listed = types if isinstance(types, list) else [types]
    return next((str(t) for t in listed if t not in (None, "null")), "")


def _scalar(named: str, schema: Mapping[str, Any]) -> Type:
    if not named:
        return AnyValue()
    if named == "integer":
        return Scalar("integer", 32 if schema.get("format") == "int32" else 64)
    if named == "string" and schema.get("format") == "byte":
        return Scalar("bytes")
    return Scalar(named)
