"""What the pod network must know of a pod."""

from __future__ import annotations

import ipaddress

from hypervisor.controller.spec import HostPort, PodSpec
from hypervisor.errors import InvalidInput
from hypervisor.net import services
from hypervisor.net.limits import Limits
from hypervisor.net.pods import PodFacts


def check_network(pod: PodSpec, connected: bool) -> None:
    """:raises InvalidInput: the pod wants ports of a host that has no pod network to lead them to it"""
    if pod.network.host_ports and not (connected and pod.network.mode != "none"):
        raise InvalidInput(
            f"port {pod.network.host_ports[0].number} of the host cannot lead to the pod: it has a network to itself; "
            "start hosts with --pod-network",
            where="hostPort",
        )


def facts_of(pod: PodSpec) -> PodFacts:
    """Of a pod of this host."""
    ports = tuple(_host_port(port, pod.host_address) for port in pod.network.host_ports)
    limits = Limits(pod.network.incoming, pod.network.outgoing)
    return PodFacts(pod.namespace, dict(pod.labels), ports, limits)


def _host_port(port: HostPort, host: str) -> services.HostPort:
    """Hosts of a local cluster share all of the machine's addresses: there a port is at its own host's only."""
    shared = ipaddress.ip_address(host).is_loopback
    address = port.address or (host if shared else "")
    at = ipaddress.ip_address(address) if address else None
    return services.HostPort(port.number, port.protocol, port.container_port, at)
