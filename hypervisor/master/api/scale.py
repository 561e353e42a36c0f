"""``scale``: the number of replicas of a Deployment or ReplicaSet, seen as an autoscaling/v1 Scale.

Source: Kubernetes API reference, Scale v1 autoscaling.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.kube.errors import Cause, bad_request, invalid
from hypervisor.kube.selectors import LabelSelector
from hypervisor.master.api.call import Call
from hypervisor.master.api.objects import Objects
from hypervisor.master.api.patching import Patch, patched

SCHEMA = "io.k8s.api.autoscaling.v1.Scale"


def of(obj: Object) -> Object:
    """An object's Scale."""
    metadata = obj["metadata"]
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    selector = str(LabelSelector.of(meta.get(obj, "spec", "selector")))
    replicas = int(meta.get(obj, "spec", "replicas", default=0))
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {key: metadata[key] for key in kept if key in metadata},
        "spec": {"replicas": replicas} if replicas else {},
        "status": {"replicas": int(meta.get(obj, "status", "replicas", default=0)), "selector": selector},
    }


async def update(objects: Objects, call: Call, given: Object) -> Object:
    """PUT of a Scale."""
    if given.get("kind", "Scale") != "Scale":
        raise bad_request(f'the kind in the data ("{given["kind"]}") does not match the expected one ("Scale")')
    wanted = _replicas(call, given)
    version = meta.version_of(given)
    metadata = {"resourceVersion": version} if version else {}
    return await _set(objects, call, wanted, metadata)


async def patch(objects: Objects, call: Call, given: Patch) -> Object:
    """PATCH of a Scale, of any type but apply."""
    if given.how == "apply":
        raise bad_request("server-side apply is not served for scale")
    old = of(await objects.get(call))
    new = patched(call, given, old, objects.schema.type_of(SCHEMA))
    version = meta.version_of(new) if given.names_version else ""
    return await _set(objects, call, _replicas(call, new), {"resourceVersion": version} if version else {})


async def _set(objects: Objects, call: Call, replicas: int, metadata: dict[str, Any]) -> Object:
    body = {"spec": {"replicas": replicas}} | ({"metadata": metadata} if metadata else {})
    new, _ = await objects.patch(replace(call, subresource=""), Patch("merge", body))
    return of(new)


def _replicas(call: Call, given: Object) -> int:
    replicas = meta.get(given, "spec", "replicas", default=0)
    if not isinstance(replicas, int) or isinstance(replicas, bool):
        raise bad_request('Scale in version "v1" cannot be handled as a Scale: spec.replicas must be a number')
    if replicas < 0:
        why = f"Invalid value: {replicas}: must be greater than or equal to 0"
        raise invalid("autoscaling", "Scale", call.name, [Cause("FieldValueInvalid", why, "spec.replicas")])
    return replicas
