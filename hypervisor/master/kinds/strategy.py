"""What happens to an object on its way in, by the row of its kind: prepared, given its defaults, checked.

Order of a create: `conform` (schema), `prepare_create`, admission, `check`. Of an update: `conform`, `prepare_update`,
admission, `check_update`. Which part of an object a request may write follows from its subresource: without one
everything but ``status``, with ``status`` nothing else.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from hypervisor.kube.errors import Cause
from hypervisor.master.kinds import rules
from hypervisor.master.kinds.kind import Kind, Object
from hypervisor.master.schema.conform import missing
from hypervisor.master.schema.load import Schema

# Kinds whose keepers write metadata together with the status (a node's labels, a pod's conditions and annotations).
_METADATA_WITH_STATUS = frozenset({"Node", "Pod"})


def prepare_create(kind: Kind, obj: Object) -> None:
    """A new object as its kind begins, with its defaults and uid; in place. What a client may not set is gone."""
    obj.setdefault("metadata", {})["uid"] = str(uuid.uuid4())  # before defaults: a Job's labels hold it
    if kind.has_status:
        obj.pop("status", None)
    kind.prepare_create(obj)
    kind.default(obj)


def prepare_update(kind: Kind, new: Object, old: Mapping[str, Any], subresource: str = "") -> None:
    """`new` with what this request may not write taken from `old`, and with its defaults; in place.

    Parts of `old` come to stand in `new`: change neither afterwards, or copy.
    """
    if subresource in ("status", "approval"):
        _only_status(kind, new, old)
        return  # everything else is as it was stored, with its defaults
    if subresource == "finalize":
        _take(new, old, "status")
    elif kind.has_status:
        _take(new, old, "status")
        if kind.resource.kind == "Namespace":
            _take(new, old, "spec")
    if kind.resource.kind == "Job" and not subresource:
        _job_labels(new, old)
    kind.default(new)


def _take(new: Object, old: Mapping[str, Any], name: str) -> None:
    if name in old:
        new[name] = old[name]
    else:
        new.pop(name, None)


def _only_status(kind: Kind, new: Object, old: Mapping[str, Any]) -> None:
    for name in {*new, *old} - {"status", "metadata", "apiVersion", "kind"}:
        _take(new, old, name)
    metadata, was = new.setdefault("metadata", {}), old["metadata"]
    kept = ("ownerReferences", "finalizers")
    for name in kept if kind.resource.kind in _METADATA_WITH_STATUS else (*kept, "labels"):
        _take(metadata, was, name)


def _job_labels(new: Object, old: Mapping[str, Any]) -> None:
    """A client that applies its own manifest again leaves out the selector that was generated: it stays."""
    after, before = new.get("spec") or {}, old.get("spec") or {}
    if after.get("manualSelector") or after.get("selector") is not None or before.get("selector") is None:
        return
    after["selector"] = before["selector"]
    made, was = after.get("template"), before.get("template") or {}
    if isinstance(made, dict):
        generated = {k: v for k, v in _labels(was).items() if "controller-uid" in k or "job-name" in k}
        made.setdefault("metadata", {})["labels"] = generated | _labels(made)


def _labels(obj: Mapping[str, Any]) -> dict[str, Any]:
    return (obj.get("metadata") or {}).get("labels") or {}


def check(kind: Kind, obj: Mapping[str, Any]) -> list[Cause]:
    """Everything wrong with a new object; empty when it may be stored."""
    found = [*_metadata(kind, obj), *kind.validate(obj)]
    return _distinct([*found, *missing(obj, Schema.load().of(kind))])


def check_update(kind: Kind, new: Mapping[str, Any], old: Mapping[str, Any], subresource: str = "") -> list[Cause]:
    """Everything wrong with a change; empty when it may be stored. What did not change is not looked at again."""
    found: list[Cause] = []
    if _rest(kind, new) != _rest(kind, old):
        found += kind.validate(new)
        found += missing(new, Schema.load().of(kind))
    if new.get("metadata") != old.get("metadata"):
        found += _metadata(kind, new)
    if not subresource or subresource in ("status", "approval"):
        found += kind.validate_update(new, old)
    return _distinct(found)


def _rest(kind: Kind, obj: Mapping[str, Any]) -> dict[str, Any]:
    """An object without what its kind's rules do not look at."""
    all_of_it = kind.struct is not None or kind.resource.kind in ("Node", "CertificateSigningRequest")
    skipped = ("metadata",) if all_of_it else ("metadata", "status")
    return {key: value for key, value in obj.items() if key not in skipped}


def _metadata(kind: Kind, obj: Mapping[str, Any]) -> Iterable[Cause]:
    return rules.metadata(obj.get("metadata") or {}, kind.name_error) if kind.stored else ()


def _distinct(causes: list[Cause]) -> list[Cause]:
    """One cause of each reason per field: a rule's words before the schema's."""
    kept: dict[tuple[str, str, str], Cause] = {}
    for cause in causes:
        again = cause.message if cause.reason != "FieldValueRequired" else ""
        kept.setdefault((cause.reason, cause.field, again), cause)
    return list(kept.values())
