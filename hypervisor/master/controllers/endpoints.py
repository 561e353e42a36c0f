"""EndpointSlices: which pods answer for a Service.

One slice for each IP family and hundred endpoints, owned by the Service; named after it and their number, so that they
cannot be made twice. Source: Kubernetes, "EndpointSlices" and "Service".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import ENDPOINT_SLICES, PODS, SERVICES
from hypervisor.kube.selectors import LabelSelector
from hypervisor.master.controllers import pods as podctl
from hypervisor.master.controllers.base import Context, own_key, owner_key, unless_gone
from hypervisor.master.controllers.pods import Pod

MANAGER = "endpointslice-controller.k8s.io"
SERVICE_LABEL = "kubernetes.io/service-name"
MANAGER_LABEL = "endpointslice.kubernetes.io/managed-by"
SLICE_SIZE = 100


class EndpointsController:
    """Keeps the slices of each Service that has a selector."""

    name = "endpointslice"

    def __init__(self, context: Context) -> None:
        self._context = context
        self.watches = {SERVICES: own_key, PODS: self._services_of, ENDPOINT_SLICES: owner_key(SERVICES)}

    def _services_of(self, pod: Mapping[str, Any]) -> Iterable[Key]:
        namespace, labels = meta.key_of(pod)[0], meta.labels_of(pod)
        for service in self._context.all(SERVICES):
            key, selector = meta.key_of(service), meta.get(service, "spec", "selector")
            if key[0] == namespace and selector and selector.items() <= labels.items():
                yield key

    async def sync(self, key: Key) -> float | None:
        """One turn for one Service."""
        service = self._context.cached(SERVICES, *key)
        if service is None or meta.is_deleting(service) or not meta.get(service, "spec", "selector"):
            return None
        if meta.get(service, "spec", "type") == "ExternalName":
            return None
        wanted = {s["metadata"]["name"]: s for s in self._slices(service)}
        known = {meta.key_of(s)[1]: s for s in self._context.owned(ENDPOINT_SLICES, service)}
        for name, obj in wanted.items():
            await self._write(obj, known.get(name))
        for name in known.keys() - wanted.keys():
            await unless_gone(self._context.client.delete(ENDPOINT_SLICES, name, key[0]))
        return None

    def _slices(self, service: Mapping[str, Any]) -> Iterable[Object]:
        namespace = meta.key_of(service)[0]
        selector = LabelSelector.of({"matchLabels": service["spec"]["selector"]})
        pods = [
            p for p in self._context.all(PODS) if meta.key_of(p)[0] == namespace and selector.matches(meta.labels_of(p))
        ]
        pods = sorted((p for p in pods if _counts(p)), key=meta.key_of)
        for family in meta.get(service, "spec", "ipFamilies", default=["IPv4"]):
            groups: dict[tuple[tuple[str, int | None, str], ...], list[Object]] = {}
            for pod in pods:
                address = _address(pod, family)
                if address:
                    groups.setdefault(_ports(service, pod), []).append(_endpoint(service, pod, address))
            number = 0
            for ports, endpoints in sorted(groups.items(), key=lambda g: str(g[0])) or [((), [])]:
                for start in range(0, max(1, len(endpoints)), SLICE_SIZE):
                    yield _slice(service, family, number, ports, endpoints[start : start + SLICE_SIZE])
                    number += 1

    async def _write(self, wanted: Object, known: Mapping[str, Any] | None) -> None:
        namespace, name = meta.key_of(wanted)
        if known is None:
            await unless_gone(self._context.client.create(ENDPOINT_SLICES, wanted, namespace))
        elif any(known.get(f) != wanted[f] for f in ("endpoints", "ports")):
            patch = {"endpoints": wanted["endpoints"], "ports": wanted["ports"]}
            await unless_gone(self._context.client.patch(ENDPOINT_SLICES, name, namespace, patch))


def _counts(pod: Pod) -> bool:
    return podctl.phase(pod) not in ("Succeeded", "Failed") and bool(meta.get(pod, "status", "podIP"))


def _address(pod: Pod, family: str) -> str:
    listed = [str(i.get("ip")) for i in meta.get(pod, "status", "podIPs", default=())]
    listed = listed or [str(meta.get(pod, "status", "podIP", default=""))]
    version = 6 if family == "IPv6" else 4
    return next((a for a in listed if a and ip_address(a).version == version), "")


def _ports(service: Mapping[str, Any], pod: Pod) -> tuple[tuple[str, int | None, str], ...]:
    """Name, number and protocol of each port, as `pod` has it (a named target port is looked up in its containers)."""
    found = []
    for port in service["spec"].get("ports") or ():
        target = port.get("targetPort", port.get("port"))
        protocol = port.get("protocol") or "TCP"
        number = _named_port(pod, target, protocol) if isinstance(target, str) else int(target)
        found.append((port.get("name") or "", number, protocol))
    return tuple(found)


def _named_port(pod: Pod, name: str, protocol: str) -> int | None:
    for container in pod["spec"].get("containers", ()):
        for port in container.get("ports") or ():
            if port.get("name") == name and (port.get("protocol") or "TCP") == protocol:
                return int(port["containerPort"])
    return None


def _endpoint(service: Mapping[str, Any], pod: Pod, address: str) -> Object:
    namespace, name = meta.key_of(pod)
    serving, terminating = podctl.is_ready(pod), meta.is_deleting(pod)
    publish = bool(meta.get(service, "spec", "publishNotReadyAddresses", default=False))
    endpoint: Object = {
        "addresses": [address],
        "conditions": {
            "ready": publish or (serving and not terminating),
            "serving": serving,
            "terminating": terminating,
        },
        "nodeName": meta.get(pod, "spec", "nodeName"),
        "targetRef": {"kind": "Pod", "namespace": namespace, "name": name, "uid": meta.uid_of(pod)},
    }
    hostname, subdomain = meta.get(pod, "spec", "hostname"), meta.get(pod, "spec", "subdomain")
    if hostname and subdomain == meta.key_of(service)[1]:
        endpoint["hostname"] = hostname
    return endpoint


def _slice(
    service: Mapping[str, Any],
    family: str,
    number: int,
    ports: tuple[tuple[str, int | None, str], ...],
    endpoints: list[Object],
) -> Object:
    namespace, name = meta.key_of(service)
    suffix = "" if family == "IPv4" else "-v6"
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name[:240]}{suffix}-{number}",
            "namespace": namespace,
            "labels": {**meta.labels_of(service), SERVICE_LABEL: name, MANAGER_LABEL: MANAGER},
            "ownerReferences": [meta.owner_reference(SERVICES, service)],
        },
        "addressType": family,
        "endpoints": endpoints,
        "ports": [
            {"name": port, "protocol": protocol} | ({"port": value} if value is not None else {})
            for port, value, protocol in ports
        ],
    }
