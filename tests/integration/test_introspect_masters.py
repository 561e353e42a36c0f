"""A master killed amid a session, tricks with paths, logs of a container that restarts: kubectl on one host."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import aiohttp
import pytest
from conftest import wait_for
from local_cluster import KUBECTL, Cluster, running_cluster
from yarl import URL

from hypervisor.cli.cluster_state import MASTER

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.slow]

WEBSOCKETS = ("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "KUBECTL_PORT_FORWARD_WEBSOCKETS")
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
