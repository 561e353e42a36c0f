"""The cluster's names: Services, their endpoints, pods, and what their addresses are called.

Looked up in the informers' copies when they are asked for, by their keys and indexes: nothing is built ahead, and a
change costs nothing.

Source: Kubernetes, "DNS for Services and Pods" and its DNS specification (schema version 1.1.0).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypervisor.kube.client import Object
from hypervisor.kube.informer import Indexer, Store
from hypervisor.kube.meta import get
from hypervisor.kube.resources import ENDPOINT_SLICES, NAMESPACES, PODS, SERVICES, Resource
from hypervisor.net.dns.names import Record

SERVICE_NAME = "kubernetes.io/service-name"
SCHEMA = "1.1.0"
_REVERSE4, _REVERSE6 = ".in-addr.arpa", ".ip6.arpa"


def _service_of(piece: Object) -> Iterator[str]:
    yield f"{get(piece, 'metadata', 'namespace')}/{get(piece, 'metadata', 'labels', SERVICE_NAME, default='')}"


def _endpoint_addresses(piece: Object) -> Iterator[str]:
    for endpoint in piece.get("endpoints") or ():
        yield from map(canonical, endpoint.get("addresses") or ())


def _cluster_addresses(service: Object) -> Iterator[str]:
    yield from (canonical(a) for a in get(service, "spec", "clusterIPs", default=()) if a != "None")


def _pod_addresses(pod: Object) -> Iterator[str]:
    yield from (canonical(entry["ip"]) for entry in get(pod, "status", "podIPs", default=()))


INDEXERS: Mapping[Resource, Mapping[str, Indexer]] = {
    SERVICES: {"address": _cluster_addresses},
    ENDPOINT_SLICES: {"service": _service_of, "address": _endpoint_addresses},
    PODS: {"address": _pod_addresses},
}
"""What the informers must be made with."""


def canonical(text: str) -> str:
    """An address in its one form."""
    return str(ipaddress.ip_address(text))


def address_record(text: str) -> Record:
    """An address as a record."""
    return Record("AAAA" if ":" in text else "A", text)


def dashed(text: str) -> str:
    """An address as the label that stands for it."""
    return text.replace(".", "-").replace(":", "-")


@dataclass(frozen=True)
class _Endpoint:
    """A ready endpoint of one slice."""

    name: str
    addresses: tuple[str, ...]
    ports: tuple[Mapping[str, Any], ...]


class ClusterNames:
    """`hypervisor.net.dns.names.Names` of a cluster.

    :param stores: of Services, EndpointSlices, Pods and Namespaces, the first three with `INDEXERS`
    :param domain: the cluster's
    """

    def __init__(self, stores: Mapping[Resource, Store], domain: str) -> None:
        self._stores = stores
        self._domain = domain

    def is_own(self, name: str) -> bool:
        """The cluster's domain, and the reverse names of what the cluster has given out."""
        if name == self._domain or name.endswith(f".{self._domain}"):
            return True
        address = reversed_address(name)
        return address is not None and bool(self._pointers(address))

    def lookup(self, name: str) -> Sequence[Record] | None:
        """See `Names`."""
        address = reversed_address(name)
        if address is not None:
            return self._pointers(address)
        labels = name.removesuffix(self._domain).rstrip(".").split(".") if name != self._domain else []
        match labels[::-1]:
            case []:
                return ()
            case ["dns-version"]:
                return (Record("TXT", f'"{SCHEMA}"'),)
            case ["svc" | "pod"]:
                return ()
            case ["pod", namespace, *rest]:
                return self._pod(namespace, rest)
            case ["svc", namespace, *rest]:
                return self._service(namespace, rest)
        return None

    # ---- pods --------------------------------------------------------------------------------------------------------

    def _pod(self, namespace: str, rest: list[str]) -> Sequence[Record] | None:
        if not rest:
            return self._namespace(namespace)
        if len(rest) > 1:
            return None
        for text in (rest[0].replace("-", "."), rest[0].replace("-", ":")):
            try:
                address = canonical(text)
            except ValueError:
                continue
            pods = self._stores[PODS].by_index("address", address)
            if any(get(pod, "metadata", "namespace") == namespace for pod in pods):
                return (address_record(address),)
        return None

    def _namespace(self, name: str) -> Sequence[Record] | None:
        return () if ("", name) in self._stores[NAMESPACES] else None

    # ---- Services ----------------------------------------------------------------------------------------------------

    def _service(self, namespace: str, rest: list[str]) -> Sequence[Record] | None:
        if not rest:
            return self._namespace(namespace)
        service = self._stores[SERVICES].get((namespace, rest[0]))
        if service is None:
            return None
        if get(service, "spec", "type") == "ExternalName":
            return (Record("CNAME", f"{get(service, 'spec', 'externalName')}."),) if len(rest) == 1 else None
        headless = "None" in get(service, "spec", "clusterIPs", default=())
        full = f"{rest[0]}.{namespace}.svc.{self._domain}."
        match rest[1:]:
            case []:
                return self._addresses(service, headless)
            case [protocol] if protocol.startswith("_"):
                return () if any(True for _ in self._ports(service, protocol, None)) else None
            case [protocol, port] if protocol.startswith("_") and port.startswith("_"):
                return self._srv(service, headless, full, protocol, port) or None
            case [endpoint] if headless:
                return [
                    address_record(a) for e in self._endpoints(service) if e.name == endpoint for a in e.addresses
                ] or None
        return None

    def _addresses(self, service: Object, headless: bool) -> list[Record]:
        if not headless:
            return [address_record(a) for a in _cluster_addresses(service)]
        return [address_record(a) for e in self._endpoints(service) for a in e.addresses]

    def _ports(self, service: Object, protocol: str, name: str | None) -> Iterator[Mapping[str, Any]]:
        for port in get(service, "spec", "ports", default=()):
            same = str(port.get("protocol") or "TCP").lower() == protocol[1:]
            if same and port.get("name") and name in (None, f"_{port['name']}"):
                yield port

    def _srv(self, service: Object, headless: bool, full: str, protocol: str, name: str) -> list[Record]:
        if not headless:
            return [Record("SRV", f"0 100 {port['port']} {full}") for port in self._ports(service, protocol, name)]
        found = {
            f"0 100 {port['port']} {endpoint.name}.{full}"
            for endpoint in self._endpoints(service)
            for port in endpoint.ports
            if f"_{port.get('name')}" == name and str(port.get("protocol") or "TCP").lower() == protocol[1:]
        }
        return [Record("SRV", text) for text in sorted(found)]

    def _endpoints(self, service: Object) -> Iterator[_Endpoint]:
        key = f"{get(service, 'metadata', 'namespace')}/{get(service, 'metadata', 'name')}"
        for piece in self._stores[ENDPOINT_SLICES].by_index("service", key):
            ports = tuple(piece.get("ports") or ())
            for endpoint in piece.get("endpoints") or ():
                addresses = tuple(map(canonical, endpoint.get("addresses") or ()))
                if addresses and get(endpoint, "conditions", "ready", default=True):
                    yield _Endpoint(str(endpoint.get("hostname") or dashed(addresses[0])), addresses, ports)

    # ---- addresses ---------------------------------------------------------------------------------------------------

    def _pointers(self, address: str) -> list[Record]:
        services = self._stores[SERVICES].by_index("address", address)
        names = [f"{get(s, 'metadata', 'name')}.{get(s, 'metadata', 'namespace')}" for s in services]
        if not names:
            names = sorted(set(self._endpoint_names(address)))
        return [Record("PTR", f"{name}.svc.{self._domain}.") for name in names]

    def _endpoint_names(self, address: str) -> Iterator[str]:
        for piece in self._stores[ENDPOINT_SLICES].by_index("address", address):
            namespace, name = next(_service_of(piece)).split("/")
            service = self._stores[SERVICES].get((namespace, name))
            if service is None or "None" not in get(service, "spec", "clusterIPs", default=()):
                continue
            for endpoint in self._endpoints(service):
                if address in endpoint.addresses:
                    yield f"{endpoint.name}.{name}.{namespace}"


def reversed_address(name: str) -> str | None:
    """The address that a name of ``in-addr.arpa`` or ``ip6.arpa`` is about; None: it is no (whole) such name."""
    if name.endswith(_REVERSE4):
        text = ".".join(name.removesuffix(_REVERSE4).split(".")[::-1])
    elif name.endswith(_REVERSE6):
        digits = "".join(name.removesuffix(_REVERSE6).split(".")[::-1])
        text = ":".join(digits[i : i + 4] for i in range(0, 32, 4)) if len(digits) == 32 else ""
    else:
        return None
    try:
        return canonical(text)
    except ValueError:
        return None
