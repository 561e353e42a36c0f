"""exec and port-forward through master and node beside the same over vsock alone, in one cluster of one host."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from host import SAMPLES, Host
from measure import Figure, timed

from hypervisor.agent.wire import FrameType
from hypervisor.introspect.agent import AgentClient, AgentStream
from hypervisor.introspect.spdy.connection import SpdyConnection
from hypervisor.kube.kubeconfig import load
from hypervisor.kube.resources import PODS
from hypervisor.vsock.address import UnixVsock

EXECS = 200
MB = 200
V5 = "v5.channel.k8s.io"
BLOCK = bytes(64 * 1024)
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "box"},
    "spec": {
        "terminationGracePeriodSeconds": 1,
        "containers": [
            {
                "name": "c",
                "image": "localhost/podvisor/busybox",
                "command": [
                    *("sh", "-c"),
                    "mkdir /www; echo served > /www/index.html; httpd -p 127.0.0.1:8080 -h /www; exec sleep 100000",
                ],
            }
        ],
    },
}
QUESTION = b"GET / HTTP/1.0\r\n\r\n"


def run(rounds: int) -> list[Figure]:
    """See the module."""
    with tempfile.TemporaryDirectory(prefix="hvb-") as folder:
        Path(folder).chmod(0o711)
        host = Host(Path(folder) / "s")
        try:
            host.run("image", "import", str(SAMPLES / "busybox.tar"))
            host.run("host", "stop")
            host.run("cluster", "up", "--hosts", "1")
            return asyncio.run(_measure(host.state / "cluster", rounds))
        finally:
            host.run("cluster", "down", "--delete", check=False)


class Cluster:
    """A client of the master, and of the pod's agent without it."""

    def __init__(self, root: Path, session: aiohttp.ClientSession) -> None:
        config = load(root / "admin.kubeconfig")
        self.tls = config.tls()
        self.server = config.server
        self.session = session
        self._root = root
        self.agent: AgentClient

    async def start_pod(self) -> None:
        """Creates it and waits until it runs."""
        url = self.server + PODS.path("default")
        async with self.session.post(url, json=POD, ssl=self.tls) as answer:
            assert answer.status == 201, await answer.text()
        while True:
            async with self.session.get(f"{url}/box", ssl=self.tls) as answer:
                pod = await answer.json()
            if pod["status"].get("phase") == "Running":
                break
            await asyncio.sleep(0.1)
        self.agent = AgentClient(UnixVsock(next(self._root.glob("hosts/*/pods/*/vm/vmx/vsock.sock"))))

    @asynccontextmanager
    async def exec(self, *command: str, stdin: bool = False) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """A command, through the master."""
        query = (
            [("container", "c"), *(("command", word) for word in command)]
            + [("stdout", "true")]
            + [("stdin", "true")] * stdin
        )
        url = f"{self.server}{PODS.path('default')}/box/exec"
        async with self.session.ws_connect(
            url, params=query, protocols=(V5,), ssl=self.tls, max_msg_size=0, compress=0
        ) as socket:
            yield socket

    @asynccontextmanager
    async def forwarding(self) -> AsyncIterator[SpdyConnection]:
        """A port-forward, through the master."""
        host, port = self.server.removeprefix("https://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), ssl=self.tls)
        writer.write(
            f"POST {PODS.path('default')}/box/portforward HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
            "Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: portforward.k8s.io\r\n\r\n".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 101 " in head, head
        connection = SpdyConnection(_Bytes(reader, writer), server=False)
        running = asyncio.create_task(connection.run())
        try:
            yield connection
        finally:
            await connection.close()
            running.cancel()


class _Bytes:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def read(self) -> bytes:
        return await self._reader.read(65536)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def close(self) -> None:
        self._writer.close()


async def _measure(root: Path, rounds: int) -> list[Figure]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        cluster = Cluster(root, session)
        await cluster.start_pod()
        return [
            *await _exec_true(cluster),
            *await _forward(cluster),
            *await _throughput(cluster, rounds),
        ]


async def _exec_true(cluster: Cluster) -> list[Figure]:
    through: list[float] = []
    alone: list[float] = []
    hello: list[float] = []
    for turn in range(EXECS + 10):
        with timed(through, scale=1e3):
            await _true(cluster)
        with timed(alone, scale=1e3):
            async with cluster.agent.stream("exec", _exec_args("true")) as stream:
                await _drain(stream)
        with timed(hello, scale=1e3):
            await cluster.agent.hello()
        if turn == 9:  # warm
            through, alone, hello = [], [], []
    p99 = sorted(through)[int(EXECS * 0.99)]
    return [
        Figure("exec of `true` through the master", "ms", tuple(through), bar=60),
        Figure(f"the slowest 1 % of {EXECS} of these", "ms", (p99,), bar=200),
        Figure("the same over vsock alone", "ms", tuple(alone)),
        Figure("an agent call that runs nothing", "ms", tuple(hello), bar=3),
    ]


async def _true(cluster: Cluster) -> None:
    last = b""
    async with cluster.exec("true") as socket:
        async for message in socket:
            last = message.data
    assert b"Success" in last, last


async def _forward(cluster: Cluster) -> list[Figure]:
    added: list[float] = []
    raw: list[float] = []
    forwarded: list[float] = []
    async with cluster.forwarding() as connection:
        for turn in range(110):
            begin = time.perf_counter()
            await _ask_forwarded(connection, turn)
            middle = time.perf_counter()
            await _ask_raw(cluster.agent)
            end = time.perf_counter()
            if turn >= 10:
                forwarded.append((middle - begin) * 1e3)
                raw.append((end - middle) * 1e3)
        added.append(statistics.median(forwarded) - statistics.median(raw))
    return [
        Figure("one HTTP request through a port-forward", "ms", tuple(forwarded)),
        Figure("the same over a raw vsock channel", "ms", tuple(raw)),
        Figure("what the port-forward adds, at the medians", "ms", tuple(added), bar=5),
    ]


async def _ask_forwarded(connection: SpdyConnection, number: int) -> None:
    ids = {"port": "8080", "requestid": str(number)}
    error = await connection.open({"streamtype": "error", **ids}, fin=True)
    data = await connection.open({"streamtype": "data", **ids})
    await data.write(QUESTION)
    await data.close()
    answer = b""
    while piece := await data.read():
        answer += piece
    assert answer.endswith(b"served\n"), (answer, await error.read())


async def _ask_raw(agent: AgentClient) -> None:
    async with agent.stream("dial", {"port": 8080}) as stream:
        await stream.send_stdin(QUESTION)
        await stream.close_stdin()
        assert (await _drain(stream)).endswith(b"served\n")


async def _drain(stream: AgentStream) -> bytes:
    found = b""
    async for frame in stream.frames():
        if frame.type is FrameType.STDOUT:
            found += frame.payload
    return found


def _exec_args(*argv: str, stdin: bool = False) -> dict[str, object]:
    return {"container": "c", "argv": list(argv), "stdin": stdin}


async def _throughput(cluster: Cluster, rounds: int) -> list[Figure]:
    """MB/s into `cat >/dev/null` and out of `head -c N /dev/zero`; raw: the same agent call over vsock alone."""
    found: dict[str, list[float]] = {"in": [], "out": [], "raw in": [], "raw out": []}
    for _ in range(rounds):
        for name, case in (("in", _in), ("out", _out), ("raw in", _raw_in), ("raw out", _raw_out)):
            start = time.perf_counter()
            await case(cluster)
            found[name].append(MB * 1.048576 / (time.perf_counter() - start))
    share_in = tuple(100 * a / b for a, b in zip(found["in"], found["raw in"], strict=True))
    share_out = tuple(100 * a / b for a, b in zip(found["out"], found["raw out"], strict=True))
    return [
        Figure(f"{MB} MiB into exec's stdin, through the master", "MB/s", tuple(found["in"])),
        Figure("the same over vsock alone", "MB/s", tuple(found["raw in"])),
        Figure("share of it", "%", share_in, bar=60, at_least=True),
        Figure(f"{MB} MiB out of exec's stdout, through the master", "MB/s", tuple(found["out"])),
        Figure("the same over vsock alone", "MB/s", tuple(found["raw out"])),
        Figure("share of it", "%", share_out, bar=60, at_least=True),
    ]


async def _in(cluster: Cluster) -> None:
    async with cluster.exec("sh", "-c", "cat >/dev/null", stdin=True) as socket:
        for _ in range(MB * 16):
            await socket.send_bytes(b"\0" + BLOCK)
        await socket.send_bytes(b"\xff\0")
        async for message in socket:
            assert message.data[0] == 3, message
    assert socket.close_code == 1000


async def _out(cluster: Cluster) -> None:
    got = 0
    async with cluster.exec("head", "-c", str(MB << 20), "/dev/zero") as socket:
        async for message in socket:
            got += len(message.data) - 1 if message.data[0] == 1 else 0
    assert got == MB << 20, got


async def _raw_in(cluster: Cluster) -> None:
    async with cluster.agent.stream("exec", _exec_args("sh", "-c", "cat >/dev/null", stdin=True)) as stream:
        for _ in range(MB * 16):
            await stream.send_stdin(BLOCK)
        await stream.close_stdin()
        await _drain(stream)


async def _raw_out(cluster: Cluster) -> None:
    got = 0
    async with cluster.agent.stream("exec", _exec_args("head", "-c", str(MB << 20), "/dev/zero")) as stream:
        async for frame in stream.frames():
            got += len(frame.payload)
    assert got == MB << 20, got


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(Path(__file__).parent))
    for figure in run(3):
        print(figure.row())
