"""Defaults of pods and of templates of pods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypervisor.master.kinds.defaults import Table, entries, fill
from hypervisor.master.kinds.kind import Object
from hypervisor.master.schema.scalars import quantity_value

POD: Table = {
    "restartPolicy": "Always",
    "dnsPolicy": "ClusterFirst",
    "schedulerName": "default-scheduler",
    "terminationGracePeriodSeconds": 30,
    "securityContext": {},
}
POD_OBJECT: Table = {"enableServiceLinks": True}
CONTAINER: Table = {
    "terminationMessagePath": "/dev/termination-log",
    "terminationMessagePolicy": "File",
    "resources": {},
}
PROBE: Table = {"timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3}
HTTP: Table = {"path": "/", "scheme": "HTTP"}
GRPC: Table = {"service": ""}
PORT: Table = {"protocol": "TCP"}
FIELD: Table = {"apiVersion": "v1"}
TOKEN: Table = {"expirationSeconds": 3600}
FILE_MODE: Table = {"defaultMode": 0o644}
PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
CONTAINERS = ("initContainers", "containers", "ephemeralContainers")


def pod(obj: Object) -> None:
    """Defaults of a Pod."""
    spec = obj.setdefault("spec", {})
    pod_spec(spec)
    fill(spec, POD_OBJECT)


def template(spec: Object) -> None:
    """Defaults of the pod template of a workload's `spec`."""
    made = spec.get("template")
    if isinstance(made, dict):
        pod_spec(made.setdefault("spec", {}))


def pod_spec(spec: Object) -> None:
    """Defaults of a PodSpec, wherever it stands."""
    fill(spec, POD)
    account = spec.get("serviceAccountName") or spec.get("serviceAccount")
    if account:
        spec["serviceAccountName"] = spec["serviceAccount"] = account
    for container in entries(spec, *CONTAINERS):
        _container(container, bool(spec.get("hostNetwork")))
    for volume in entries(spec, "volumes"):
        _volume(volume)


def _container(container: Object, host_network: bool) -> None:
    fill(container, CONTAINER)
    fill(container, {"imagePullPolicy": pull_policy(str(container.get("image") or ""))})
    _requests(container["resources"])
    for port in entries(container, "ports"):
        fill(port, PORT)
        if host_network and "containerPort" in port:
            fill(port, {"hostPort": port["containerPort"]})
    for name in PROBES:
        if isinstance(container.get(name), dict):
            fill(container[name], PROBE)
            _handler(container[name])
    for name in ("postStart", "preStop"):
        _handler((container.get("lifecycle") or {}).get(name) or {})
    for variable in entries(container, "env"):
        _field(variable.get("valueFrom") or {})


def pull_policy(image: str) -> str:
    """``Always`` for an image that is named by no tag or by ``latest``, else ``IfNotPresent``."""
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    return "IfNotPresent" if digest or tag not in ("", "latest") else "Always"


def _requests(resources: Object) -> None:
    """A limit without a request is the request too."""
    limits = resources.get("limits")
    if limits:
        resources["requests"] = dict(limits) | (resources.get("requests") or {})


def _handler(handler: Object) -> None:
    if isinstance(handler.get("httpGet"), dict):
        fill(handler["httpGet"], HTTP)
    if isinstance(handler.get("grpc"), dict):
        fill(handler["grpc"], GRPC)


def _field(source: Object) -> None:
    if isinstance(source.get("fieldRef"), dict):
        fill(source["fieldRef"], FIELD)


def _volume(volume: Object) -> None:
    if not any(value is not None for key, value in volume.items() if key != "name"):
        volume["emptyDir"] = {}
    for name in ("configMap", "secret", "downwardAPI", "projected"):
        if isinstance(volume.get(name), dict):
            fill(volume[name], FILE_MODE)
    if isinstance(volume.get("hostPath"), dict):
        fill(volume["hostPath"], {"type": ""})
    for item in entries(volume.get("downwardAPI") or {}, "items"):
        _field(item)
    for source in entries(volume.get("projected") or {}, "sources"):
        if isinstance(source.get("serviceAccountToken"), dict):
            fill(source["serviceAccountToken"], TOKEN)
        for item in entries(source.get("downwardAPI") or {}, "items"):
            _field(item)


def new_pod(obj: Object) -> None:
    """A new Pod waits; its class of service is known from its resources."""
    obj["status"] = {"phase": "Pending", "qosClass": qos_class(obj.get("spec") or {})}


def qos_class(spec: Mapping[str, Any]) -> str:
    """``Guaranteed``: each container has limits of CPU and memory that its requests equal; ``BestEffort``: none has
    either; else ``Burstable``."""
    asked, guaranteed = False, True
    for container in entries(spec, "initContainers", "containers"):
        resources = container.get("resources") or {}
        limits = _compute(resources.get("limits"))
        requests = limits | _compute(resources.get("requests"))
        asked = asked or bool(requests)
        guaranteed = guaranteed and len(limits) == 2 and requests == limits
    if not asked:
        return "BestEffort"
    return "Guaranteed" if guaranteed else "Burstable"


def _compute(listed: Mapping[str, Any] | None) -> dict[str, Any]:
    """The amounts of CPU and memory in a resource list that are not zero."""
    amounts = {key: quantity_value(str(value)) for key, value in (listed or {}).items() if key in ("cpu", "memory")}
    return {key: amount for key, amount in amounts.items() if amount}
