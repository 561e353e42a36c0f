"""Values against the OpenAPI schema of their definition, told in upstream's words.

Source: Kubernetes, "Extend the Kubernetes API with CustomResourceDefinitions" (validation); OpenAPI 3.0, Schema Object.
"""

from __future__ import annotations

import base64
import binascii
import functools
import ipaddress
import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from hypervisor.kube.errors import Cause
from hypervisor.master.custom.structural import EITHER
from hypervisor.master.kinds.rules import duplicate, invalid, required, too_long, unsupported

Json = Mapping[str, Any]
Causes = Iterator[Cause]
_PYTHON: Mapping[str, tuple[type, ...]] = {
    "array": (list,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "object": (dict,),
    "string": (str,),
}


def check(obj: Json, schema: Json, *, skip: tuple[str, ...] = ("apiVersion", "kind", "metadata")) -> Causes:
    """Everything wrong with an object, but for what every object has."""
    checked = {key: value for key, value in obj.items() if key not in skip}
    needed = [key for key in schema.get("required") or () if key not in skip]
    properties = {key: value for key, value in (schema.get("properties") or {}).items() if key not in skip}
    yield from _value(checked, {**schema, "required": needed, "properties": properties}, "")


def _value(value: Any, schema: Json, path: str) -> Causes:
    if value is None and schema.get("nullable"):
        return
    if not _is_of_type(value, schema):
        wanted = "integer,string" if schema.get(EITHER) else schema.get("type")
        said = _json_type(value)
        yield Cause(
            "FieldValueTypeInvalid",
            f"Invalid value: {json.dumps(said)}: {path} in body must be of type {wanted}: {json.dumps(said)}",
            path or "<nil>",
        )
        return
    if schema.get("enum") and value not in schema["enum"]:
        yield unsupported(path, value, [str(e) for e in schema["enum"]])
    if isinstance(value, str):
        yield from _string(value, schema, path)
    elif isinstance(value, list):
        yield from _list(value, schema, path)
    elif isinstance(value, dict):
        yield from _object(value, schema, path)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield from _number(value, schema, path)
    yield from _junctors(value, schema, path)


def _is_of_type(value: Any, schema: Json) -> bool:
    if schema.get(EITHER):
        return isinstance(value, (int, str)) and not isinstance(value, bool)
    named = schema.get("type")
    if not named:
        return True
    if isinstance(value, bool):
        return bool(named == "boolean")
    if named == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _PYTHON.get(named, (object,)))


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    return next((name for name, types in _PYTHON.items() if isinstance(value, types)), "object")


def _string(value: str, schema: Json, path: str) -> Causes:
    if len(value) < schema.get("minLength", 0):
        yield invalid(path, value, f"{path} in body should be at least {schema['minLength']} chars long")
    if len(value) > schema.get("maxLength", len(value)):
        yield too_long(path, schema["maxLength"])
    pattern = schema.get("pattern")
    if pattern and not _compiled(pattern).search(value):
        yield invalid(path, value, f"{path} in body should match '{pattern}'")
    named = str(schema.get("format"))
    if named in _FORMATS and not _fits(_FORMATS[named], value):
        yield invalid(path, value, f"{path} in body must be of type {named}: {json.dumps(value)}")


@functools.lru_cache(1000)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _fits(parse: Callable[[str], object], value: str) -> bool:
    try:
        parse(value)
    except (ValueError, binascii.Error):
        return False
    return True


def _date_time(value: str) -> object:
    if not re.match(r"\d{4}-\d\d-\d\d[Tt ]", value) or not re.search(r"([Zz]|[+-]\d\d:\d\d)$", value):
        raise ValueError(value)
    return datetime.fromisoformat(value)


def _uuid(value: str) -> None:
    if not re.fullmatch(r"(?i)[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}", value):
        raise ValueError(value)


