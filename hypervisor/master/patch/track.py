"""Ordinary writes in ``managedFields``: whoever writes a field another value owns it from then on, alone.

Theory of operation: old and new object are compared; the fields that were added or modified leave every other
manager's set and enter the writer's; fields that are gone leave all sets. A writer never conflicts: that is what
distinguishes an update from an apply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hypervisor.master.patch import managers
from hypervisor.master.patch.fieldset import Difference, FieldSet, compare
from hypervisor.master.patch.managers import UNTRACKED, Entries, Entry, Identity
from hypervisor.master.schema.types import Struct

Object = dict[str, Any]


def track_update(
    old: Mapping[str, Any] | None,
    new: Object,
    manager: str,
    operation: managers.Operation = "Update",
    subresource: str = "",
    kind: Struct | None = None,
) -> None:
    """Set ``new.metadata.managedFields`` after a write by `manager`; in place.

    What `new` brings as managedFields is taken as the record to go on from (clients migrate ownership that way),
    unless it is absent or unreadable, or the write was to a subresource: then `old`'s is. ``[{}]`` forgets all.

    :param old: None for a create
    """
    metadata = new.setdefault("metadata", {})
    given = metadata.pop("managedFields", None)
    if managers.is_reset(given) and not subresource:
        return
    before = managers.parse((old or {}).get("metadata", {}).get("managedFields")) or {}
    entries = (None if subresource else managers.parse(given)) or before
    who = Identity(manager, operation, str(new.get("apiVersion", "")), subresource)
    changed = difference(_seed(new) if old is None else old, new, kind)
    entries = _written(entries, who, changed)
    rendered = managers.render(managers.bounded(entries).values())
    if rendered:
        metadata["managedFields"] = rendered


def _seed(new: Mapping[str, Any]) -> dict[str, Any]:
    """What a new object is compared with: nothing, in as many top-level parts as it has."""
    return {key: {} for key, value in new.items() if isinstance(value, dict) and key in ("metadata", "spec", "status")}


def difference(old: Mapping[str, Any], new: Mapping[str, Any], kind: Struct | None) -> Difference:
    """What a write did, without what is the server's own."""
    found = compare(_tracked(old), _tracked(new), kind)
    return Difference(*(part.without(*UNTRACKED) for part in (found.added, found.modified, found.removed)))


_OWN = frozenset(path[1][2:] for path in UNTRACKED if len(path) == 2)


def _tracked(obj: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {key: value for key, value in (obj.get("metadata") or {}).items() if key not in _OWN}
    return {key: value for key, value in obj.items() if key not in ("apiVersion", "kind")} | {"metadata": metadata}


def _written(entries: Entries, who: Identity, changed: Difference) -> Entries:
    if not changed.written and not changed.removed:
        return entries
    taken = changed.written | changed.removed
    kept = {identity: replace(e, fields=e.fields - taken) for identity, e in entries.items() if identity != who}
    mine = entries.get(who, Entry(who, FieldSet()))
    fields = mine.fields - changed.removed | changed.written
    if fields == mine.fields:
        return kept | {who: mine} if mine.fields else kept
    return kept | {who: Entry(who, fields, managers.now())}
