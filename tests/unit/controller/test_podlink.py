"""A pod and the pod network of its host: what the network is told of it, and its guest; a link that is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import fake_guest
import pytest
from pod_bench import Bench, until

from hypervisor.controller.record import Running
from hypervisor.errors import InvalidInput
from hypervisor.net.pods import PodFacts

TAP = ("pvaaaa00000001", "52:54:00:00:00:01")


class Network:
    """A `PodNetwork` without a kernel."""

    def __init__(self) -> None:
        self.connected: list[tuple[str, str, PodFacts]] = []
        self.unplugged = asyncio.Event()
        self.released: list[str] = []

    def addresses(self, uid: str) -> tuple[str, ...]:
        return ()

    async def allocate(self, uid: str) -> tuple[str, ...]:
        return "10.88.0.7", "fd88::7"

    async def name_servers(self) -> tuple[str, ...]:
        return ("10.96.0.10",)

    async def connect(self, uid: str, tap: str, mac: str, facts: PodFacts) -> None:
        self.connected.append((tap, mac, facts))
        self.unplugged.clear()

    async def wait_unplugged(self, uid: str) -> None:
        await self.unplugged.wait()

    async def release(self, uid: str) -> None:
        self.released.append(uid)


@pytest.fixture
def network(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Network:
    monkeypatch.setattr(fake_guest.FakeGuest, "tap", TAP, raising=False)
    made = bench.network = Network()
    bench.pods = bench.new_pods()
    return made


async def test_what_both_sides_are_told(bench: Bench, network: Network) -> None:
    container = {"name": "c", "image": "x", "ports": [{"containerPort": 80, "hostPort": 8080}]}
    pod = await bench.create(containers=[container], dnsConfig={"options": [{"name": "timeout", "value": "1"}]})
    await until(pod, lambda: isinstance(pod.journal.record.container("c").state, Running))
    ((tap, mac, facts),) = network.connected
    assert ((tap, mac), facts.namespace, facts.host_ports[0].number) == (TAP, "default", 8080)
    (setup,) = [arguments for call, arguments in bench.machines.started[0].calls if call == "setup"]
    assert setup["net"] == {
        "ifname": "eth0",
        "addresses": ["10.88.0.7", "fd88::7"],
        "peer": "ee:ee:ee:ee:ee:ee",
        "gateways": ["169.254.1.1", "fe80::1"],
        "dns": ["10.96.0.10"],
        "search": ["default.svc.cluster.local", "svc.cluster.local", "cluster.local"],
        "options": ["ndots:5", "timeout:1"],
    }


async def test_a_vm_whose_tap_is_removed_is_replaced(bench: Bench, network: Network) -> None:
    pod = await bench.create(policy="Always")
    await until(pod, lambda: isinstance(pod.journal.record.container("c").state, Running))
    network.unplugged.set()
    await until(pod, lambda: pod.journal.record.container("c").restarts == 1)
    assert pod.journal.record.vm_starts == 2
    assert len(network.connected) == 2


async def test_ports_of_the_host_need_the_pod_network(bench: Bench, tmp_path: Path) -> None:
    container = {"name": "c", "image": "x", "ports": [{"containerPort": 80, "hostPort": 8080}]}
    with pytest.raises(InvalidInput, match="start hosts with --pod-network"):
        await bench.create(containers=[container])
