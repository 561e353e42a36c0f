"""The status of a Deployment: its numbers, and whether it gets on. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.master.controllers.deployment.rollout import available, bounds, name_of, running

Set = Mapping[str, Any]


def counts(deployment: Mapping[str, Any], new: Set | None, sets: Sequence[Set]) -> dict[str, int]:
    """The numbers."""
    total, ready = sum(map(available, sets)), sum(int(meta.get(s, "status", "readyReplicas", default=0)) for s in sets)
    return {
        "observedGeneration": int(meta.get(deployment, "metadata", "generation", default=0)),
        "replicas": sum(map(running, sets)),
        "updatedReplicas": running(new) if new else 0,
        "readyReplicas": ready,
        "availableReplicas": total,
        "unavailableReplicas": max(0, sum(map(running, sets)) - total, bounds(deployment).desired - total),
    }


def is_complete(deployment: Mapping[str, Any], numbers: Mapping[str, int]) -> bool:
    """All pods are of the present template, available, and no others are left."""
    desired = bounds(deployment).desired
    return numbers["updatedReplicas"] == numbers["replicas"] == numbers["availableReplicas"] == desired


def conditions(
    deployment: Mapping[str, Any], new: Set | None, numbers: Mapping[str, int], sets: Sequence[Set], now: float
) -> list[Object]:
    """``Available``, ``Progressing`` and ``ReplicaFailure``."""
    old = meta.get(deployment, "status", "conditions", default=())
    listed = meta.with_condition(old, _available(deployment, numbers))
    listed = meta.with_condition(listed, _progressing(deployment, new, numbers, now))
    failures = [
        c for s in sets for c in meta.get(s, "status", "conditions", default=()) if c["type"] == "ReplicaFailure"
    ]
    listed = [c for c in listed if c["type"] != "ReplicaFailure"]
    return meta.with_condition(listed, failures[0]) if failures else listed


def _available(deployment: Mapping[str, Any], numbers: Mapping[str, int]) -> Object:
    enough = numbers["availableReplicas"] >= bounds(deployment).least
    return {
        "type": "Available",
        "status": "True" if enough else "False",
        "reason": "MinimumReplicasAvailable" if enough else "MinimumReplicasUnavailable",
        "message": f"Deployment {'has' if enough else 'does not have'} minimum availability.",
    }


def _progressing(deployment: Mapping[str, Any], new: Set | None, numbers: Mapping[str, int], now: float) -> Object:
    known = meta.condition(deployment, "Progressing")
    if meta.get(deployment, "spec", "paused", default=False):
        return _condition("Unknown", "DeploymentPaused", "Deployment is paused", known)
    called = f'ReplicaSet "{name_of(new)}"' if new else "Deployment"
    if is_complete(deployment, numbers):
        return _condition("True", "NewReplicaSetAvailable", f"{called} has successfully progressed.", known)
    if _moved(deployment, numbers) or known is None or known.get("reason") == "DeploymentPaused":
        fresh = _condition("True", "ReplicaSetUpdated", f"{called} is progressing.", known)
        return fresh | {"lastUpdateTime": meta.rfc3339(now)}
    if overdue_in_s(deployment, now) == 0:
        return _condition("False", "ProgressDeadlineExceeded", f"{called} has timed out progressing.", known)
    return dict(known)


def _condition(status: str, reason: str, message: str, known: Mapping[str, Any] | None) -> Object:
    made: Object = {"type": "Progressing", "status": status, "reason": reason, "message": message}
    same = known is not None and (known.get("status"), known.get("reason")) == (status, reason)
    made["lastUpdateTime"] = known["lastUpdateTime"] if same and known and known.get("lastUpdateTime") else meta.now()
    return made


def _moved(deployment: Mapping[str, Any], numbers: Mapping[str, int]) -> bool:
    """Since the status was last written: more new pods, fewer old ones, or more that answer; or another template."""
    old = deployment.get("status") or {}

    def old_of(field: str) -> int:
        return int(old.get(field) or 0)

    return (
        numbers["updatedReplicas"] > old_of("updatedReplicas")
        or numbers["replicas"] - numbers["updatedReplicas"] < old_of("replicas") - old_of("updatedReplicas")
        or numbers["readyReplicas"] > old_of("readyReplicas")
        or numbers["availableReplicas"] > old_of("availableReplicas")
        or numbers["observedGeneration"] > old_of("observedGeneration")
    )


def overdue_in_s(deployment: Mapping[str, Any], now: float) -> float | None:
    """Seconds until ``progressDeadlineSeconds`` is over; 0: it is; None: nothing is awaited."""
    known = meta.condition(deployment, "Progressing")
    deadline = meta.get(deployment, "spec", "progressDeadlineSeconds")
    if known is None or deadline is None or known.get("reason") == "NewReplicaSetAvailable":
        return None
    since = known.get("lastUpdateTime")
    return max(0.0, meta.parse_time(since) + float(deadline) - now) if since else None
