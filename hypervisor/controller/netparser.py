"""What a manifest says of the pod network: ports of the host, and bandwidth.

Source: Kubernetes, "Network Plugins" (the annotations for traffic shaping).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any

from hypervisor.controller.schema import field_path
from hypervisor.controller.spec import HostPort
from hypervisor.errors import InvalidInput
from hypervisor.kube.quantity import parse_quantity

INCOMING, OUTGOING = "kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"
LEAST, MOST = 1_000, 10**15
"""Bits a second."""


def parse_bandwidth(annotations: Mapping[str, str], name: str) -> int:
    """Bytes a second; 0: no limit. Raises `InvalidInput`."""
    text = annotations.get(name)
    if text is None:
        return 0
    where = field_path("metadata.annotations", name)
    bits = parse_quantity(text, where=where)
    if not LEAST <= bits <= MOST:
        raise InvalidInput(f"{text!r} is no bandwidth: bits a second, from 1k to 1P", where=where)
    return int(bits / 8)


def parse_host_ports(spec: Mapping[str, Any]) -> tuple[HostPort, ...]:
    """Those of all containers. Raises `InvalidInput`: one cannot be, or two are the same."""
    found: dict[tuple[int, str, str], HostPort] = {}
    for where, port in _ports(spec):
        number, protocol = port["hostPort"], str(port.get("protocol") or "TCP").lower()
        if not 1 <= number <= 65535:
            raise InvalidInput(f"{number} is no port: 1 to 65535", where=f"{where}.hostPort")
        address = _address(port.get("hostIP") or "", f"{where}.hostIP")
        made = HostPort(number, protocol, port["containerPort"], address)
        if found.setdefault((number, protocol, address), made) != made:
            raise InvalidInput(f"{number} leads to another port of this pod already", where=f"{where}.hostPort")
    return tuple(found.values())


def _ports(spec: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for kind in ("containers", "initContainers"):
        for i, container in enumerate(spec.get(kind) or ()):
            for j, port in enumerate(container.get("ports") or ()):
                if port.get("hostPort"):
                    yield f"spec.{kind}[{i}].ports[{j}]", port


def _address(text: str, where: str) -> str:
    """In its one form; empty for all addresses."""
    if not text:
        return ""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise InvalidInput(f"{text[:80]!r} is no IP address", where=where) from None
    return "" if address.is_unspecified else str(address)
