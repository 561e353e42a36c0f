"""Plain JSON values: copies and equality."""

from __future__ import annotations

from typing import Any


def copy(value: Any) -> Any:
    """A deep copy; several times faster than the standard library's, as JSON has no cycles and few types."""
    if type(value) is dict:
        return {key: copy(item) if type(item) in (dict, list) else item for key, item in value.items()}
    if type(value) is list:
        return [copy(item) if type(item) in (dict, list) else item for item in value]
    return value


def equal(left: Any, right: Any) -> bool:
    """Equality of JSON values: ``true`` is not 1 as Python has it, ``1`` and ``1.0`` are one number."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(equal(item, right[key]) for key, item in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)
