"""``metadata.managedFields``: who has set which field, read, written and kept within bounds.

Source: Kubernetes, "Server-Side Apply", "Managers"; KEP-555.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from hypervisor.master.patch.fieldset import FieldSet, Path

Operation = Literal["Apply", "Update"]
MAX_UPDATERS = 10
"""Managers of ordinary updates beyond these are taken together as `ANCIENT`."""
ANCIENT = "ancient-changes"
BEFORE_FIRST_APPLY = "before-first-apply"
UNTRACKED: tuple[Path, ...] = (
    ("f:apiVersion",),
    ("f:kind",),
    *(
        ("f:metadata", f"f:{name}")
        for name in (
            "name",
            "namespace",
            "creationTimestamp",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "selfLink",
            "uid",
            "generation",
            "managedFields",
            "resourceVersion",
        )
    ),
)
"""What is the server's own, and so nobody's."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes two writers two: a client's name alone does not."""

    manager: str
    operation: Operation
    api_version: str
    subresource: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One manager's fields, and when they last changed."""

    identity: Identity
    fields: FieldSet
    time: str = ""

    def render(self) -> dict[str, Any]:
        """As an entry of ``managedFields``."""
        who = self.identity
        made = {
            "manager": who.manager,
            "operation": who.operation,
            "apiVersion": who.api_version,
            "time": self.time or None,
            "fieldsType": "FieldsV1",
            "fieldsV1": self.fields.render(),
            "subresource": who.subresource or None,
        }
        return {key: value for key, value in made.items() if value is not None}


Entries = dict[Identity, Entry]


def now() -> str:
    """The time of a change, as entries have it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse(listed: Any) -> Entries | None:
    """The entries of a ``managedFields``; None when it is absent, empty or not to be read (then the old one stays)."""
    if not isinstance(listed, list) or not listed:
        return None
    try:
        entries = [_entry(one) for one in listed]
    except (ValueError, TypeError, AttributeError):
        return None
    found: Entries = {}
    for entry in entries:
        before = found.get(entry.identity)
        found[entry.identity] = replace(entry, fields=entry.fields | before.fields) if before else entry
    return found


def _entry(one: Mapping[str, Any]) -> Entry:
    operation = one.get("operation")
    if operation not in ("Apply", "Update") or one.get("fieldsType") != "FieldsV1":
        raise ValueError("no entry of managedFields")
    identity = Identity(
        str(one.get("manager", "")), operation, str(one.get("apiVersion", "")), str(one.get("subresource", ""))
    )
    return Entry(identity, FieldSet.parse(one.get("fieldsV1") or {}), str(one.get("time") or ""))


def is_reset(listed: Any) -> bool:
    """A client that writes one empty entry wants everything forgotten."""
    return isinstance(listed, list) and listed == [{}]


def render(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """As ``managedFields``: applied ones first, each by time; those without fields left out."""
    kept = [entry for entry in entries if entry.fields]
    order = {"Apply": 0, "Update": 1}
    kept.sort(key=lambda e: (order[e.identity.operation], e.time, e.identity.manager, e.identity.subresource))
    return [entry.render() for entry in kept]


def bounded(entries: Entries) -> Entries:
    """With the oldest updaters taken together, so that an object's record does not grow with its age."""
    updaters = [e for e in entries.values() if e.identity.operation == "Update" and e.fields]
    surplus = len(updaters) - MAX_UPDATERS
    if surplus <= 0:
        return entries
    updaters.sort(key=lambda entry: entry.time)
    kept = dict(entries)
    for entry in updaters[: surplus + 1]:
        del kept[entry.identity]
        who = Identity(ANCIENT, "Update", entry.identity.api_version)
        before = kept.get(who)
        fields = entry.fields | before.fields if before else entry.fields
        kept[who] = Entry(who, fields, entry.time)
    return kept
