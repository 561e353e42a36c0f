"""Objects against their types, in one pass: unknown fields are taken out and told, values brought to their kept form.

What upstream's decoder does with the types of its language, here done with the published schema's. A null counts
as absent. What the schema calls required is checked apart (`missing`): upstream's validation, not its decoder, asks.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hypervisor.kube.errors import Cause
from hypervisor.master.schema.scalars import Unfit, accept, json_type
from hypervisor.master.schema.types import AnyValue, ListOf, MapOf, Scalar, Struct, Type

MAX_DEPTH = 64
_BRACKETS = re.compile(r"\[[^\]]*\]")


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A value that does not fit its type.

    :ivar field: its path
    :ivar message: as upstream's decoder words it
    """

    field: str
    message: str


@dataclass(slots=True)
class Report:
    """What `conform` found.

    :ivar unknown: paths of the fields that were taken out
    :ivar mismatches: values of a wrong type; the object is then not to be used
    """

    unknown: list[str] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)


def field_path(parent: str, key: str | int) -> str:
    """The path of `key` below `parent`, as upstream writes it."""
    if isinstance(key, int):
        return f"{parent}[{key}]"
    return f"{parent}.{key}" if parent else key


def map_path(parent: str, key: str) -> str:
    """The path of a map's entry, as upstream writes it: ``metadata.labels[app]``."""
    return f"{parent}[{key}]"


def conform(obj: dict[str, Any], struct: Struct) -> Report:
    """Bring `obj` to the form of its type, in place: nulls and unknown fields out, scalars canonical."""
    report = Report()
    _struct(obj, struct, "", report, 0)
    return report


def unknown_fields(obj: Mapping[str, Any], struct: Struct) -> list[str]:
    """Paths of the fields of `obj` that its type does not have; `obj` stays as it is."""
    report = Report()
    _struct(_copy(obj), struct, "", report, 0)
    return report.unknown


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _struct(value: dict[str, Any], struct: Struct, path: str, report: Report, depth: int) -> None:
    fields = struct.fields
    for key in list(value):
        kind = fields.get(key)
        if kind is None and struct.preserve:
            continue
        if kind is None:
            report.unknown.append(field_path(path, key))
            del value[key]
        elif value[key] is None:
            del value[key]
        else:
            value[key] = _value(value[key], kind, struct, field_path(path, key), report, depth + 1)


def _value(value: Any, kind: Type, owner: Struct, path: str, report: Report, depth: int) -> Any:
    if type(kind) is Scalar:
        return _scalar(value, kind, owner, path, report)
    if type(kind) is AnyValue:
        return value
    if depth > MAX_DEPTH:
        report.mismatches.append(Mismatch(path, f"nested more than {MAX_DEPTH} levels deep"))
        return value
    if type(kind) is ListOf and type(value) is list:
        _list(value, kind, owner, path, report, depth)
    elif type(kind) is Struct and type(value) is dict:
        _struct(value, kind, path, report, depth)
    elif type(kind) is MapOf and type(value) is dict:
        _map(value, kind, owner, path, report, depth)
    else:
        report.mismatches.append(Mismatch(path, _container_message(value, kind, owner, path)))
    return value


def _scalar(value: Any, kind: Scalar, owner: Struct, path: str, report: Report) -> Any:
    if type(value) is str and kind.kind == "string":
        return value  # nine of ten values
    try:
        return accept(value, kind)
    except Unfit as error:
        named = f"{owner.short}.{_BRACKETS.sub('', path)}"
        report.mismatches.append(Mismatch(path, str(error).replace("{field}", named)))
        return value


def _map(value: dict[str, Any], kind: MapOf, owner: Struct, path: str, report: Report, depth: int) -> None:
    for key, item in value.items():
        if item is None:
            value[key] = zero(kind.item)
        else:
            value[key] = _value(item, kind.item, owner, map_path(path, key), report, depth + 1)


def _list(value: list[Any], kind: ListOf, owner: Struct, path: str, report: Report, depth: int) -> None:
    for index, item in enumerate(value):
        if item is None:
            value[index] = zero(kind.item)
        else:
            value[index] = _value(item, kind.item, owner, f"{path}[{index}]", report, depth + 1)


def zero(kind: Type) -> Any:
    """What a null in a list or map becomes, as in upstream's language."""
    if isinstance(kind, Scalar):
        return {"integer": 0, "number": 0.0, "boolean": False, "quantity": "0"}.get(kind.kind, "")
    return [] if isinstance(kind, ListOf) else {}


_GO = {MapOf: "map[string]string", ListOf: "[]string"}


def _container_message(value: Any, kind: Type, owner: Struct, path: str) -> str:
    named = f"{owner.short}.{_BRACKETS.sub('', path)}"
    go = f"v1.{kind.short}" if isinstance(kind, Struct) else _go_container(kind)
    return f"json: cannot unmarshal {json_type(value)} into Go struct field {named} of type {go}"


def _go_container(kind: Type) -> str:
    if isinstance(kind, (MapOf, ListOf)):
        item = kind.item
        inner = item.go if isinstance(item, Scalar) else f"v1.{item.short}" if isinstance(item, Struct) else "string"
        return f"map[string]{inner}" if isinstance(kind, MapOf) else f"[]{inner}"
    return "object"


def missing(obj: Mapping[str, Any], struct: Struct, skip: Iterable[str] = ("status", "metadata")) -> list[Cause]:
    """What the schema requires and `obj` lacks, except below the top-level fields `skip` (servers fill them in)."""
    kept = {key: value for key, value in obj.items() if key not in skip}
    required = [key for key in struct.required if key not in skip]
    found = [_required(key) for key in required if kept.get(key) is None]
    for key, value in kept.items():
        found += _missing(value, struct.fields.get(key), key)
    return found


# Strings that upstream's decoder leaves empty and whose emptiness no validation minds (headers, kernel parameters).
_MAY_LACK = frozenset({"value"})


def _required(path: str) -> Cause:
    return Cause("FieldValueRequired", "Required value", path)


def _missing(value: Any, kind: Type | None, path: str) -> Iterator[Cause]:
    if isinstance(kind, Struct) and isinstance(value, dict):
        yield from (
            _required(field_path(path, key)) for key in kind.required if value.get(key) is None and key not in _MAY_LACK
        )
        for key, item in value.items():
            if type(item) in (dict, list):
                yield from _missing(item, kind.fields.get(key), field_path(path, key))
    elif isinstance(kind, ListOf) and isinstance(kind.item, Struct) and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _missing(item, kind.item, f"{path}[{index}]")
    elif isinstance(kind, MapOf) and isinstance(kind.item, Struct) and isinstance(value, dict):
        for key, item in value.items():
            yield from _missing(item, kind.item, map_path(path, key))


def suggest(path: str, struct: Struct) -> str:
    """The known field nearest to the unknown one at `path`; empty when none is near."""
    *parents, last = re.findall(r"[^.\[\]]+|\[[^\]]*\]", path)
    kind: Type | None = struct
    for part in parents:
        if isinstance(kind, Struct):
            kind = kind.fields.get(part)
        elif isinstance(kind, (ListOf, MapOf)):
            kind = kind.item
    names = list(kind.fields) if isinstance(kind, Struct) else []
    near = difflib.get_close_matches(last, names, 1) or [n for n in names if n.lower() == last.lower()]
    return near[0] if near else ""
