"""Faults and odd clients of introspection, on two hosts: the agent, the VM and the node are the real ones."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from conftest import wait_for
from local_cluster import KUBECTL, ROOT, WEBSOCKETS, Cluster, running_cluster

from hypervisor.kube.kubeconfig import load

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.slow]

V5 = "v5.channel.k8s.io"
POD = """
apiVersion: v1
kind: Pod
metadata: {name: box-%(number)d}
spec:
  nodeName: host-%(number)d
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: localhost/podvisor/busybox
    command: [sh, -c, 'mkdir /www; echo served > /www/index.html; httpd -p 127.0.0.1:8080 -h /www; exec sleep 100000']
    resources: {limits: {memory: 128Mi}}
  - name: t
    image: localhost/podvisor/busybox
    stdin: true
    tty: true
    command: [sh]
    resources: {limits: {memory: 64Mi}}
"""
STOPPING = """
apiVersion: v1
kind: Pod
metadata: {name: stopping}
spec:
  terminationGracePeriodSeconds: 4
  containers:
  - name: c
    image: localhost/podvisor/busybox
    command: [sh, -c, 'trap : TERM; while :; do sleep 0.2; done']
    resources: {limits: {memory: 64Mi}}
"""
ENDED = """
apiVersion: v1
kind: Pod
metadata: {name: ended}
spec:
  restartPolicy: Never
  containers:
  - {name: c, image: localhost/podvisor/busybox, command: [sh, -c, 'echo the end; exit 3']}
