"""The packet filter: nft itself takes it, in a network namespace of the test's own, and packets fare as they should."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from hypervisor.net.addresses import Address
from hypervisor.net.ruleset import Endpoint, PodPort, ServicePort, State, render

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin") is None, reason="needs nftables"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


def address(text: str) -> Address:
    return ipaddress.ip_address(text)


def service(name: str, ip: str, *endpoints: str, affinity: int = 0, node_port: int = 0) -> ServicePort:
    made = tuple(Endpoint(address(e), 8080) for e in endpoints)
    return ServicePort(name, (address(ip),), "tcp", 80, made, node_port, affinity)


def state(*services: ServicePort) -> State:
    pods = (
        PodPort("pvaaaa00000001", (address("10.88.0.1"), address("fd88::1"))),
        PodPort("pvaaaa00000002", (address("10.88.0.2"),)),
    )
    ranges = tuple(ipaddress.ip_network(text) for text in ("10.88.0.0/16", "fd88::/64", "10.96.0.0/16", "fd96::/112"))
    return State("podvisor-aaaa", "pvaaaa", ranges, pods, services)


def in_namespace(script: str, text: str = "") -> str:
    done = subprocess.run(
        ["unshare", "--net", "sh", "-ec", script], input=text, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nft_takes_it_again_and_again() -> None:
    text = json.dumps(
        render(
            state(
                service("default-web", "10.96.0.10", "10.88.0.1", "10.88.0.2", node_port=30080),
                service("default-web6", "fd96::10", "fd88::1"),
                service("sticky", "10.96.0.12", "10.88.0.1", affinity=600),
                service("empty", "10.96.0.11"),
            )
        )
    )
    listed = in_namespace("cat > /dev/shm/rules.$$; for i in 1 2 3; do nft -j -f /dev/shm/rules.$$; done;"
                          "rm /dev/shm/rules.$$; nft list ruleset", text)  # fmt: skip
    assert listed.count("table inet podvisor-aaaa") == 1
    assert "10.96.0.10 . tcp . 80 : goto svc4-default-web" in listed
    assert "fd96::10 . tcp . 80 : goto svc6-default-web6" in listed
    assert "tcp . 30080 : goto svc4-default-web" in listed
    assert "jhash ip saddr mod 1" in listed
    assert '"pvaaaa00000001" . fd88::1' in listed


def test_two_hosts_in_one_namespace_leave_each_other_alone() -> None:
    other = State("podvisor-bbbb", "pvbbbb", ())
    first, second = json.dumps(render(state())), json.dumps(render(other))
    listed = in_namespace("nft -j -f - && printf '%s' \"$0\" >/dev/null; nft list tables", first)
    assert "podvisor-aaaa" in listed
    both = in_namespace(f"printf '%s' '{first}' | nft -j -f -; nft -j -f -; nft list tables", second)
    assert "podvisor-aaaa" in both
    assert "podvisor-bbbb" in both


def on_the_way(rules: list[dict[str, Any]]) -> int:
    """How many rules every packet passes."""
    chains = [r["add"]["rule"]["chain"] for r in rules if "rule" in r.get("add", {})]
    return len([chain for chain in chains if not chain.startswith("svc")])


def test_thousands_of_services_are_one_look_up() -> None:
    many = [service(f"s{i}", f"10.96.{i // 250}.{i % 250}", "10.88.0.1", "10.88.0.2") for i in range(2000)]
    rules = render(state(*many))["nftables"]
    assert on_the_way(rules) == on_the_way(render(state())["nftables"])
    in_namespace("nft -j -f -", json.dumps({"nftables": rules}))


def test_a_service_leads_to_its_endpoint_and_an_empty_one_refuses() -> None:
    """Through the kernel: a client in the host's own namespace, an endpoint on an address of its own."""
    text = json.dumps(render(state(service("web", "10.96.0.10", "10.88.0.1"), service("none", "10.96.0.11"))))
    script = f"""
ip link set lo up; ip addr add 10.88.0.1/32 dev lo; ip route add default dev lo
nft -j -f -
{sys.executable} - <<'END'
import socket
server = socket.create_server(("10.88.0.1", 8080))
client = socket.create_connection(("10.96.0.10", 80), timeout=10)
peer, _ = server.accept()
peer.sendall(b"found")
print(client.recv(100).decode())
END
"""
    assert in_namespace(script, text) == "found\n"


def test_a_killed_hosts_table_is_swept_by_the_next_one() -> None:
    """In a namespace of its own: a table without taps goes, the daemon's own comes, and goes with it."""
    script = f"""
nft add table inet podvisor-dead
nft add table inet another
{sys.executable} - <<'END'
import asyncio, subprocess, tempfile
from pathlib import Path
from hypervisor.net.network import HostNetwork

def tables():
    listed = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    return set(line.split()[-1] for line in listed.splitlines())

async def main():
    network = HostNetwork(Path(tempfile.mkdtemp()) / "network.json")
    network.set_ranges(["10.88.0.0/24"], [])
    running = asyncio.create_task(network.run())
    while network.table not in tables():
        await asyncio.sleep(0.01)
    assert tables() == {{"another", network.table}}, tables()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert tables() == {{"another"}}, tables()

asyncio.run(main())
END
"""
    in_namespace(script)
