"""Services as the packet filter sees them."""

from __future__ import annotations

from typing import Any

from hypervisor.controller.node.podnetwork import chain_name, service_ports


def service(name: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "default", "name": name}, "spec": spec}


def piece(name: str, ports: list[dict[str, Any]], *endpoints: tuple[str, bool]) -> dict[str, Any]:
    made = [{"addresses": [a], "conditions": {"ready": ready}} for a, ready in endpoints]
    labels = {"kubernetes.io/service-name": name}
    return {
        "metadata": {"namespace": "default", "name": f"{name}-0", "labels": labels},
        "ports": ports,
        "endpoints": made,
    }


def test_ready_endpoints_of_each_port() -> None:
    web = service(
        "web",
        clusterIPs=["10.96.0.1", "fd96::1"],
        ports=[{"name": "http", "port": 80, "nodePort": 30080}, {"name": "dns", "port": 53, "protocol": "UDP"}],
    )
    both = [{"name": "http", "port": 8080}, {"name": "dns", "port": 5353}]
    slices = [
        piece("web", both, ("10.88.0.1", True), ("10.88.0.2", False)),
        piece("web", both[:1], ("fd88::1", True)),
        piece("other", [{"name": "http", "port": 1}], ("10.88.0.9", True)),
    ]
    http, dns = service_ports([web], slices)
    assert [(str(e.address), e.port) for e in http.endpoints] == [("10.88.0.1", 8080), ("fd88::1", 8080)]
    assert [(str(e.address), e.port) for e in dns.endpoints] == [("10.88.0.1", 5353)]
    assert (http.protocol, http.node_port, dns.protocol, dns.node_port) == ("tcp", 30080, "udp", 0)


def test_headless_and_external_ones_are_left_out() -> None:
    headless = service("h", clusterIPs=["None"], ports=[{"port": 80}])
    external = service("e", type="ExternalName", externalName="example.org")
    assert list(service_ports([headless, external], [])) == []


def test_affinity() -> None:
    sticky = service("s", clusterIPs=["10.96.0.2"], ports=[{"port": 80}], sessionAffinity="ClientIP")
    (port,) = service_ports([sticky], [])
    assert port.affinity_s == 10800


def test_chain_names_are_different_and_short() -> None:
    names = {chain_name("a" * 63, "b" * 63, f"{i}TCP") for i in range(50)}
    assert len(names) == 50
    assert max(map(len, names)) < 100
    assert chain_name("a.b", "c", "1TCP").count(".") == 0
