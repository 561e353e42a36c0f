"""What goes wrong amid a session, and containers that make it hard: unmodified kubectl on a cluster of one host."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import aiohttp
import pytest
from conftest import wait_for
from local_cluster import KUBECTL, WEBSOCKETS, Cluster, running_cluster
from yarl import URL

from hypervisor.cli.cluster_state import MASTER

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.slow]

POD = """
apiVersion: v1
kind: Pod
metadata: {name: box}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: localhost/podvisor/busybox
    command:
    - sh
    - -c
    - echo here; mkdir /www; echo served > /www/index.html; httpd -p 127.0.0.1:8080 -h /www; exec sleep 100000
  - name: restarts
    image: localhost/podvisor/busybox
    command: [sh, -c, 'echo begun $(cat /proc/uptime); sleep 1; exit 3']
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(("busybox",), "--hosts", "1") as made:
        made.kubectl("apply", "-f", "-", stdin=POD)
        wait_for(lambda: "running" in state_of(made, "c"), "the pod runs", 300)
        yield made


def state_of(cluster: Cluster, container: str) -> str:
    path = f"{{.status.containerStatuses[?(@.name=='{container}')].state}}"
    return cluster.kubectl("get", "pod", "box", "-o", f"jsonpath={path}")


@contextmanager
def started(cluster: Cluster, *args: str, websockets: bool = True) -> Iterator[subprocess.Popen[bytes]]:
    """kubectl, killed at the end."""
    env = {**os.environ, "HOME": str(cluster.state), "KUBECONFIG": str(cluster.paths.kubeconfig)}
    env |= dict.fromkeys(WEBSOCKETS, str(websockets).lower())
    pipe = subprocess.PIPE
    with subprocess.Popen([str(KUBECTL), *args], stdin=pipe, stdout=pipe, stderr=pipe, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


# ---- the node, without the master ------------------------------------------------------------------------------------


def node(cluster: Cluster, method: str, path: str) -> tuple[int, str]:
    spec = json.loads((cluster.paths.root / "cluster.json").read_text())["hosts"][0]
    pki = cluster.paths.root / "master/pki"
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    context.load_cert_chain(str(pki / "apiserver-kubelet-client.pem"))

    async def go() -> tuple[int, str]:
        url = URL(f"https://{spec['address']}:{spec['port']}{path}", encoded=True)
        async with aiohttp.ClientSession() as session, session.request(method, url, ssl=context) as answer:
            return answer.status, await answer.text()

    return asyncio.run(go())


def in_box(cluster: Cluster, command: str) -> str:
    code, text = node(cluster, "POST", "/run/default/box/c?cmd=" + quote(command))
    assert code == 200, text
    return text


def daemon(cluster: Cluster, name: str) -> int:
    process = cluster.paths.process(name)
    assert process is not None
    return process.pid


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


# ---- logs ------------------------------------------------------------------------------------------------------------


def test_a_log_is_there_while_the_container_restarts(cluster: Cluster) -> None:
    """Waiting for its next start, it shows the last instance; `--previous` the one before, once there were two."""
    wait_for(lambda: "CrashLoopBackOff" in state_of(cluster, "restarts"), "the container waits to be restarted", 120)
    seen = set()
    for _ in range(3):
        seen.add(cluster.kubectl("logs", "box", "-c", "restarts"))
    assert all(text.startswith("begun ") and text.count("\n") == 1 for text in seen), seen

    assert cluster.kubectl("logs", "box", "-c", "restarts", "--previous").startswith("begun ")


# ---- tricks with paths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/containerLogs/default/box/..%2f..%2f..%2fetc%2fpasswd",
        "/containerLogs/default/..%2fdefault%2fbox/c",
        "/containerLogs/..%2f..%2fdefault/box/c",
        "/containerLogs/default/box/c%00",
        "/containerLogs/default/box/%ff%fe",
        "/exec/default/%2e%2e/c?command=true&output=1",
        "/portForward/default/box%2f..?port=1",
    ],
)
def test_a_trick_with_a_path_is_a_clear_no(cluster: Cluster, path: str) -> None:
    code, text = node(cluster, "GET", path)
    assert code in (400, 404), text
    assert "root:" not in text and "Traceback" not in text


