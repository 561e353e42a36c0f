"""What the server, not the client, says about an object's metadata.

Source: Kubernetes API conventions, "Metadata", and the rules of upstream's generic registry for updates.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping
from typing import Any

from hypervisor.kube.client import Object
from hypervisor.kube.errors import Cause, bad_request, conflict, invalid
from hypervisor.kube.meta import get, is_deleting, now
from hypervisor.master.kinds.kind import Kind

SUFFIX_LENGTH = 5
SUFFIX_LETTERS = "bcdfghjklmnpqrstvwxz2456789"  # no vowels: no words
LONGEST_BASE = 63 - SUFFIX_LENGTH
FROZEN = ("name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds")


def new_object(kind: Kind, obj: Mapping[str, Any], namespace: str, uid: str = "") -> Object:
    """The object as it is created: a copy with uid, creationTimestamp and generation; `generateName` is left to do.

    :param uid: the server's choice, where defaults hold it already; empty: another one is made

    :raises ApiError: BadRequest: another namespace, or one too many; Invalid: no name
    """
    metadata = dict(obj.get("metadata") or {})
    _place(kind, metadata, namespace)
    for key in ("resourceVersion", "selfLink", "deletionTimestamp", "deletionGracePeriodSeconds"):
        metadata.pop(key, None)
    metadata |= {"uid": uid or str(uuid.uuid4()), "creationTimestamp": now()}
    if not metadata.get("name") and not metadata.get("generateName"):
        raise invalid(kind.resource.group, kind.resource.kind, "", [_required("metadata.name")])
    if kind.generation and "spec" in obj:
        metadata["generation"] = 1
    else:
        metadata.pop("generation", None)
    return {**obj, **_typed(kind), "metadata": metadata}


def named(obj: Object) -> Object:
    """The same with a name made of its ``generateName``."""
    metadata = obj["metadata"]
    base = str(metadata["generateName"])[:LONGEST_BASE]
    suffix = "".join(secrets.choice(SUFFIX_LETTERS) for _ in range(SUFFIX_LENGTH))
    return {**obj, "metadata": metadata | {"name": base + suffix}}


def changed_object(kind: Kind, new: Mapping[str, Any], old: Mapping[str, Any]) -> Object:
    """The object as it is updated: a copy with what only the server sets, and one generation more if its spec changed.

    :raises ApiError: Conflict: another resourceVersion or uid than the object's; Invalid: a field that may not change
    """
    metadata, was = dict(new.get("metadata") or {}), old["metadata"]
    _check_preconditions(kind, metadata, was)
    for key in FROZEN:
        if metadata.get(key) in (None, "") and key in was:
            metadata[key] = was[key]
    if is_deleting(old):
        metadata |= {key: was[key] for key in FROZEN[4:] if key in was}
    else:
        metadata.pop("deletionTimestamp", None)
        metadata.pop("deletionGracePeriodSeconds", None)
    causes = [_immutable(key, metadata[key]) for key in FROZEN if key in metadata and metadata[key] != was.get(key)]
    causes += _new_finalizers(metadata, was)
    if causes:
        raise invalid(kind.resource.group, kind.resource.kind, was["name"], causes)
    metadata.pop("generation", None)
    if "generation" in was:
        grown = kind.generation and new.get("spec") != old.get("spec")
        metadata["generation"] = was["generation"] + (1 if grown else 0)
    metadata["resourceVersion"] = was["resourceVersion"]
    return {**new, **_typed(kind), "metadata": metadata}


def pending_finalizers(obj: Mapping[str, Any]) -> bool:
    """Somebody still has to do something before the object may go. A namespace has finalizers in its spec too."""
    in_spec = obj.get("kind") == "Namespace" and get(obj, "spec", "finalizers")
    return bool(get(obj, "metadata", "finalizers") or in_spec)


def may_go(obj: Mapping[str, Any]) -> bool:
    """Its deletion was asked for, and neither finalizers nor grace hold it back."""
    grace = get(obj, "metadata", "deletionGracePeriodSeconds", default=0)
    return is_deleting(obj) and not grace and not pending_finalizers(obj)


def _typed(kind: Kind) -> Object:
    return {"apiVersion": kind.resource.api_version, "kind": kind.resource.kind}


def _place(kind: Kind, metadata: Object, namespace: str) -> None:
    given = metadata.get("namespace") or ""
    if not kind.resource.namespaced:
        if given:
            raise bad_request(f"metadata.namespace: a {kind.resource.kind} has none: leave it out")
        metadata.pop("namespace", None)
    elif given and given != namespace:
        raise bad_request(
            f"the namespace of the provided object does not match the namespace sent on the request: "
            f'"{given}" is not "{namespace}"'
        )
    elif not namespace:
        raise bad_request(f"metadata.namespace: a {kind.resource.kind} needs one")
    else:
        metadata["namespace"] = namespace


def _check_preconditions(kind: Kind, metadata: Mapping[str, Any], was: Mapping[str, Any]) -> None:
    resource = kind.resource
    uid = metadata.get("uid")
    if uid and uid != was["uid"]:
        why = f"Precondition failed: UID in precondition: {uid}, UID in object meta: {was['uid']}"
        raise conflict(resource.group, resource.plural, was["name"], why)
    version = metadata.get("resourceVersion")
    if version and version != was["resourceVersion"]:
        raise conflict(resource.group, resource.plural, was["name"])


def _new_finalizers(metadata: Mapping[str, Any], was: Mapping[str, Any]) -> list[Cause]:
    added = set(metadata.get("finalizers") or ()) - set(was.get("finalizers") or ())
    if not added or not was.get("deletionTimestamp"):
        return []
    why = f"Forbidden: no new finalizers can be added if the object is being deleted, found {', '.join(sorted(added))}"
    return [Cause("FieldValueForbidden", why, "metadata.finalizers")]


def _immutable(key: str, value: Any) -> Cause:
    return Cause("FieldValueInvalid", f'Invalid value: "{value}": field is immutable', f"metadata.{key}")


def _required(field: str) -> Cause:
    return Cause("FieldValueRequired", "Required value: name or generateName is required", field)
