"""Printer columns of definitions: JSON paths, and what `kubectl get` shows of what they find.

Source: Kubernetes, "JSONPath Support" (the part that definitions may use) and "Additional printer columns".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypervisor.master.kinds.cells import AGE, NAME, since
from hypervisor.master.kinds.kind import Column

_STEP = re.compile(
    r"""\.(?P<field>(?:\\.|[\w-])+|\*)
      | \[(?P<index>-?\d+|\*)\]
      | \['(?P<quoted>[^']*)'\]
      | \[\?\(@(?P<path>(?:\.[\w-]+)+)\s*==\s*(?P<quote>["'])(?P<value>.*?)(?P=quote)\)\]""",
    re.VERBOSE,
)
Step = Callable[[Any], list[Any]]


def parse(path: str) -> Sequence[Step]:
    """A path as steps.

    :raises ValueError: it is none, or uses what is not served (slices, unions, recursion)
    """
    text, steps, at = path.strip().removeprefix("{").removesuffix("}"), [], 0
    while at < len(text):
        found = _STEP.match(text, at)
        if found is None:
            raise ValueError(f"cannot read {text[at:]!r} in the path {path!r}")
        steps.append(_step(found))
        at = found.end()
    if not steps:
        raise ValueError("the path is empty")
    return steps


def _step(found: re.Match[str]) -> Step:
    field, index, quoted = found["field"], found["index"], found["quoted"]
    if found["path"] is not None:
        keys, wanted = found["path"][1:].split("."), found["value"]
        return lambda value: [item for item in _all(value) if str(_dig(item, keys)) == wanted]
    if field == "*" or index == "*":
        return _all
    if index is not None:
        number = int(index)
        return lambda value: value[number : number + 1 or None] if isinstance(value, list) else []
    name = quoted if quoted is not None else re.sub(r"\\(.)", r"\1", field)
    return lambda value: [value[name]] if isinstance(value, dict) and name in value else []


def _all(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list) else []


def _dig(value: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def find(steps: Sequence[Step], obj: Any) -> list[Any]:
    """All that a path leads to."""
    found = [obj]
    for step in steps:
        found = [item for value in found for item in step(value)]
    return found


def columns_of(listed: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """The columns of a version; name, and age where nothing is said."""
    return (NAME, *map(_column, listed)) if listed else (NAME, AGE)


def _column(row: Mapping[str, Any]) -> Column:
    steps, named = parse(row["jsonPath"]), row["type"]

    def cell(obj: Mapping[str, Any]) -> Any:
        found = find(steps, obj)
        if not found or found[0] is None:
            return None
        if named == "date":
            return since(str(found[0]))
        if len(found) > 1 or isinstance(found[0], (dict, list)):
            return ",".join(map(_text, found))
        return found[0] if named in ("integer", "number", "boolean") else _text(found[0])

    return Column(
        row["name"],
        cell,
        "string" if named == "date" else named,
        row.get("format", ""),
        row.get("priority", 0),
        row.get("description", ""),
    )


def _text(value: Any) -> str:
    import json

    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"))
