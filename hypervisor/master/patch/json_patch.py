"""JSON patch. Source: RFC 6902, and RFC 6901 for the pointers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypervisor.errors import HvError
from hypervisor.master.patch.errors import MAX_OPERATIONS, malformed, too_many, unprocessable
from hypervisor.master.patch.values import copy, equal

_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")
# `copy` can double an object at every operation: bounded by the values that a patch may add in all.
_MAX_ADDED = 1_000_000


class _Missing(HvError):
    """A pointer that leads nowhere."""


def json_patch(obj: Any, operations: Any) -> Any:
    """`obj` after `operations`; all of them, or none.

    :raises ApiError: 400 it is no JSON patch; 413 too many operations; 422 an operation does not apply (a ``test``
        that fails, a path that does not exist)
    """
    if not isinstance(operations, Sequence) or isinstance(operations, str):
        raise malformed("a JSON patch is a list of operations")
    if len(operations) > MAX_OPERATIONS:
        raise too_many(len(operations))
    document = _Document(copy(obj))
    for operation in operations:
        _apply(document, operation)
    return document.value


def _apply(document: _Document, operation: Any) -> None:
    if not isinstance(operation, Mapping):
        raise malformed("each operation of a JSON patch is an object")
    name = operation.get("op")
    handler = _OPERATIONS.get(name) if isinstance(name, str) else None
    if handler is None:
        raise unprocessable(f"Unexpected kind: {name}")
    path = _pointer(operation, "path")
    try:
        handler(document, path, operation)
    except _Missing as error:
        raise unprocessable(f"{name} operation does not apply: doc is missing {error}: missing value") from None


def _pointer(operation: Mapping[str, Any], member: str) -> list[str]:
    text = operation.get(member)
    if not isinstance(text, str):
        raise unprocessable(f"{operation.get('op')} operation has no {member}")
    if text and not text.startswith("/"):
        raise unprocessable(f'{operation.get("op")} operation does not apply: "{text}" is no JSON pointer')
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:]]


def _given(operation: Mapping[str, Any]) -> Any:
    if "value" not in operation:
        raise unprocessable(f"{operation.get('op')} operation has no value")
    return copy(operation["value"])


def _text(path: list[str]) -> str:
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in path)


def _index(part: str, length: int, path: list[str]) -> int:
    if not _INDEX.fullmatch(part) or int(part) >= length:
        raise _Missing(f'path: "{_text(path)}"')
    return int(part)


def size(value: Any) -> int:
    """How many values `value` is made of."""
    if isinstance(value, dict):
        return 1 + sum(map(size, value.values()))
    return 1 + sum(map(size, value)) if isinstance(value, list) else 1


class _Document:
    """A JSON value that operations change in place."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._added = 0

    def get(self, path: list[str]) -> Any:
        value = self.value
        for part in path:
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list):
                value = value[_index(part, len(value), path)]
            else:
                raise _Missing(f'path: "{_text(path)}"')
        return value

    def add(self, path: list[str], value: Any) -> None:
        self._added += size(value)
        if self._added > _MAX_ADDED:
            raise unprocessable("the patch adds more values than one request may")
        if not path:
            self.value = value
            return
        parent, last = self.get(path[:-1]), path[-1]
        if isinstance(parent, dict):
            parent[last] = value
        elif isinstance(parent, list):
            parent.insert(len(parent) if last == "-" else _index(last, len(parent) + 1, path), value)
        else:
            raise _Missing(f'path: "{_text(path)}"')

    def remove(self, path: list[str]) -> Any:
        gone = self.get(path)
        if not path:
            self.value = None
            return gone
        parent = self.get(path[:-1])
        if isinstance(parent, dict):
            del parent[path[-1]]
        else:
            del parent[_index(path[-1], len(parent), path)]
        return gone


def _add(document: _Document, path: list[str], operation: Mapping[str, Any]) -> None:
    document.add(path, _given(operation))


def _remove(document: _Document, path: list[str], operation: Mapping[str, Any]) -> None:
    document.remove(path)


def _replace(document: _Document, path: list[str], operation: Mapping[str, Any]) -> None:
    value = _given(operation)
    document.remove(path)
    document.add(path, value)


def _move(document: _Document, path: list[str], operation: Mapping[str, Any]) -> None:
    source = _pointer(operation, "from")
    if path[: len(source)] == source and path != source:
        raise unprocessable(f'move operation does not apply: "{_text(source)}" cannot move into itself')
    document.add(path, document.remove(source))


def _copy(document: _Document, path: list[str], operation: Mapping[str, Any]) -> None:
    document.add(path, copy(document.get(_pointer(operation, "from"))))


def _test(document: _Document, path: list[str], operation: Mapping[str, Any]) -> None:
    wanted = operation.get("value")
    try:
        found = document.get(path)
    except _Missing:
        if wanted is None:
            return  # upstream's library: null equals absent
        raise
    if not equal(found, wanted):
        raise unprocessable(f"testing value {_text(path)} failed: test failed")


_OPERATIONS: dict[str, Callable[[_Document, list[str], Mapping[str, Any]], None]] = {
    "add": _add,
    "remove": _remove,
    "replace": _replace,
    "move": _move,
    "copy": _copy,
    "test": _test,
}
