"""The packet filter: nft itself takes it, in a network namespace of the test's own, and packets fare as they should."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from hypervisor.net.addresses import Address
from hypervisor.net.limits import Limits
from hypervisor.net.ruleset import PodPort, State, render
from hypervisor.net.services import Endpoint, ServicePort
from hypervisor.net.table import change, lacks, whole

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


def document(made: State) -> str:
    return json.dumps({"nftables": whole(render(made))})


def in_namespace(script: str, text: str = "") -> str:
    done = subprocess.run(
        ["unshare", "--net", "sh", "-ec", script], input=text, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nft_takes_it_again_and_again() -> None:
    text = document(
        state(
            service("default-web", "10.96.0.10", "10.88.0.1", "10.88.0.2", node_port=30080),
            service("default-web6", "fd96::10", "fd88::1"),
            service("sticky", "10.96.0.12", "10.88.0.1", affinity=600),
            service("empty", "10.96.0.11"),
        )
    )
    listed = in_namespace("cat > /dev/shm/rules.$$; for i in 1 2 3; do nft -j -f /dev/shm/rules.$$; done;"
                          "rm /dev/shm/rules.$$; nft list ruleset", text)  # fmt: skip
    assert listed.count("table inet podvisor-aaaa") == 1
    assert "10.96.0.10 . tcp . 80 : goto svc4-default-web" in listed
    assert "fd96::10 . tcp . 80 : goto svc6-default-web6" in listed
    assert "tcp . 30080 : goto svc4-default-web" in listed
    assert listed.count("timeout 10m") == 2
    assert '"pvaaaa00000001" . fd88::1' in listed


def test_two_hosts_in_one_namespace_leave_each_other_alone() -> None:
    other = State("podvisor-bbbb", "pvbbbb", ())
    first, second = document(state()), document(other)
    listed = in_namespace("nft -j -f - && printf '%s' \"$0\" >/dev/null; nft list tables", first)
    assert "podvisor-aaaa" in listed
    both = in_namespace(f"printf '%s' '{first}' | nft -j -f -; nft -j -f -; nft list tables", second)
    assert "podvisor-aaaa" in both
    assert "podvisor-bbbb" in both


def on_the_way(made: State) -> int:
    """How many rules every packet passes."""
    return sum(len(chain.rules) for name, chain in render(made).chains.items() if not name.startswith("svc"))


def test_thousands_of_services_are_one_look_up() -> None:
    many = [service(f"s{i}", f"10.96.{i // 250}.{i % 250}", "10.88.0.1", "10.88.0.2") for i in range(2000)]
    assert on_the_way(state(*many)) == on_the_way(state())
    in_namespace("nft -j -f -", document(state(*many)))


def test_a_service_leads_to_its_endpoint_and_an_empty_one_refuses() -> None:
    """Through the kernel: a client in the host's own namespace, an endpoint on an address of its own."""
    text = document(state(service("web", "10.96.0.10", "10.88.0.1"), service("none", "10.96.0.11")))
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


def test_one_endpoint_is_one_chain() -> None:
    many = [service(f"s{i}", f"10.96.{i // 250}.{i % 250}", "10.88.0.1", "10.88.0.2") for i in range(300)]
    before = render(state(*many))
    many[7] = service("s7", "10.96.0.7", "10.88.0.2")
    after = render(state(*many))
    assert [next(iter(c)) for c in change(before, after)] == ["flush", "add"]
    assert "svc4-s7" in str(change(before, after))
    first, second = (json.dumps({"nftables": c}) for c in (whole(before), change(before, after)))
    listed = in_namespace(
        f"nft -j -f -; printf '%s' '{second}' | nft -j -f -; nft list chain inet podvisor-aaaa svc4-s7", first
    )
    assert "10.88.0.2" in listed
    assert "10.88.0.1" not in listed


def test_from_any_state_to_any_other() -> None:
    """The difference brings the kernel to what the whole would; both as nft lists them."""
    web, more = service("web", "10.96.0.10", "10.88.0.1", node_port=30080), service("web", "10.96.0.10", "10.88.0.2")
    states = [
        state(),
        state(web),
        state(more, service("none", "10.96.0.11")),
        state(service("none", "10.96.0.12"), web),
    ]
    for old in states:
        for new in states:
            texts = [json.dumps({"nftables": c}) for c in (whole(render(old)), change(render(old), render(new)))]
            script = "nft -j -f -; " + f"printf '%s' '{texts[1]}' | nft -j -f -; nft -j list table inet podvisor-aaaa"
            listing = json.loads(in_namespace(script, texts[0]))["nftables"]
            assert lacks(listing, render(new)) == []


