"""Manifests against the OpenAPI schema that Kubernetes publishes, strictly, with errors that name the path.

The schema comes as data with the distribution ``kubernetes-validate``; none of that package's code is imported (it
would cost a quarter of a second), and of its two megabytes only what a Pod can reach is kept.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hypervisor.errors import InvalidInput
from hypervisor.kube.published import newest

Schema = Mapping[str, Any]

POD = "io.k8s.api.core.v1.Pod"
# Far more than any pod needs; YAML aliases could otherwise turn a kilobyte into billions of nodes.
MAX_NODES = 200_000
MAX_DEPTH = 64


@functools.cache
def pod_definitions() -> Mapping[str, Schema]:
    """The newest published definitions that a Pod can reach, by their full names. Read once a process (20 ms).

    :raises HostUnfit: the distribution with the schema is not installed
    """
    definitions = json.loads((newest(strict=True)[1] / "_definitions.json").read_bytes())["$defs"]
    wanted: dict[str, Schema] = {}
    todo = [POD]
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted[name] = definitions[name]
            todo.extend(_references(definitions[name]))
    return wanted


def _references(schema: object) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].rsplit("/", 1)[-1]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def field_path(parent: str, key: str | int) -> str:
    """The path of `key` below `parent`, as Kubernetes writes it."""
    if isinstance(key, int):
        return f"{parent}[{key}]"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", key):
        return f'{parent}["{key}"]'
    return f"{parent}.{key}" if parent else key


def check_pod(manifest: Mapping[str, Any]) -> None:
    """Refuse what the published schema of a ``v1`` Pod does not have. A null counts as absent.

    :raises InvalidInput: the first unknown field, missing field or wrong type, with its path and what is allowed there
    """
    _Walk(pod_definitions()).check(manifest, pod_definitions()[POD], "", 0)


class _Walk:
    def __init__(self, definitions: Mapping[str, Schema]) -> None:
        self._definitions = definitions
        self._nodes = 0

    def check(self, value: object, schema: Schema, path: str, depth: int) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise InvalidInput(f"the manifest has more than {MAX_NODES} values")
        if depth > MAX_DEPTH:
            raise InvalidInput(f"nested more than {MAX_DEPTH} levels deep", where=path)
        if value is None:
            return
        schema = self._resolve(schema)
        if "oneOf" in schema:
            _check_type(value, [t for s in schema["oneOf"] for t in _types(s)], schema, path)
            return
        _check_type(value, _types(schema), schema, path)
        if schema.get("enum") and value not in schema["enum"]:
            raise InvalidInput(f"{_show(value)} is not one of {', '.join(map(str, schema['enum']))}", where=path)
        if isinstance(value, dict):
            self._object(value, schema, path, depth)
        elif isinstance(value, list) and "items" in schema:
            for index, item in enumerate(value):
                if item is None:
                    raise InvalidInput("an empty list entry; remove it or fill it in", where=field_path(path, index))
                self.check(item, schema["items"], field_path(path, index), depth + 1)

    def _object(self, value: dict[Any, Any], schema: Schema, path: str, depth: int) -> None:
        known: Mapping[str, Schema] = schema.get("properties", {})
        extra = schema.get("additionalProperties", not known)
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidInput(f"the key {_show(key)} must be a string; put it in quotes", where=path)
            if key in known:
                self.check(item, known[key], field_path(path, key), depth + 1)
            elif isinstance(extra, dict):
                self.check(item, extra, field_path(path, key), depth + 1)
            elif not extra:
                raise InvalidInput(f"unknown field; {_did_you_mean(key, known)}", where=field_path(path, key))
        for key in schema.get("required", ()):
            if value.get(key) is None:
                raise InvalidInput("required, and missing", where=field_path(path, key))

    def _resolve(self, schema: Schema) -> Schema:
        while "$ref" in schema:
            schema = self._definitions[schema["$ref"].rsplit("/", 1)[-1]]
        return schema


def _types(schema: Schema) -> list[str]:
    types = schema.get("type", [])
    return [t for t in ([types] if isinstance(types, str) else types) if t != "null"]


_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "object": (dict,),
    "array": (list,),
}
_TYPE_NAMES = {
    "string": "a string",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "object": "a mapping",
    "array": "a list",
}


def _is(value: object, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and kind == "integer":
        return value.is_integer()
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, _PYTHON_TYPES.get(kind, ()))


def _check_type(value: object, types: list[str], schema: Schema, path: str) -> None:
    if not types or any(_is(value, kind) for kind in types):
        return
    names = " or ".join(_TYPE_NAMES.get(kind, kind) for kind in types)
    items = schema.get("items", {})
    if types == ["array"] and _types(items):
        names += f" of {_TYPE_NAMES[_types(items)[0]].removeprefix('a ')}s"
    hint = "; put it in quotes" if types == ["string"] and isinstance(value, (bool, int, float)) else ""
    raise InvalidInput(f"must be {names}, not {_describe(value)}{hint}", where=path)


def _describe(value: object) -> str:
    for kind in ("boolean", "integer", "number", "string"):
        if _is(value, kind):
            name = "a boolean" if kind == "boolean" else _TYPE_NAMES[kind]
            return f"{name} ({_show(value)})"
    if isinstance(value, dict):
        return _TYPE_NAMES["object"]
    return _TYPE_NAMES["array"] if isinstance(value, list) else _show(value)


def _show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _did_you_mean(key: str, known: Mapping[str, Schema]) -> str:
    close = difflib.get_close_matches(key, known, n=1) or [name for name in known if name.lower() == key.lower()]
    if close:
        return f'did you mean "{close[0]}"?'
    return f"the fields here are {', '.join(sorted(known))}" if known else "there are no fields here"
