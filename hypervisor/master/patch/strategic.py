"""Strategic merge patch: a merge patch that knows which lists are merged, and by which key.

Theory of operation: a patch is merged into an object from the outside in. In each object, directives come first
(``$patch``, ``$retainKeys``), then lists that the patch orders or takes values from (``$deleteFromPrimitiveList/x``,
``$setElementOrder/x``), then the members. A merged list ends up in this order: what the patch names, as the patch
orders it, with what only the server has put in between where its old order allows.

Source: Kubernetes documentation, "Strategic merge patch" and "Preserve order in strategic merge patch" (design
proposals); merge keys and strategies from the published schema.
"""

from __future__ import annotations

from typing import Any

from hypervisor.kube.errors import bad_request
from hypervisor.master.patch.errors import malformed, unprocessable
from hypervisor.master.patch.values import copy, equal
from hypervisor.master.schema.types import ListOf, MapOf, Struct, Type

PATCH = "$patch"
RETAIN_KEYS = "$retainKeys"
DELETE_PREFIX = "$deleteFromPrimitiveList/"
ORDER_PREFIX = "$setElementOrder/"


def strategic_merge(obj: Any, patch: Any, kind: Type) -> Any:
    """`obj`, of type `kind`, with `patch` merged into it.

    :raises ApiError: 400 the patch or a directive in it is malformed; 422 an entry lacks its merge key
    """
    if not isinstance(patch, dict):
        raise malformed("a strategic merge patch is an object")
    return _merge_object(copy(obj), patch, kind)


def _merge_object(target: dict[str, Any], patch: dict[str, Any], kind: Type | None) -> dict[str, Any]:
    directive = patch.get(PATCH)
    if directive == "replace":
        return {key: copy(value) for key, value in patch.items() if key != PATCH}
    if directive == "delete":
        return {}
    if PATCH in patch and directive != "merge":
        raise bad_request(f"unknown patch type found: {directive!s}")
    _retain(target, patch)
    for name in _ordered_lists(patch):
        _merge_ordered_list(target, name, patch, _member(kind, name))
    for name, value in patch.items():
        if not name.startswith("$") and ORDER_PREFIX + name not in patch:
            _merge_member(target, name, value, patch, _member(kind, name))
    return target


def _member(kind: Type | None, name: str) -> Type | None:
    if isinstance(kind, Struct):
        return kind.fields.get(name)
    return kind.item if isinstance(kind, MapOf) else None


def _retain(target: dict[str, Any], patch: dict[str, Any]) -> None:
    if RETAIN_KEYS not in patch:
        return
    kept = patch[RETAIN_KEYS]
    if not isinstance(kept, list):
        raise bad_request("invalid patch format of retainKeys")
    if any(name not in kept for name, value in patch.items() if not name.startswith("$") and value is not None):
        raise bad_request("the $retainKeys of a patch must name every field that the patch sets")
    for name in [name for name in target if name not in kept]:
        del target[name]


def _ordered_lists(patch: dict[str, Any]) -> list[str]:
    """Names of lists that directives speak of; the others are merged as members."""
    prefixes = (ORDER_PREFIX, DELETE_PREFIX)
    names = [name.removeprefix(p) for name in patch for p in prefixes if name.startswith(p)]
    unknown = [n for n in patch if n.startswith("$") and n not in (PATCH, RETAIN_KEYS) and not n.startswith(prefixes)]
    if unknown:
        raise bad_request(f"unknown directive in the patch: {unknown[0]}")
    return list(dict.fromkeys(names))


def _merge_ordered_list(target: dict[str, Any], name: str, patch: dict[str, Any], kind: Type | None) -> None:
    deleted = _directive_list(patch, DELETE_PREFIX + name)
    if deleted and isinstance(target.get(name), list):
        target[name] = [item for item in target[name] if not _among(item, deleted, "")]
    order = _directive_list(patch, ORDER_PREFIX + name)
    if order is None:
        return
    key = kind.merge_key if isinstance(kind, ListOf) else ""
    given = patch.get(name)
    _check_order(given, order, key)
    before = list(target.get(name) or [])
    if name in patch:
        _merge_member(target, name, given, patch, kind)
    if isinstance(target.get(name), list):
        target[name] = _in_order(target[name], order, before, key)


def _directive_list(patch: dict[str, Any], name: str) -> list[Any] | None:
    value = patch.get(name)
    if name in patch and not isinstance(value, list):
        raise bad_request(f"invalid patch format: {name} is no list")
    return value


def _check_order(given: Any, order: list[Any], key: str) -> None:
    if not isinstance(given, list):
        return
    if key and not all(isinstance(item, dict) and key in item for item in order):
        raise bad_request(f"invalid patch format of setElementOrder list: each entry is to have {key!r}")
    named = [item for item in given if not (isinstance(item, dict) and PATCH in item)]
    places = [_find(item, order, key) for item in named]
    if -1 in places or places != sorted(places):
        raise bad_request(f"The order in patch list:\n{named}\n doesn't match $setElementOrder list:\n{order}\n")


def _merge_member(target: dict[str, Any], name: str, value: Any, patch: dict[str, Any], kind: Type | None) -> None:
    if value is None:
        target.pop(name, None)
    elif isinstance(value, dict):
        old = target.get(name)
        target[name] = _merge_object(old if isinstance(old, dict) else {}, value, kind)
    elif isinstance(value, list):
        target[name] = _merge_list(target.get(name), value, kind)
    else:
        target[name] = value


def _merge_list(old: Any, given: list[Any], kind: Type | None) -> list[Any]:
    if not isinstance(kind, ListOf) or not kind.merge:
        return [_without_directives(item) for item in given]
    before = old if isinstance(old, list) else []
    if not kind.merge_key:
        return _in_order(_union(before, given), given, before, "")
    return _merge_entries(before, given, kind)


def _without_directives(value: Any) -> Any:
    """A value as it stands in a patch where nothing is to be merged with: directives say nothing there."""
    if isinstance(value, dict):
        return {k: _without_directives(v) for k, v in value.items() if not k.startswith("$") and v is not None}
    return [_without_directives(item) for item in value] if isinstance(value, list) else value


def _union(before: list[Any], given: list[Any]) -> list[Any]:
    merged: list[Any] = []
    for item in [*before, *given]:
        if not _among(item, merged, ""):
            merged.append(item)
    return merged


def _merge_entries(before: list[Any], given: list[Any], kind: ListOf) -> list[Any]:
    key, merged, plain = kind.merge_key, list(before), []
    replace = any(isinstance(item, dict) and item.get(PATCH) == "replace" for item in given)
    if replace:
        merged, before = [], []
    for item in given:
        directive = item.get(PATCH) if isinstance(item, dict) else None
        if directive == "replace":
            item = {name: value for name, value in item.items() if name != PATCH}
            if not item:
                continue
        elif directive not in (None, "delete", "merge"):
            raise bad_request(f"unknown patch type found: {directive}")
        _need_key(item, key)
        if directive == "delete":
            merged = [entry for entry in merged if not _same(entry, item, key)]
            continue
        plain.append(item)
        _merge_entry(merged, item, kind)
    return _in_order(merged, plain, before, key)


def _merge_entry(merged: list[Any], item: dict[str, Any], kind: ListOf) -> None:
    place = _find(item, merged, kind.merge_key)
    if place < 0:
        merged.append(_merge_object({}, item, kind.item))
    else:
        merged[place] = _merge_object(merged[place], item, kind.item)


def _need_key(item: Any, key: str) -> None:
    if not isinstance(item, dict):
        raise unprocessable(f"an entry of a list merged by {key!r} is no object: {item!r}")
    if item.get(key) is None:
        raise unprocessable(f"map: {item} does not contain declared merge key: {key}")


def _same(left: Any, right: Any, key: str) -> bool:
    if not key:
        return equal(left, right)
    return isinstance(left, dict) and isinstance(right, dict) and key in left and equal(left[key], right.get(key))


def _find(item: Any, among: list[Any], key: str) -> int:
    return next((place for place, entry in enumerate(among) if _same(entry, item, key)), -1)


def _among(item: Any, among: list[Any], key: str) -> bool:
    return _find(item, among, key) >= 0


def _in_order(merged: list[Any], order: list[Any], before: list[Any], key: str) -> list[Any]:
    """`merged` as `order` has it; entries that only the server has stand before the first that they preceded."""
    result = sorted((e for e in merged if _among(e, order, key)), key=lambda entry: _find(entry, order, key))
    rest = [entry for entry in merged if not _among(entry, order, key)]
    rest.sort(key=lambda entry: _find(entry, before, key))
    start = 0
    for entry in rest:
        start = _place_of(entry, result, start, before, key)
        result.insert(start, entry)
        start += 1
    return result


def _place_of(entry: Any, result: list[Any], start: int, before: list[Any], key: str) -> int:
    here = _find(entry, before, key)
    for place in range(start, len(result)):
        if 0 <= here < _find(result[place], before, key):
            return place
    return len(result)
