"""Small questions that everybody asks of an object's metadata and conditions. Pure; objects are plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from hypervisor.kube.client import Object
from hypervisor.kube.resources import Resource

Key = tuple[str, str]
"""Namespace (empty for objects that have none) and name."""


def key_of(obj: Mapping[str, Any]) -> Key:
    """What names the object within its kind."""
    metadata = obj.get("metadata") or {}
    return str(metadata.get("namespace") or ""), str(metadata.get("name") or "")


def shown(key: Key) -> str:
    """``namespace/name``, or the name of what has no namespace."""
    return "/".join(filter(None, key))


def get(obj: Any, *path: str | int, default: Any = None) -> Any:
    """The value below `path` in nested maps and lists; `default` where a step is missing or null."""
    for step in path:
        try:
            obj = obj[step]
        except (KeyError, IndexError, TypeError):
            return default
    return default if obj is None else obj


def uid_of(obj: Mapping[str, Any]) -> str:
    """``metadata.uid``, or nothing."""
    return str(get(obj, "metadata", "uid", default=""))


def version_of(obj: Mapping[str, Any]) -> str:
    """``metadata.resourceVersion``, or nothing."""
    return str(get(obj, "metadata", "resourceVersion", default=""))


def labels_of(obj: Mapping[str, Any]) -> Mapping[str, str]:
    """``metadata.labels``, never None."""
    labels: Mapping[str, str] = get(obj, "metadata", "labels", default={})
    return labels


def is_deleting(obj: Mapping[str, Any]) -> bool:
    """Its deletion was asked for."""
    return get(obj, "metadata", "deletionTimestamp") is not None


# ---- time ------------------------------------------------------------------------------------------------------------


def rfc3339(seconds: float, *, micro: bool = False) -> str:
    """Seconds since the epoch as ``metav1.Time`` has them, or with `micro` as ``metav1.MicroTime``."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ" if micro else "%Y-%m-%dT%H:%M:%SZ")


def now(*, micro: bool = False) -> str:
    """The present, as `rfc3339`."""
    return rfc3339(datetime.now(UTC).timestamp(), micro=micro)


def parse_time(text: str) -> float:
    """Seconds since the epoch.

    :raises ValueError: no RFC 3339 time
    """
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


# ---- owners ----------------------------------------------------------------------------------------------------------


def owner_reference(resource: Resource, owner: Mapping[str, Any], *, controller: bool = True) -> Object:
    """The reference that makes `owner` the owner; as a controller it also blocks its foreground deletion."""
    reference: Object = {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "name": get(owner, "metadata", "name"),
        "uid": uid_of(owner),
    }
    return reference | ({"controller": True, "blockOwnerDeletion": True} if controller else {})


def owners_of(obj: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """``metadata.ownerReferences``, never None."""
    owners: Sequence[Mapping[str, Any]] = get(obj, "metadata", "ownerReferences", default=())
    return owners


def controller_of(obj: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The reference to the one owner that controls it."""
    return next((o for o in owners_of(obj) if o.get("controller")), None)


# ---- conditions ------------------------------------------------------------------------------------------------------


def condition(obj: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """The condition of that type in ``status.conditions``."""
    return next((c for c in get(obj, "status", "conditions", default=()) if c.get("type") == kind), None)


def is_true(obj: Mapping[str, Any], kind: str) -> bool:
    """The condition is there and ``True``."""
    found = condition(obj, kind)
    return found is not None and found.get("status") == "True"


def with_condition(conditions: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> list[Object]:
    """`conditions` with `new` in place of the one of its type; where the status stays, so does lastTransitionTime."""
    old = next((c for c in conditions if c.get("type") == new["type"]), None)
    merged = dict(new)
    if old is not None and old.get("status") == new.get("status") and old.get("lastTransitionTime"):
        merged["lastTransitionTime"] = old["lastTransitionTime"]
    else:
        merged.setdefault("lastTransitionTime", now())
    if old is None:
        return [*map(dict, conditions), merged]
    return [merged if c is old else dict(c) for c in conditions]
