"""ServiceAddresses: a Service gets its cluster addresses, IP versions and node ports, or an error that says why not.

Upstream does this in its registry of Services. Source: Kubernetes, "Service ClusterIP allocation", "Service".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import Any

from hypervisor.kube.errors import ApiError, Cause, invalid
from hypervisor.kube.resources import SERVICES
from hypervisor.master.admission.plugin import AdmissionRequest, Operation
from hypervisor.master.kinds import rules
from hypervisor.master.network import families
from hypervisor.master.network.pools import Address, Owner, Pools
from hypervisor.master.network.ranges import Network, Ranges, canonical, free_address, free_port
from hypervisor.master.patch.values import copy

Spec = dict[str, Any]
Held = list[Address]


class ServiceAddresses:
    """See the module. What a request has got is held until the registry shows it, and let go when it fails."""

    operations: frozenset[Operation] = frozenset(("CREATE", "UPDATE"))
    plurals = frozenset((SERVICES.qualified,))

    def __init__(self, ranges: Ranges, pools: Pools) -> None:
        self._ranges = ranges
        self._pools = pools

    async def admit(self, request: AdmissionRequest) -> None:
        """:raises ApiError: Invalid: an address or port is taken or out of range; InternalError: none is left"""
        if request.subresource:
            return
        spec = request.object["spec"]
        before: Mapping[str, Any] = (request.old or {}).get("spec") or {}
        _carry_over(spec, before)
        owner = _owner(request)
        taken = self._pools.taken(owner)
        new: Held = []
        _refuse(request, self._ports(spec, taken, new))
        if families.has_address(spec):
            cluster = [f"IPv{n.version}" for n in self._ranges.services]
            _refuse(request, families.normalize(spec) or families.choose(spec, before, cluster))
            if spec.get("clusterIP") != families.NONE:
                _refuse(request, self._addresses(spec, before, taken, new))
        if new and not request.dry_run:
            request.holds.append(self._pools.hold(owner, new))

    def _addresses(
        self, spec: Spec, before: Mapping[str, Any], taken: Mapping[Address, Owner], new: Held
    ) -> list[Cause]:
        had = before.get("clusterIPs") or ()
        given = [canonical(a) for a in spec.get("clusterIPs") or ()]
        for address in given:
            why = "" if address in had else self._unfit(address, taken)
            if why:
                return [rules.invalid("spec.clusterIPs", given, f"failed to allocate IP {address}: {why}")]
        networks = {f"IPv{n.version}": n for n in self._ranges.services}
        for family in spec["ipFamilies"][len(given) :]:
            given.append(_one_of(networks[family], taken))
        new += [a for a in given if a not in had]
        spec["clusterIP"], spec["clusterIPs"] = given[0], given
        return []

    def _unfit(self, address: str, taken: Mapping[Address, Owner]) -> str:
        parsed = ip_address(address)
        network = next((n for n in self._ranges.services if n.version == parsed.version), None)
        if network is None:
            return "its IP family is not configured on this cluster"
        if parsed not in network or parsed in (network.network_address, network.broadcast_address):
            return f"the provided IP ({address}) is not in the valid range. The range of valid IPs is {network}"
        return "provided IP is already allocated" if address in taken else ""

    def _ports(self, spec: Spec, taken: Mapping[Address, Owner], new: Held) -> list[Cause]:
        if spec.get("type") not in ("NodePort", "LoadBalancer"):
            return []
        own: dict[int, int] = {}  # node port by port: TCP and UDP of one port share theirs
        for index, port in enumerate(spec.get("ports") or ()):
            number = port.get("nodePort")
            if number:
                path = f"spec.ports[{index}].nodePort"
                why = self._unfit_port(number, taken)
                if why:
                    return [rules.invalid(path, number, why)]
                own.setdefault(port.get("port", 0), number)
        if spec["type"] == "NodePort" or spec.get("allocateLoadBalancerNodePorts", True):
            self._fill_ports(spec, taken, own)
        new += {p["nodePort"] for p in spec.get("ports") or () if p.get("nodePort")}
        return self._health_port(spec, taken, new)

    def _fill_ports(self, spec: Spec, taken: Mapping[Address, Owner], own: dict[int, int]) -> None:
        used: dict[str, set[int]] = {}
        for port in spec.get("ports") or ():
            if port.get("nodePort"):
                used.setdefault(port["protocol"], set()).add(port["nodePort"])
        for port in spec.get("ports") or ():
            if port.get("nodePort"):
                continue
            mine = used.setdefault(port["protocol"], set())
            number = own.get(port.get("port", 0))
            if number is None or number in mine:
                number = self._free_port({*taken, *own.values(), *mine})
            port["nodePort"] = number
            own.setdefault(port.get("port", 0), number)
            mine.add(number)

    def _health_port(self, spec: Spec, taken: Mapping[Address, Owner], new: Held) -> list[Cause]:
        if spec["type"] != "LoadBalancer" or spec.get("externalTrafficPolicy") != "Local":
            return []
        number = spec.get("healthCheckNodePort")
        if number and (why := self._unfit_port(number, taken)):
            return [rules.invalid("spec.healthCheckNodePort", number, why)]
        spec["healthCheckNodePort"] = number or self._free_port({*taken, *new})
        new.append(spec["healthCheckNodePort"])
        return []

    def _unfit_port(self, number: int, taken: Mapping[Address, Owner]) -> str:
        ports = self._ranges.node_ports
        if number not in ports:
            return f"provided port is not in the valid range. The range of valid ports is {ports[0]}-{ports[-1]}"
        return "provided port is already allocated" if number in taken else ""

    def _free_port(self, taken: set[Any]) -> int:
        found = free_port(self._ranges.node_ports, taken)
        if found is None:
            raise ApiError("InternalError", "Internal error occurred: failed to allocate a nodePort: range is full")
        return found


def _one_of(network: Network, taken: Mapping[Address, Owner]) -> str:
    found = free_address(network, taken)
    if found is None:
        why = f"failed to allocate a serviceIP from {network}: range is full"
        raise ApiError("InternalError", f"Internal error occurred: {why}")
    return found


def _owner(request: AdmissionRequest) -> Owner:
    metadata = request.object["metadata"]
    return request.namespace, str(metadata.get("name") or metadata["uid"])


def _refuse(request: AdmissionRequest, causes: Iterable[Cause]) -> None:
    found = list(causes)
    if found:
        raise invalid(SERVICES.group, SERVICES.kind, request.name, found)


def _carry_over(spec: Spec, before: Mapping[str, Any]) -> None:
    """What an update leaves out and is not to lose, and what its new type no longer has; in place."""
    if not before:
        return
    now, was = families.has_address(spec), families.has_address(before)
    if now and was:
        another = (spec.get("clusterIP") or before.get("clusterIP")) != before.get("clusterIP")
        for field in families.FIELDS:
            if not spec.get(field) and before.get(field) and not (another and field == "clusterIPs"):
                spec[field] = copy(before[field])
    elif was:
        for field in families.FIELDS:
            if spec.get(field) == before.get(field):
                spec.pop(field, None)
    _carry_ports(spec, before)


def _carry_ports(spec: Spec, before: Mapping[str, Any]) -> None:
    had = {(p.get("protocol"), p.get("port")): p.get("nodePort") for p in before.get("ports") or ()}
    exposed = spec.get("type") in ("NodePort", "LoadBalancer")
    for port in spec.get("ports") or ():
        old = had.get((port.get("protocol"), port.get("port")))
        if exposed and old and not port.get("nodePort"):
            port["nodePort"] = old
        elif not exposed and old and port.get("nodePort") == old:
            del port["nodePort"]
    health = before.get("healthCheckNodePort")
    if health and spec.get("type") == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local":
        spec.setdefault("healthCheckNodePort", health)
    elif health and spec.get("healthCheckNodePort") == health:
        del spec["healthCheckNodePort"]
    if not exposed and spec.get("externalTrafficPolicy") == before.get("externalTrafficPolicy"):
        spec.pop("externalTrafficPolicy", None)
    if spec.get("type") != "LoadBalancer":
        spec.pop("allocateLoadBalancerNodePorts", None)
