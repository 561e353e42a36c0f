"""Ports of the host and bandwidth, as manifests say them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hypervisor.controller.manifest import parse_pod
from hypervisor.controller.netparser import INCOMING, OUTGOING
from hypervisor.controller.node.stats import interface_counters
from hypervisor.controller.podfacts import check_network, facts_of
from hypervisor.controller.spec import HostPort, PodSpec
from hypervisor.errors import InvalidInput


def pod(*ports: dict[str, Any], host: str = "192.0.2.1", **annotations: str) -> PodSpec:
    names = {"incoming": INCOMING, "outgoing": OUTGOING}
    metadata = {"name": "p", "annotations": {names[key]: text for key, text in annotations.items()}}
    spec = {"containers": [{"name": "c", "image": "i", "ports": list(ports)}]}
    return parse_pod(
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": {"hostIP": host}}
    )


def test_host_ports() -> None:
    both = pod(
        {"containerPort": 80, "hostPort": 8080},
        {"containerPort": 53, "hostPort": 53, "protocol": "UDP", "hostIP": "192.0.2.7"},
        {"containerPort": 81, "hostPort": 81, "hostIP": "0.0.0.0"},
        {"containerPort": 82},
    )
    assert both.network.host_ports == (
        HostPort(8080, "tcp", 80), HostPort(53, "udp", 53, "192.0.2.7"), HostPort(81, "tcp", 81),
    )  # fmt: skip
    assert [str(p.address) for p in facts_of(both).host_ports] == ["None", "192.0.2.7", "None"]


def test_hosts_of_one_machine_have_ports_of_their_own() -> None:
    (port,) = facts_of(pod({"containerPort": 80, "hostPort": 8080}, host="127.0.0.3")).host_ports
    assert str(port.address) == "127.0.0.3"


def test_one_port_does_not_lead_to_two() -> None:
    with pytest.raises(InvalidInput, match="leads to another port"):
        pod({"containerPort": 80, "hostPort": 8080}, {"containerPort": 81, "hostPort": 8080})


def test_without_the_pod_network_there_are_none() -> None:
    wants = pod({"containerPort": 80, "hostPort": 8080})
    check_network(wants, connected=True)
    check_network(pod({"containerPort": 80}), connected=False)
    with pytest.raises(InvalidInput, match="port 8080 of the host cannot lead"):
        check_network(wants, connected=False)


def test_bandwidth() -> None:
    limits = facts_of(pod(incoming="8M", outgoing="1G")).limits
    assert (limits.incoming, limits.outgoing) == (1_000_000, 125_000_000)
    assert facts_of(pod()).limits.incoming == 0


@pytest.mark.parametrize("text", ["", "x", "10", "-1M", "2P", "8Mbit"])
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(InvalidInput, match="ingress-bandwidth"):
        pod(incoming=text)


def test_counters_are_the_pods_own(tmp_path: Path) -> None:
    folder = tmp_path / "pv1" / "statistics"
    folder.mkdir(parents=True)
    for number, name in enumerate(("rx_bytes", "rx_errors", "tx_bytes", "tx_errors")):
        (folder / name).write_text(f"{number}\n")
    counted = {"name": "eth0", "txBytes": 0, "txErrors": 1, "rxBytes": 2, "rxErrors": 3}
    assert interface_counters("pv1", tmp_path) == counted
    assert interface_counters("pv2", tmp_path) == {}
