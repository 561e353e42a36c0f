"""Pods as their owners see them: made from a template, told apart, and which of them go first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.kube.resources import Resource

Pod = Mapping[str, Any]


def from_template(resource: Resource, owner: Mapping[str, Any], template: Mapping[str, Any]) -> Object:
    """A pod for `owner`, named after it, from a ``PodTemplateSpec``."""
    metadata = template.get("metadata") or {}
    made: Object = {
        "generateName": f"{meta.get(owner, 'metadata', 'name')[:57]}-",
        "namespace": meta.get(owner, "metadata", "namespace"),
        "ownerReferences": [meta.owner_reference(resource, owner)],
    }
    for field in ("labels", "annotations", "finalizers"):
        if metadata.get(field):
            made[field] = metadata[field]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": made, "spec": dict(template["spec"])}


def phase(pod: Pod) -> str:
    """``status.phase``; a pod that nobody has told about is Pending."""
    return str(meta.get(pod, "status", "phase", default="Pending"))


def is_active(pod: Pod) -> bool:
    """It runs or will, and nobody has asked for its end."""
    return phase(pod) not in ("Succeeded", "Failed") and not meta.is_deleting(pod)


def is_ready(pod: Pod) -> bool:
    """Its containers answer, as far as anybody has asked them."""
    return meta.is_true(pod, "Ready")


def is_available(pod: Pod, min_ready_s: int, now: float) -> bool:
    """It has been ready for so long."""
    ready = meta.condition(pod, "Ready")
    if ready is None or ready.get("status") != "True":
        return False
    if not min_ready_s:
        return True
    since = ready.get("lastTransitionTime")
    return since is not None and meta.parse_time(since) + min_ready_s <= now


def available_in_s(pods: Sequence[Pod], min_ready_s: int, now: float) -> float | None:
    """Seconds until the next ready pod of `pods` becomes available by the passing of time."""
    waits = [
        meta.parse_time(ready["lastTransitionTime"]) + min_ready_s - now
        for pod in pods
        if is_ready(pod) and (ready := meta.condition(pod, "Ready")) and ready.get("lastTransitionTime")
    ]
    return min((w for w in waits if w > 0), default=None)


def restarts(pod: Pod) -> int:
    """Of all its containers."""
    return sum(int(c.get("restartCount") or 0) for c in meta.get(pod, "status", "containerStatuses", default=()))


def deletion_order(pod: Pod, crowd: Mapping[str, int]) -> tuple[Any, ...]:
    """Sorts pods so that the one to be deleted first comes first.

    Source: Kubernetes, "ReplicaSet: Scaling down": without a node before with one, pending before running, not ready
    before ready, by deletion cost, on nodes with more of them first, newer first.

    :param crowd: how many of the owner's pods are on each node
    """
    node = str(meta.get(pod, "spec", "nodeName", default=""))
    cost = str(meta.get(pod, "metadata", "annotations", "controller.kubernetes.io/pod-deletion-cost", default="0"))
    created = str(meta.get(pod, "metadata", "creationTimestamp", default=""))
    return (
        bool(node),
        {"Pending": 0, "Unknown": 1}.get(phase(pod), 2),
        is_ready(pod),
        int(cost) if cost.lstrip("-").isdigit() else 0,
        -crowd.get(node, 0),
        -restarts(pod),
        tuple(-ord(c) for c in created),
        meta.uid_of(pod),
    )