# ---- the master goes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("websockets", [True, False])
def test_a_master_killed_amid_exec_leaves_nothing(cluster: Cluster, websockets: bool) -> None:
    host = daemon(cluster, "host-1")
    cluster.kubectl("exec", "box", "-c", "c", "--", "true")
    script = ("sh", "-c", "echo begun; exec cat - /dev/null")
    with started(cluster, "exec", "-i", "box", "-c", "c", "--", *script, websockets=websockets) as client:
        assert line_of(client) == b"begun\n"
        assert "cat - /dev/null" in in_box(cluster, "ps -o args")
        os.kill(daemon(cluster, MASTER), 9)
        code = client.wait(60)
    assert code != 0 or not websockets  # over SPDY, kubectl takes a connection that was cut for success
    wait_for(lambda: "cat - /dev/null" not in in_box(cluster, "ps -o args"), "nothing is left in the guest", 60)
    cluster.hv("cluster", "up")
    wait_for(lambda: cluster.run_hv("exec", "box", "-c", "c", "--", "true").returncode == 0, "exec works again", 60)
    assert descriptors(host) < 200


# ---- a flood ---------------------------------------------------------------------------------------------------------

FLOOD_MB = 24
LOG_MB = 22
"""More than a container's log may take (two files of 10 MB), less than the flood."""
FLOOD = f"""
apiVersion: v1
kind: Pod
metadata: {{name: flood}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: localhost/podvisor/busybox
    command: [sh, -c, 'yes {"x" * 99} | head -c {FLOOD_MB << 20}; echo; echo the flood is over; exec sleep 100000']
"""


def test_a_flooded_log_is_limited_in_the_guest(cluster: Cluster) -> None:
    host = daemon(cluster, "host-1")
    cluster.kubectl("apply", "-f", "-", stdin=FLOOD)
    cluster.kubectl("wait", "--for=condition=Ready", "pod/flood", "--timeout=80s")
    wait_for(lambda: "over" in cluster.kubectl("logs", "flood", "--tail=1"), "the flood is over", 300)
    before = resident_mb(host)
    with started(cluster, "logs", "flood") as reader:
        assert reader.stdout is not None
        size, last = 0, b""
        while data := reader.stdout.read(1 << 20):
            size, last = size + len(data), (last + data)[-100:]
        assert reader.wait(60) == 0
    assert 1 << 20 < size < LOG_MB << 20
    assert last.endswith(b"the flood is over\n")
    assert resident_mb(host) - before < 32
    assert cluster.kubectl("exec", "box", "-c", "c", "--", "echo", "unharmed") == "unharmed\n"
    cluster.kubectl("delete", "pod", "flood")


def resident_mb(pid: int) -> float:
    line = next(r for r in Path(f"/proc/{pid}/status").read_text().splitlines() if r.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


# ---- the VM goes (the last test: its pod does not come back as it was) -----------------------------------------------


def machine(cluster: Cluster) -> int:
    (path,) = cluster.paths.host("host-1").glob("pods/*/vm/processes.json")
    return int(json.loads(path.read_text())["qemu"]["pid"])


def forwarded(client: subprocess.Popen[bytes]) -> socket.socket:
    """A connection through kubectl's port-forward on which a request has begun, after another that was served."""
    found = re.search(rb"127\.0\.0\.1:(\d+) ->", line_of(client))
    assert found
    address = ("127.0.0.1", int(found[1]))
    with socket.create_connection(address, timeout=60) as served, served.makefile("rb") as answer:
        served.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert answer.read().endswith(b"served\n")
    connection = socket.create_connection(address, timeout=60)
    connection.sendall(b"GET / HT")
    return connection


def ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


def test_an_agent_that_goes_ends_forwarding_and_following(
    cluster: Cluster, record_property: Callable[[str, object], None]
) -> None:
    """Within seconds; how many is written down, since a busy machine may take longer."""
    forward = ("port-forward", "pod/box", "--address=127.0.0.1")
    with (
        started(cluster, *forward, ":8080", websockets=True) as one,
        started(cluster, *forward, ":8080", websockets=False) as two,
        started(cluster, "logs", "-f", "box", "-c", "c") as follower,
        forwarded(one) as first,
        forwarded(two) as second,
    ):
        assert line_of(follower) == b"here\n"
        began = time.monotonic()
        os.kill(machine(cluster), 9)
        assert ended(first) and ended(second)
        assert follower.wait(60) is not None
        took = time.monotonic() - began
    record_property("seconds", took)
    assert took < 30
