"""JSON merge patch. Source: RFC 7386."""

from __future__ import annotations

from typing import Any

from hypervisor.master.patch.errors import malformed
from hypervisor.master.patch.values import copy


def merge_patch(obj: Any, patch: Any) -> Any:
    """`obj` with the members of `patch` in place of its own; a null takes a member away.

    :raises ApiError: 400, the patch is no object (upstream patches objects only)
    """
    if not isinstance(patch, dict):
        raise malformed("a merge patch is an object")
    return _merge(obj, patch)


def _merge(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return copy(patch)
    merged = copy(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged
