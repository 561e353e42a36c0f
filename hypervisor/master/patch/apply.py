"""Server-side apply: an applier says what it wants of an object, and owns that and nothing else.

Theory of operation: the applied configuration is merged into the live object, field by field as its type says. Fields
that this applier had applied before and no longer does go, unless another manager has them too. The result is compared
with the live object: a field that changed and belongs to another manager is a conflict, unless the applier forces its
way, which takes the field over. A field applied with the value that it has is owned by both.

Source: Kubernetes, "Server-Side Apply"; KEP-555; structured-merge-diff's description of merge and prune.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hypervisor.kube.errors import ApiError, bad_request
from hypervisor.master.patch import managers
from hypervisor.master.patch.fieldset import FieldSet, Path, children, element_of, granular, path_text, set_of
from hypervisor.master.patch.managers import BEFORE_FIRST_APPLY, UNTRACKED, Entries, Entry, Identity
from hypervisor.master.patch.track import difference
from hypervisor.master.patch.values import copy
from hypervisor.master.schema.types import ListOf, Struct, Type

Object = dict[str, Any]

KUBECTL = "kubectl"
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
"""The annotation in which kubectl notes what it applied on the client's side."""


def apply(
    live: Mapping[str, Any] | None,
    applied: Mapping[str, Any],
    manager: str,
    kind: Struct,
    force: bool = False,
    *,
    subresource: str = "",
    reset: Sequence[str] = (),
) -> Object:
    """The object that results, with its ``managedFields``; neither argument is changed.

    :param live: None when the object is not there yet
    :param applied: of this type, its scalars in their kept form (`conform`); without ``managedFields``
    :param reset: top-level fields that may not be written this way: nothing of them is merged, or owned
    :raises ApiError: 409 with a cause per field that another manager owns; 400 `applied` has managedFields, or two
        entries with the same keys
    """
    if (applied.get("metadata") or {}).get("managedFields"):
        raise bad_request("metadata.managedFields must be nil")
    wanted = {key: _without_nulls(value) for key, value in applied.items() if key not in reset and value is not None}
    _no_doubles(wanted, kind, "")
    before = copy(live) if live is not None else {}
    entries = _entries(before, live is not None, kind)
    who = Identity(manager, "Apply", str(applied.get("apiVersion", "")), subresource)
    mine = set_of(wanted, kind).without(*UNTRACKED)
    last = entries.get(who, Entry(who, FieldSet())).fields
    merged: Object = merge(before, wanted, kind)
    others = [entry.fields for identity, entry in entries.items() if identity != who]
    remove(merged, kind, last - mine, keep=mine.prefixes().union(*(fields.prefixes() for fields in others)))
    allowed = _from_last_applied(before, kind) if manager == KUBECTL else FieldSet()
    entries = _settle(entries, who, mine, before, merged, kind, allowed, force)
    if manager == KUBECTL:
        _note_last_applied(merged, before, wanted)
    merged.setdefault("metadata", {})["managedFields"] = managers.render(entries.values())
    return merged


def _entries(live: Object, exists: bool, kind: Struct) -> Entries:
    """Who owns what of the live object; one whose record was lost belongs to one before everybody."""
    listed = live.get("metadata", {}).pop("managedFields", None)
    entries = managers.parse(listed)
    if entries is None and exists:
        who = Identity(BEFORE_FIRST_APPLY, "Update", str(live.get("apiVersion", "")))
        return {who: Entry(who, set_of(live, kind).without(*UNTRACKED), managers.now())}
    return entries or {}


def _settle(
    entries: Entries,
    who: Identity,
    mine: FieldSet,
    live: Object,
    merged: Object,
    kind: Struct,
    allowed: FieldSet,
    force: bool,
) -> Entries:
    """Everybody's fields after the apply; those `allowed` are taken over without force.

    :raises ApiError: 409
    """
    changed = difference(live, merged, kind)
    others = {identity: entry for identity, entry in entries.items() if identity != who}
    conflicts = {i: found for i, entry in others.items() if (found := entry.fields & changed.written)}
    if not force and any(fields - allowed for fields in conflicts.values()):
        raise _conflict([(entries[identity], fields) for identity, fields in conflicts.items()])
    taken = changed.written | changed.removed
    settled = {identity: replace(entry, fields=entry.fields - taken) for identity, entry in others.items()}
    last = entries.get(who)
    same = last is not None and last.fields == mine and not taken
    return settled | {who: last if last and same else Entry(who, mine, managers.now())}


def _last_applied(obj: Mapping[str, Any]) -> Any:
    return ((obj.get("metadata") or {}).get("annotations") or {}).get(LAST_APPLIED)


def _from_last_applied(live: Mapping[str, Any], kind: Struct) -> FieldSet:
    """What kubectl has applied on the client's side before: its own, now that it applies on the server's."""
    try:
        before = json.loads(_last_applied(live) or "null")
    except (TypeError, ValueError, RecursionError):
        return FieldSet()
    return set_of(before, kind) if isinstance(before, dict) else FieldSet()


def _note_last_applied(merged: Object, live: Mapping[str, Any], wanted: Object) -> None:
    """Keeps kubectl's note of what it applied true, so that the user can go back to applying on the client's side."""
    if _last_applied(live) is None:
        return
    metadata = {key: value for key, value in wanted.get("metadata", {}).items() if key != "annotations"}
    annotations = {k: v for k, v in (wanted.get("metadata", {}).get("annotations") or {}).items() if k != LAST_APPLIED}
    noted = wanted | {"metadata": metadata | {"annotations": annotations}}
    kept = merged.setdefault("metadata", {}).setdefault("annotations", {})
    kept[LAST_APPLIED] = json.dumps(noted, separators=(",", ":"), sort_keys=True) + "\n"


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _no_doubles(value: Any, kind: Type | None, path: str) -> None:
    """In a list whose entries have an owner each, no two may be the same."""
    if isinstance(kind, ListOf) and kind.list_type != "atomic" and isinstance(value, list):
        seen: set[str] = set()
        for item in value:
            element = element_of(item, kind)
            if element in seen:
                raise bad_request(
                    f"failed to create typed patch object: {path}: duplicate entries for key {element[2:]}"
                )
            seen.add(element)
    if granular(value, kind):
        for element, (item, inner) in children(value, kind).items():
            _no_doubles(item, inner, path + path_text((element,)))


# ---- conflicts -------------------------------------------------------------------------------------------------------


def _shown(entry: Entry) -> str:
    """A manager as upstream's message names it."""
    who = entry.identity
    text = json.dumps(who.manager)
    if who.subresource:
        text += f" with subresource {json.dumps(who.subresource)}"
    if who.operation == "Update":
        text += f" using {who.api_version}" + (f" at {entry.time}" if entry.time else "")
    return text


def _conflict(conflicts: list[tuple[Entry, FieldSet]]) -> ApiError:
    listed = [(_shown(entry), path_text(path)) for entry, fields in conflicts for path in sorted(fields.paths)]
    causes = [
        {"reason": "FieldManagerConflict", "message": f"conflict with {who}", "field": path} for who, path in listed
    ]
    if len(listed) == 1:
        text = f"Apply failed with 1 conflict: conflict with {listed[0][0]}: {listed[0][1]}"
    else:
        lines = []
        for who in sorted({who for who, _ in listed}):
            lines += [f"conflicts with {who}:", *(f"- {path}" for other, path in listed if other == who)]
        text = f"Apply failed with {len(listed)} conflicts: " + "\n".join(lines)
    return ApiError("Conflict", text, details={"causes": causes})


# ---- merge and remove ------------------------------------------------------------------------------------------------


def merge(live: Any, applied: Any, kind: Type | None) -> Any:
    """`live` with `applied` in it, as the type has it; both stay as they are."""
    if not granular(live, kind) or not granular(applied, kind):
        return copy(applied)
    if isinstance(kind, ListOf):
        return _merge_list(live, applied, kind)
    merged = copy(live)
    for element, (item, inner) in children(applied, kind).items():
        name = element[2:]
        merged[name] = merge(live[name], item, inner) if name in live else copy(item)
    return merged


def _merge_list(live: list[Any], applied: list[Any], kind: ListOf) -> list[Any]:
    """Entries of both: those applied in the order applied, the others where they stood among them."""
    before = {element_of(item, kind): item for item in reversed(live)}
    given = {element_of(item, kind): item for item in applied}
    order = interleave(list(given), [element_of(item, kind) for item in live])
    made = []
    for element in order:
        old, new = before.get(element), given.get(element)
        made.append(copy(old) if new is None else copy(new) if old is None else merge(old, new, kind.item))
    return made


def interleave(wanted: list[str], before: list[str]) -> list[str]:
    """`wanted` in its order, with what stands only in `before` as early as its old order allows."""
    result, place = list(wanted), {element: index for index, element in enumerate(before)}
    start = 0
    for element in dict.fromkeys(e for e in before if e not in set(wanted)):
        here = place[element]
        start = next((i for i in range(start, len(result)) if place.get(result[i], -1) > here), len(result))
        result.insert(start, element)
        start += 1
    return result


def remove(obj: Any, kind: Type | None, fields: FieldSet, keep: frozenset[Path] = frozenset(), path: Path = ()) -> None:
    """Take `fields` out of `obj`, in place, except where `keep` has them or something below them.

    An object or list that becomes empty by it goes too, when nobody keeps it.
    """
    doomed = fields.prefixes()
    _remove(obj, kind, fields.paths, doomed, keep, path)


def _remove(
    obj: Any, kind: Type | None, fields: frozenset[Path], doomed: frozenset[Path], keep: frozenset[Path], path: Path
) -> None:
    for element, (item, inner) in children(obj, kind).items():
        here = (*path, element)
        if here not in doomed:
            continue
        looked_into = granular(item, inner) and bool(item)
        if here in fields and here not in keep:
            _drop(obj, kind, element)
            continue
        if looked_into:
            _remove(item, inner, fields, doomed, keep, here)
            if not item and here not in keep:
                _drop(obj, kind, element)


def _drop(obj: Any, kind: Type | None, element: str) -> None:
    if isinstance(kind, ListOf):
        obj[:] = [item for item in obj if element_of(item, kind) != element]
    else:
        obj.pop(element[2:], None)
