"""What a DELETE does to an object: at once, or marked and left to its finalizers and to the node's grace period.

Source: Kubernetes concepts, "Finalizers", "Garbage collection" (foreground, background, orphan) and "Pod lifecycle"
(termination); the way of graceful deletion in upstream's generic registry.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypervisor.kube.client import Object, Propagation
from hypervisor.kube.errors import conflict
from hypervisor.kube.meta import get, is_deleting, parse_time, rfc3339
from hypervisor.master.kinds.kind import Kind
from hypervisor.master.registry.metadata import pending_finalizers

FOREGROUND = "foregroundDeletion"
ORPHAN = "orphan"
DEFAULT_GRACE_S = 30


@dataclass(frozen=True, slots=True)
class DeleteOptions:
    """:ivar grace_s: only pods have grace; None: the pod's own
    :ivar propagation: None: what the object's finalizers say
    :ivar uid: precondition, as is `resource_version`
    """

    grace_s: int | None = None
    propagation: Propagation | None = None
    uid: str = ""
    resource_version: str = ""
    dry_run: bool = False


BY_DEFAULT = DeleteOptions()


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a delete did.

    :ivar object: as it is now, or as it was last
    :ivar removed: it is gone; otherwise it waits for its finalizers, or for the node to stop it
    """

    object: Object
    removed: bool


def check_preconditions(kind: Kind, obj: Mapping[str, Any], options: DeleteOptions) -> None:
    """:raises ApiError: Conflict"""
    metadata, resource = obj["metadata"], kind.resource
    for word, wanted, found in (
        ("UID", options.uid, metadata["uid"]),
        ("ResourceVersion", options.resource_version, metadata["resourceVersion"]),
    ):
        if wanted and wanted != found:
            why = f"Precondition failed: {word} in precondition: {wanted}, {word} in object meta: {found}"
            raise conflict(resource.group, resource.plural, metadata["name"], why)


def marked(kind: Kind, obj: Object, options: DeleteOptions) -> Object | None:
    """The object as the delete leaves it; None: it goes at once.

    :param obj: a copy, which is changed
    """
    metadata = obj["metadata"]
    finalizers = _finalizers(metadata.get("finalizers") or (), options.propagation)
    if finalizers:
        metadata["finalizers"] = finalizers
    else:
        metadata.pop("finalizers", None)
    grace = _grace(kind, obj, options.grace_s)
    if not grace and not pending_finalizers(obj):
        return None
    if is_deleting(obj):
        _shorten(metadata, grace)
    else:
        metadata["deletionTimestamp"] = rfc3339(time.time() + grace)
        metadata["deletionGracePeriodSeconds"] = grace
        if "generation" in metadata:
            metadata["generation"] += 1
        if kind.resource.kind == "Namespace":
            obj["status"] = {**(obj.get("status") or {}), "phase": "Terminating"}
    return obj


def _finalizers(given: tuple[str, ...] | list[str], propagation: Propagation | None) -> list[str]:
    if propagation is None:
        return list(given)
    kept = [f for f in given if f not in (FOREGROUND, ORPHAN)]
    return kept + {"Foreground": [FOREGROUND], "Orphan": [ORPHAN], "Background": []}[propagation]


def _grace(kind: Kind, obj: Mapping[str, Any], asked: int | None) -> int:
    """Seconds that the node has to stop a pod; 0 for a pod that no node runs, and for everything else."""
    if (kind.resource.group, kind.resource.kind) != ("", "Pod"):
        return 0
    if not get(obj, "spec", "nodeName") or get(obj, "status", "phase") in ("Succeeded", "Failed"):
        return 0
    if asked is not None:
        return max(asked, 0)
    if is_deleting(obj):
        return int(get(obj, "metadata", "deletionGracePeriodSeconds", default=0))
    return int(get(obj, "spec", "terminationGracePeriodSeconds", default=DEFAULT_GRACE_S))


def _shorten(metadata: Object, grace: int) -> None:
    """A second delete can make the grace period shorter, never longer; it still counts from the first."""
    had = int(metadata.get("deletionGracePeriodSeconds") or 0)
    if grace < had:
        asked_at = parse_time(metadata["deletionTimestamp"]) - had
        metadata["deletionTimestamp"] = rfc3339(asked_at + grace)
        metadata["deletionGracePeriodSeconds"] = grace