"""
CODES = (0, 1, 2, 42, 125, 126, 127, 128, 200, 254, 255)
SIGNALS = (1, 2, 4, 6, 9, 13, 15)  # busybox's shell ignores 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(("busybox",)) as made:
        for number in (1, 2):
            made.kubectl("apply", "-f", "-", stdin=POD % {"number": number})
        for text in (STOPPING, ENDED):
            made.kubectl("apply", "-f", "-", stdin=text)
        made.kubectl(
            "wait", "--for=condition=Ready", "pod/box-1", "pod/box-2", "pod/stopping", "--timeout=300s", timeout=310
        )
        yield made


# ---- clients ---------------------------------------------------------------------------------------------------------


def environment(cluster: Cluster, websockets: bool = True) -> dict[str, str]:
    chosen = dict.fromkeys(WEBSOCKETS, str(websockets).lower())
    own = {"PYTHONPATH": str(ROOT), "HOME": str(cluster.state), "KUBECONFIG": str(cluster.paths.kubeconfig)}
    return {**os.environ, **own, **chosen}


def by_kubectl(websockets: bool) -> Callable[[Cluster, str], int]:
    def run(cluster: Cluster, script: str) -> int:
        command = [str(KUBECTL), "exec", "box-1", "-c", "c", "--", "sh", "-c", script]
        return subprocess.run(
            command, env=environment(cluster, websockets), capture_output=True, timeout=60, check=False
        ).returncode

    return run


def by_hv(cluster: Cluster, script: str) -> int:
    return cluster.run_hv("exec", "box-1", "-c", "c", "--", "sh", "-c", script).returncode


def by_python(cluster: Cluster, script: str) -> int:
    kubernetes = pytest.importorskip("kubernetes")
    from kubernetes.stream import stream

    with kubernetes.config.new_client_from_config(str(cluster.paths.kubeconfig)) as made:
        api = kubernetes.client.CoreV1Api(made)
        session = stream(
            api.connect_get_namespaced_pod_exec, name="box-1", namespace="default", container="c",
            command=["sh", "-c", script], stdin=False, stdout=True, stderr=True, tty=False, _preload_content=False,
        )  # fmt: skip
        session.run_forever(timeout=30)
        return int(session.returncode)


class Api:
    """WebSockets through the master, or to a node itself."""

    def __init__(self, cluster: Cluster, session: aiohttp.ClientSession) -> None:
        config = load(cluster.paths.kubeconfig)
        self._tls, self._server, self._session = config.tls(), config.server, session

    @asynccontextmanager
    async def socket(self, pod: str, what: str, **query: Any) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        pairs = [(k, str(v)) for k, values in query.items() for v in (values if isinstance(values, list) else [values])]
        url = f"{self._server}/api/v1/namespaces/default/pods/{pod}/{what}"
        async with self._session.ws_connect(
            url, params=pairs, protocols=(V5,), ssl=self._tls, max_msg_size=0
        ) as socket:
            yield socket


@asynccontextmanager
async def api(cluster: Cluster) -> AsyncIterator[Api]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Api(cluster, session)


async def finish(socket: aiohttp.ClientWebSocketResponse) -> tuple[bytes, dict[str, Any]]:
    out = {1: b"", 2: b"", 3: b""}
    async for message in socket:
        out[message.data[0]] += message.data[1:]
    return out[1], json.loads(out[3] or b"{}")


async def until_shown(socket: aiohttp.ClientWebSocketResponse, text: bytes) -> bytes:
    shown = b""
    while text not in shown:
        message = await socket.receive(timeout=30)
        assert isinstance(message.data, bytes), (message, shown)
        shown += message.data[1:]
    return shown


# ---- how a process ended ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run", [by_kubectl(True), by_kubectl(False), by_python, by_hv], ids=["websocket", "spdy", "python", "hv"]
)
def test_codes_and_signals_are_exact_in_every_client(cluster: Cluster, run: Callable[[Cluster, str], int]) -> None:
    wanted = {f"exit {code}": code for code in CODES} | {f"kill -{n} $$": 128 + n for n in SIGNALS}
    with ThreadPoolExecutor(3) as pool:
        found = dict(zip(wanted, pool.map(lambda script: run(cluster, script), wanted), strict=True))
    assert found == wanted


@pytest.mark.parametrize("websockets", [True, False])
def test_a_code_is_not_lost_on_a_client_that_still_sends(cluster: Cluster, websockets: bool) -> None:
    """The process ends with megabytes of input unread."""
    command = [str(KUBECTL), "exec", "-i", "box-1", "-c", "c", "--", "sh", "-c", "echo out; exit 6"]
    for _ in range(3):
        done = subprocess.run(
            command, input=bytes(20 << 20), env=environment(cluster, websockets), capture_output=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (6, b"out\n"), done.stderr


def test_a_terminal_that_goes_is_hung_up(cluster: Cluster) -> None:
    async def go() -> None:
        script = "trap 'echo hup > /tmp/hup; exit' HUP; echo ready; while :; do sleep 0.1; done"
        asked = {"container": "c", "command": ["sh", "-c", script], "stdin": 1, "stdout": 1, "tty": 1}
        async with api(cluster) as client, client.socket("box-1", "exec", **asked) as socket:
            await until_shown(socket, b"ready")
            assert socket._response.connection is not None and socket._response.connection.transport is not None
            socket._response.connection.transport.abort()

    asyncio.run(go())
    wait_for(lambda: by_hv(cluster, "[ -e /tmp/hup ]") == 0, "the process is sent SIGHUP", 20)


# ---- terminals -------------------------------------------------------------------------------------------------------


def test_two_clients_on_one_terminal(cluster: Cluster) -> None:
    """Both see what either types, and what is answered."""

    async def go() -> None:
        streams = {"container": "t", "stdin": 1, "stdout": 1, "tty": 1}
        async with (
            api(cluster) as client,
            client.socket("box-1", "attach", **streams) as one,
            client.socket("box-1", "attach", **streams) as two,
        ):
            for number, typist in enumerate((one, two)):
                await typist.send_bytes(b"\0echo answer-$((%d+40))\n" % number)
                for reader in (one, two):
                    await until_shown(reader, b"answer-%d" % (number + 40))

    asyncio.run(go())


def test_a_storm_of_sizes(cluster: Cluster) -> None:
    async def go() -> None:
        async with (
            api(cluster) as client,
            client.socket(
                "box-1", "exec", container="c", command=["sh", "-c", "read x; stty size"], stdin=1, stdout=1, tty=1
            ) as socket,
        ):
            for number in range(1000):
                size = {"Width": 1 + number % 200, "Height": 1 + number % 50}
                await socket.send_bytes(b"\4" + json.dumps(size).encode())
            await socket.send_bytes(b"\4" + json.dumps({"Width": 111, "Height": 33}).encode())
            await socket.send_bytes(b"\0go\n")
            shown, status = await finish(socket)
            assert status["status"] == "Success"
            assert b"33 111" in shown

    asyncio.run(go())


def test_bytes_that_are_no_text(cluster: Cluster) -> None:
    """In both directions, and in a command's words."""
    data = bytes(range(256)) * 50
    hv = [sys.executable, "-m", "hypervisor.cli.main", "--state-dir", str(cluster.state)]
    done = subprocess.run(
        [*hv, "exec", "-i", "box-1", "-c", "c", "--", "sh", "-c", 'printf "%s" "$1"; cat', "sh", b"\xff\xfe\x80"],
        input=data, env=environment(cluster), capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"\xff\xfe\x80" + data


# ---- many, and those that go -----------------------------------------------------------------------------------------


def test_a_command_of_many_words(cluster: Cluster) -> None:
    words = [str(number) for number in range(500)]
    long = "x" * 60_000
    for run in (cluster.kubectl, cluster.hv):
        assert run("exec", "box-1", "-c", "c", "--", "echo", *words, long).split() == [*words, long]


def test_many_sessions_at_once(cluster: Cluster) -> None:
    async def go() -> None:
        async with api(cluster) as client:

            async def one(number: int) -> None:
                script = f"read x; echo got $x; exit {number}"
                async with client.socket(
                    "box-1", "exec", container="c", command=["sh", "-c", script], stdin=1, stdout=1
                ) as socket:
                    await socket.send_bytes(b"\0%d\n" % number)
                    shown, status = await finish(socket)
                causes = status.get("details", {}).get("causes", [{"message": "0"}])
                assert (shown, causes[0]["message"]) == (b"got %d\n" % number, str(number))

            await asyncio.gather(*(one(number) for number in range(200)))

    asyncio.run(asyncio.wait_for(go(), 110))


def test_into_a_container_that_is_stopping(cluster: Cluster) -> None:
    """A command still runs while the grace period does, and is told of its end when the container has gone."""

    async def go() -> float:
        long = ["sh", "-c", "echo begun; exec sleep 1000"]
        async with api(cluster) as client, client.socket("stopping", "exec", command=long, stdout=1) as old:
            await until_shown(old, b"begun")
            cluster.kubectl("delete", "pod", "stopping", "--wait=false")
            began = time.monotonic()
            async with client.socket("stopping", "exec", command=["echo", "late"], stdout=1) as late:
                shown, status = await finish(late)
            assert (shown, status["status"]) == (b"late\n", "Success")
            _, status = await finish(old)
            assert status.get("status") == "Failure", status
            return time.monotonic() - began

    assert asyncio.run(go()) < 30


# ---- the node itself -------------------------------------------------------------------------------------------------


def node_request(cluster: Cluster, method: str, host: int, path: str, *, certificate: bool = True) -> tuple[int, str]:
    spec = json.loads((cluster.paths.root / "cluster.json").read_text())["hosts"][host - 1]
    pki = cluster.paths.root / "master/pki"
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    if certificate:
        context.load_cert_chain(str(pki / "apiserver-kubelet-client.pem"))

    async def go() -> tuple[int, str]:
        url = f"https://{spec['address']}:{spec['port']}{path}"
        async with aiohttp.ClientSession() as session, session.request(method, url, ssl=context) as answer:
            return answer.status, await answer.text()

    return asyncio.run(go())


def test_a_vm_on_another_host_is_not_there(cluster: Cluster) -> None:
    for route in ("exec", "attach", "containerLogs"):
        code, text = node_request(cluster, "GET", 1, f"/{route}/default/box-2/c?command=true&output=1")
        assert (code, json.loads(text)["reason"]) == (404, "NotFound")
    code, text = node_request(cluster, "GET", 1, "/portForward/default/box-2?port=8080")
    assert code == 404
    for number in (1, 2):
        name = cluster.kubectl("exec", f"box-{number}", "-c", "c", "--", "hostname")
        assert name.strip() == f"box-{number}"


def test_a_command_without_a_stream(cluster: Cluster) -> None:
    """``POST /run``, as a kubelet has it."""
    where = "/run/default/box-1/c?cmd="
    assert node_request(cluster, "POST", 1, where + quote("echo both words")) == (200, "both words\n")
    code, text = node_request(cluster, "POST", 1, where + quote("ls /nonesuch"))
    assert code == 500 and "exit code 1" in text and "/nonesuch" in text
    assert node_request(cluster, "POST", 1, where)[0] == 422
    assert node_request(cluster, "POST", 1, where + "x", certificate=False)[0] == 401


# ---- debug -----------------------------------------------------------------------------------------------------------


def in_guest(cluster: Cluster, *command: str, pod: str = "box-1") -> subprocess.CompletedProcess[str]:
    return cluster.run_hv("debug", pod, "--", *command)


def test_a_process_beside_the_containers(cluster: Cluster) -> None:
    """It sees what no container sees, ends with its code, and leaves nothing."""
    shown = in_guest(cluster, "sh", "-c", "ps; ls /proc/1/root/usr/lib/podvisor; wget -qO- 127.0.0.1:8080; exit 9")
    assert shown.returncode == 9, shown.stderr
    assert "httpd" in shown.stdout and "hv-exec" in shown.stdout and "served" in shown.stdout
    in_guest(cluster, "sh", "-c", "sleep 98765 & sleep 98765 & echo left")
    left = "ps | grep '[s]leep 98765'; ls -d /sys/fs/cgroup/podvisor-privileged/debug.* | wc -l"
    wait_for(lambda: in_guest(cluster, "sh", "-c", left).stdout.split() == ["1"], "nothing of it is left")
    assert "not found" in in_guest(cluster, "nonesuch").stderr


def test_debug_is_a_right_of_its_own_and_on_record(cluster: Cluster) -> None:
    cluster.kubectl("create", "role", "executor", "--verb=create,get", "--resource=pods,pods/exec")
    cluster.kubectl("create", "rolebinding", "executor", "--role=executor", "--user=joe")
    assert cluster.kubectl("--as=joe", "exec", "box-1", "-c", "c", "--", "echo", "may") == "may\n"

    async def debug_as_joe() -> int:
        config = load(cluster.paths.kubeconfig)
        url = f"{config.server}/api/v1/namespaces/default/pods/box-1/debug?command=true&stdout=1"
        async with (
            aiohttp.ClientSession(headers={"Impersonate-User": "joe"}) as session,
            session.get(url, ssl=config.tls()) as answer,
        ):
            return answer.status

    assert asyncio.run(debug_as_joe()) == 403
    in_guest(cluster, "echo", "on-record")
    log = Path(cluster.paths.root / "master/audit.log")
    wait_for(lambda: log.read_text().count("on-record") == 2, "its beginning and its end are on record", 10)
    stages = [json.loads(line)["stage"] for line in log.read_text().splitlines() if "on-record" in line]
    assert stages == ["ResponseStarted", "ResponseComplete"]


# ---- logs ------------------------------------------------------------------------------------------------------------


def test_the_log_of_a_pod_that_has_ended(cluster: Cluster) -> None:
    cluster.kubectl("wait", "--for=jsonpath={.status.phase}=Failed", "pod/ended", "--timeout=60s")
    assert cluster.kubectl("logs", "ended") == "the end\n"
    assert cluster.kubectl("logs", "ended", "--limit-bytes=3") == "the"
    assert cluster.run_hv("logs", "ended").stdout == "the end\n"


# ---- the VM goes (the last test: box-2 does not come back as it was) -------------------------------------------------


def machine_of(cluster: Cluster, host: str, pod: str) -> int:
    """The process that is a pod's VM."""
    for path in cluster.paths.host(host).glob("pods/*/pod.json"):
        if json.loads(path.read_text())["manifest"]["metadata"]["name"] == pod:
            return int(json.loads((path.parent / "vm/processes.json").read_text())["qemu"]["pid"])
    raise AssertionError(f"{host} has no pod {pod}")


def test_a_vm_that_goes_is_told_to_every_client_within_seconds(cluster: Cluster) -> None:
    begun = [str(KUBECTL), "exec", "box-2", "-c", "c", "--", "sh", "-c", "echo begun; exec sleep 1000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    follow = [str(KUBECTL), "attach", "box-2", "-c", "c"]
    clients = [
        subprocess.Popen(begun, env=environment(cluster, True), **pipes),
        subprocess.Popen(begun, env=environment(cluster, False), **pipes),
    ]
    attached = subprocess.Popen(follow, env=environment(cluster), **pipes)
    try:
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline() == b"begun\n"
        killed = time.monotonic()
        os.kill(machine_of(cluster, "host-2", "box-2"), 9)
        for client in clients:
            assert client.wait(5 - (time.monotonic() - killed)) not in (0, None)
        attached.wait(10)
    finally:
        for client in (*clients, attached):
            client.kill()
            client.wait(10)
