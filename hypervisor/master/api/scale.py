"""``scale``: the number of replicas of what has them, seen as an autoscaling/v1 Scale.

Source: Kubernetes API reference, Scale v1 autoscaling.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.kube.errors import Cause, bad_request, invalid
from hypervisor.kube.selectors import LabelSelector
from hypervisor.master.api import fit
from hypervisor.master.api.call import Call
from hypervisor.master.api.objects import Objects
from hypervisor.master.api.patching import Patch, patched
from hypervisor.master.kinds.kind import Kind
from hypervisor.master.patch.values import copy

SCHEMA = "io.k8s.api.autoscaling.v1.Scale"
_NAMES = {"apiVersion": "autoscaling/v1", "kind": "Scale"}


def of(kind: Kind, obj: Object) -> Object:
    """An object's Scale."""
    metadata, paths = obj["metadata"], kind.scale
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    found = meta.get(obj, *paths.selector, default="") if paths.selector else ""
    selector = found if isinstance(found, str) else str(LabelSelector.of(found))
    replicas = _number(meta.get(obj, *paths.replicas, default=0))
    status: Object = {"replicas": _number(meta.get(obj, *paths.current, default=0))}
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {key: metadata[key] for key in kept if key in metadata},
        "spec": {"replicas": replicas} if replicas else {},
        "status": status | ({"selector": selector} if selector else {}),
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
    """PATCH of a Scale."""
    if given.how == "apply":
        return await _apply(objects, call, given)
    old = of(call.kind, await objects.get(call))
    new = patched(call, given, old, objects.schema.type_of(SCHEMA))
    version = meta.version_of(new) if given.names_version else ""
    return await _set(objects, call, _replicas(call, new), {"resourceVersion": version} if version else {})


async def _apply(objects: Objects, call: Call, given: Patch) -> Object:
    """An apply of a Scale is one of its object that says nothing but the number; its manager owns that alone."""
    if not isinstance(given.body, dict) or any(given.body.get(key) != value for key, value in _NAMES.items()):
        raise bad_request("an apply patch of a scale is an object with apiVersion autoscaling/v1 and kind Scale")
    scale = copy(given.body)
    fit.fit(call, objects.schema.type_of(SCHEMA), scale)
    resource = call.kind.resource
    wish: Object = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": {"name": call.name}}
    if meta.get(scale, "spec", "replicas") is not None:
        wish |= _nested(call.kind.scale.replicas, _replicas(call, scale))
    new, _ = await objects.patch(call, Patch("apply", wish, given.force))
    return of(call.kind, new)


async def _set(objects: Objects, call: Call, replicas: int, metadata: dict[str, Any]) -> Object:
    body = _nested(call.kind.scale.replicas, replicas) | ({"metadata": metadata} if metadata else {})
    new, _ = await objects.patch(replace(call, subresource="scale"), Patch("merge", body))
    return of(call.kind, new)


def _nested(path: tuple[str, ...], value: Any) -> Object:
    for step in reversed(path):
        value = {step: value}
    return dict(value)


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _replicas(call: Call, given: Object) -> int:
    replicas = meta.get(given, "spec", "replicas", default=0)
    if not isinstance(replicas, int) or isinstance(replicas, bool):
        raise bad_request('Scale in version "v1" cannot be handled as a Scale: spec.replicas must be a number')
    if replicas < 0:
        why = f"Invalid value: {replicas}: must be greater than or equal to 0"
        raise invalid("autoscaling", "Scale", call.name, [Cause("FieldValueInvalid", why, "spec.replicas")])
    return replicas
