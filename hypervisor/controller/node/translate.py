"""A pod of the API server as a manifest that this host takes: what the server added for others is left out.

What stays is checked by the host itself as any manifest is (`hypervisor.controller.fields`): a field that would mean
something and is not supported makes the pod fail with the reason, it is never dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypervisor.kube.client import Object

_KEPT_METADATA = ("name", "namespace", "uid", "labels", "annotations")
_SERVED = {
    "automountServiceAccountToken": "admission has added the volume, or not",
    "overhead": "the scheduler's; the VM is sized by its containers",
    "schedulingGates": "the pod is bound: all were lifted",
    "readinessGates": "others set those conditions; the status keeps them",
    "ephemeralContainers": "they are added to running pods only",
}
"""Fields of the spec that are not for the node, and why."""


def host_manifest(pod: Mapping[str, Any], address: str = "") -> Object:
    """The manifest. `pod` is not changed.

    :param address: the node's, which containers may ask for
    """
    metadata = pod.get("metadata") or {}
    spec = {key: value for key, value in (pod.get("spec") or {}).items() if key not in _SERVED}
    kept = {key: metadata[key] for key in _KEPT_METADATA if metadata.get(key)}
    status = {"status": {"hostIP": address}} if address else {}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": kept, "spec": spec, **status}
