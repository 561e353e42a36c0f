"""Frozen dataclasses to JSON and back, strictly: one definition serves file and code.

A record is a frozen dataclass whose fields are ``str``, ``int``, ``float``, ``bool``, `Path`, another record, ``X |
None``, ``tuple[X, ...]``, ``tuple[X, Y]`` or ``dict[str, X]``. Reading refuses what is missing, unknown or of another
type, and names its path.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar, cast

from hypervisor.errors import InvalidInput

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """`value` as what `json.dumps` takes."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    return value


def dumps(value: Any) -> str:
    """`value` as indented JSON text with a final newline."""
    return json.dumps(to_json(value), indent=1) + "\n"


def loads(kind: type[T], text: str | bytes, *, where: str) -> T:
    """A `kind` out of JSON text.

    :param where: names the text in errors, as its file name
    :raises InvalidInput: not JSON, or not a `kind`; the message names the path of the offending value
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidInput(f"is not JSON: {e}", where=where) from e
    return cast(T, from_json(kind, value, where=where))


def from_json(kind: Any, value: Any, *, where: str) -> Any:
    """`value` (parsed JSON) as a `kind`; raises like `loads`."""
    origin = typing.get_origin(kind)
    if origin is typing.Union or origin is types.UnionType:
        return _from_union(kind, value, where)
    if origin is typing.Literal:
        allowed = typing.get_args(kind)
        if value not in allowed:
            raise InvalidInput(f"is {value!r}; allowed: {', '.join(map(str, allowed))}", where=where)
        return value
    if origin is tuple:
        return _from_tuple(typing.get_args(kind), _expect(list, value, where), where)
    if origin is dict:
        item = typing.get_args(kind)[1]
        return {k: from_json(item, v, where=f"{where}.{k}") for k, v in _expect(dict, value, where).items()}
    if dataclasses.is_dataclass(kind):
        return _from_record(cast(type, kind), value, where)
    if kind is Path:
        return Path(_expect(str, value, where))
    if kind is float and type(value) is int:
        return float(value)
    return _expect(kind, value, where)


def _from_union(kind: Any, value: Any, where: str) -> Any:
    members = typing.get_args(kind)
    if value is None and type(None) in members:
        return None
    (member,) = (m for m in members if m is not type(None))
    return from_json(member, value, where=where)


def _from_tuple(items: tuple[Any, ...], values: list[Any], where: str) -> tuple[Any, ...]:
    if items[-1] is not Ellipsis and len(items) != len(values):
        raise InvalidInput(f"has {len(values)} items, not {len(items)}", where=where)
    kinds = items if items[-1] is not Ellipsis else items[:1] * len(values)
    return tuple(from_json(k, v, where=f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, values, strict=True)))


def _from_record(kind: type, value: Any, where: str) -> Any:
    given = _expect(dict, value, where)
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(given.keys() - names):
        raise InvalidInput(f"unknown field; allowed: {', '.join(sorted(names))}", where=f"{where}.{unknown[0]}")
    if missing := sorted(names - given.keys()):
        raise InvalidInput("is missing", where=f"{where}.{missing[0]}")
    return kind(**{n: from_json(hints[n], given[n], where=f"{where}.{n}") for n in names})


def _expect(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not kind:
        raise InvalidInput(f"is {type(value).__name__}, not {kind.__name__}", where=where)
    return value