def test_what_was_changed_by_hand_is_seen() -> None:
    table = render(state(service("web", "10.96.0.10", "10.88.0.1")))
    text = json.dumps({"nftables": whole(table)})
    for by_hand, lacking in (
        ("flush chain inet podvisor-aaaa leaving", "leaving"),
        ("flush set inet podvisor-aaaa pods4", "pods4"),
        ("delete element inet podvisor-aaaa services4 { 10.96.0.10 . tcp . 80 }", "services4"),
        ("flush table inet podvisor-aaaa", "to-host"),
    ):
        listed = in_namespace(f"nft -j -f -; nft '{by_hand}'; nft -j list table inet podvisor-aaaa", text)
        assert lacking in lacks(json.loads(listed)["nftables"], table), by_hand


def test_affinity_keeps_a_client_on_its_endpoint_and_two_hosts_ports_lead_to_theirs() -> None:
    """Through the kernel: as many connections as make chance unlikely; the third Service has a port of the host."""
    sticky = service("sticky", "10.96.0.10", "10.88.0.1", "10.88.0.2", "10.88.0.3", affinity=600)
    loose = service("loose", "10.96.0.11", "10.88.0.1", "10.88.0.2", "10.88.0.3")
    port = ServicePort("host-port", (address("127.0.0.9"),), "tcp", 18080, (Endpoint(address("10.88.0.2"), 8080),))
    script = f"""
ip link set lo up; for i in 1 2 3; do ip addr add 10.88.0.$i/32 dev lo; done; ip route add default dev lo
nft -j -f -
{sys.executable} - <<'END'
import select, socket
servers = [socket.create_server((f"10.88.0.{{i}}", 8080)) for i in (1, 2, 3)]
def reached(target):
    with socket.create_connection(target, timeout=10):
        (found,), _, _ = select.select(servers, [], [], 10)
        found.accept()[0].close()
        return servers.index(found) + 1
print(len({{reached(("10.96.0.10", 80)) for _ in range(30)}}), len({{reached(("10.96.0.11", 80)) for _ in range(60)}}),
      reached(("127.0.0.9", 18080)))
END
"""
    assert in_namespace(script, document(state(sticky, loose, port))) == "1 3 2\n"


@pytest.mark.parametrize("limits", [Limits(incoming=1_000_000), Limits(outgoing=1_000_000)], ids=["in", "out"])
def test_bandwidth(limits: Limits) -> None:
    """Through the kernel, with the loopback interface for a tap: 3 MB at 1 MB/s, of which one may come at once."""
    made = replace(state(), pods=(PodPort("lo", (address("127.0.0.1"),), "uid", limits),))
    script = f"""
ip link set lo mtu 1500 up
nft -j -f -
{sys.executable} - <<'END'
import socket, threading, time
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname(), timeout=60)
peer, _ = server.accept()
began = time.monotonic()
threading.Thread(target=lambda: (client.sendall(bytes(3_000_000)), client.close())).start()
got = 0
while piece := peer.recv(65536):
    got += len(piece)
print(got, time.monotonic() - began > 1.2)
END
"""
    assert in_namespace(script, document(made)) == "3000000 True\n"


def test_a_link_that_was_changed_by_hand_is_put_back() -> None:
    """A real tap in a namespace of its own, whose route, address and state somebody takes away."""
    script = f"""
ip link set lo up
{sys.executable} - <<'END'
import asyncio, os, subprocess, tempfile
from pathlib import Path
from hypervisor.net import network as module
from hypervisor.net.network import HostNetwork
from hypervisor.net.pods import PodFacts
from hypervisor.vmm.tap import open_tap
module.REPAIR_S, module.REST = 0.1, 1

def links():
    shown = subprocess.run("ip -4 route; ip -6 route; ip addr", shell=True, capture_output=True, text=True, check=True)
    return shown.stdout

def whole():
    found = links()
    return all(word in found for word in ("10.88.0.1 dev", "fd88::1 dev", "169.254.1.1/32"))

async def main():
    network = HostNetwork(Path(tempfile.mkdtemp()) / "network.json")
    network.set_ranges(["10.88.0.0/24", "fd88::/64"], [])
    running = asyncio.create_task(network.run())
    await network.allocate("a")
    tap = network.tap_prefix + "00000001"
    held = open_tap(tap)
    await network.connect("a", tap, "52:54:00:00:00:01", PodFacts())
    assert whole(), links()
    for by_hand in ("route del 10.88.0.1", "-6 route del fd88::1", "addr flush dev " + tap, "link set down dev " + tap):
        subprocess.run(["ip", *by_hand.split()], check=True)
        async with asyncio.timeout(60):
            while not whole():
                await asyncio.sleep(0.05)
    subprocess.run(["ip", "link", "del", tap], check=True)
    async with asyncio.timeout(60):
        await network.wait_unplugged("a")
    os.close(held)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)

asyncio.run(main())
END
"""
    in_namespace(script)