_FORMATS: Mapping[str, Callable[[str], object]] = {
    "date-time": _date_time,
    "date": lambda v: datetime.strptime(v, "%Y-%m-%d"),
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "cidr": lambda v: ipaddress.ip_network(v, strict=False),
    "byte": lambda v: base64.b64decode(v, validate=True),
    "uuid": _uuid,
}


def _number(value: float, schema: Json, path: str) -> Causes:
    low, high, step = schema.get("minimum"), schema.get("maximum"), schema.get("multipleOf")
    if low is not None and (value < low or (value == low and schema.get("exclusiveMinimum"))):
        word = "greater than" if schema.get("exclusiveMinimum") else "greater than or equal to"
        yield invalid(path, value, f"{path} in body should be {word} {low}")
    if high is not None and (value > high or (value == high and schema.get("exclusiveMaximum"))):
        word = "less than" if schema.get("exclusiveMaximum") else "less than or equal to"
        yield invalid(path, value, f"{path} in body should be {word} {high}")
    if step and abs(value / step - round(value / step)) > 1e-9:
        yield invalid(path, value, f"{path} in body should be a multiple of {step}")
    bits = {"int32": 31, "int64": 63}.get(str(schema.get("format")))
    if bits and not -(1 << bits) <= value < 1 << bits:
        yield invalid(path, value, f"{path} in body must be of type {schema['format']}: {value}")


def _list(value: list[Any], schema: Json, path: str) -> Causes:
    if len(value) < schema.get("minItems", 0):
        yield invalid(path, len(value), f"{path} in body should have at least {schema['minItems']} items")
    if len(value) > schema.get("maxItems", len(value)):
        yield Cause("FieldValueTooMany", f"Too many: {len(value)}: must have at most {schema['maxItems']} items", path)
    keys = schema.get("x-kubernetes-list-map-keys") or ()
    how = schema.get("x-kubernetes-list-type")
    if how in ("set", "map") or schema.get("uniqueItems"):
        seen: set[str] = set()
        for index, item in enumerate(value):
            key = {k: item.get(k) for k in keys} if how == "map" and isinstance(item, dict) else item
            text = json.dumps(key, sort_keys=True)
            if text in seen:
                yield duplicate(f"{path}[{index}]", key)
            seen.add(text)
    items = schema.get("items")
    if isinstance(items, dict):
        for index, item in enumerate(value):
            yield from _value(item, items, f"{path}[{index}]")


def _object(value: dict[str, Any], schema: Json, path: str) -> Causes:
    if len(value) < schema.get("minProperties", 0):
        yield invalid(path, len(value), f"{path} in body should have at least {schema['minProperties']} properties")
    if len(value) > schema.get("maxProperties", len(value)):
        yield Cause(
            "FieldValueTooMany", f"Too many: {len(value)}: must have at most {schema['maxProperties']} items", path
        )
    for key in schema.get("required") or ():
        if key not in value:
            yield required(_below(path, key))
    properties, extra = schema.get("properties") or {}, schema.get("additionalProperties")
    for key, item in value.items():
        below = properties.get(key) or (extra if isinstance(extra, dict) else None)
        if below is not None:
            yield from _value(item, below, _below(path, key))


def _below(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _junctors(value: Any, schema: Json, path: str) -> Causes:
    for part in schema.get("allOf") or ():
        yield from _value(value, part, path)
    either = schema.get("anyOf") or ()
    if either and all(any(_value(value, part, path)) for part in either):
        yield invalid(path or "<nil>", _json_type(value), f"{path} in body must validate at least one schema (anyOf)")
    one = schema.get("oneOf") or ()
    if one and sum(not any(_value(value, part, path)) for part in one) != 1:
        yield invalid(
            path or "<nil>", _json_type(value), f"{path} in body must validate one and only one schema (oneOf)"
        )
    if isinstance(schema.get("not"), dict) and not any(_value(value, schema["not"], path)):
        yield invalid(path or "<nil>", _json_type(value), f"{path} in body must not validate the schema (not)")
