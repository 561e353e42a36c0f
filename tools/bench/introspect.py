"""exec and port-forward through master and node beside the same over vsock alone, in one cluster of one host."""

from __future__ import annotations

import asyncio
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import aiohttp
from host import SAMPLES, Host
from measure import Figure, timed

from hypervisor.agent.wire import FrameType
from hypervisor.cli.cluster_state import MASTER, ClusterPaths
from hypervisor.introspect.agent import AgentClient, AgentStream
from hypervisor.introspect.kept import KeptConnections
from hypervisor.introspect.spdy.connection import SpdyConnection
from hypervisor.kube.kubeconfig import load
from hypervisor.kube.resources import PODS
from hypervisor.vsock.address import UnixVsock

EXECS = 200
WARM = 10
REQUESTS = 100
AT_ONCE = 10
MB = 100
GIB = 1 << 30
T = TypeVar("T")
V5 = "v5.channel.k8s.io"
BLOCK = bytes(64 * 1024)
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "box"},
    "spec": {
        "terminationGracePeriodSeconds": 1,
        "volumes": [{"name": "mem", "emptyDir": {"medium": "Memory", "sizeLimit": "1100Mi"}}],
        "containers": [
            {
                "name": "c",
                "image": "localhost/podvisor/busybox",
                "resources": {"limits": {"memory": "1400Mi"}},
                "volumeMounts": [{"name": "mem", "mountPath": "/mem"}],
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
        address = UnixVsock(next(self._root.glob("hosts/*/pods/*/vm/vmx/vsock.sock")))
        self.agent = AgentClient(address, KeptConnections())

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

    @asynccontextmanager
    async def watched_memory(self) -> AsyncIterator[dict[str, float]]:
        """By how many MiB master and node have grown at most since the context began; complete at its end."""
        paths = ClusterPaths(self._root.parent)
        pids = {"the master": paths.process(MASTER), "the node": paths.process("host-1")}
        first = {name: _resident(process.pid) for name, process in pids.items() if process is not None}
        grown = dict.fromkeys(first, 0.0)

        async def watch() -> None:
            while True:
                for name, begin in first.items():
                    process = pids[name]
                    assert process is not None
                    grown[name] = max(grown[name], _resident(process.pid) - begin)
                await asyncio.sleep(0.2)

        watching = asyncio.create_task(watch())
        try:
            yield grown
        finally:
            watching.cancel()


def _resident(pid: int) -> float:
    line = next(r for r in Path(f"/proc/{pid}/status").read_text().splitlines() if r.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


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
        await _within(120, "the pod's start", cluster.start_pod())
        return [
            *await _within(300, "exec of true", _exec_true(cluster)),
            *await _within(120, "port-forward, one at a time", _forward(cluster)),
            *await _within(180, "port-forward, many at once", _forward_many(cluster)),
            *await _within(200 * rounds, "throughput", _throughput(cluster, rounds)),
            *await _within(900, "1 GiB both ways", _gibibyte(cluster)),
        ]


async def _within(seconds: float, what: str, work: Awaitable[T]) -> T:
    """The result of `work`; one that stands still ends the run, and is named."""
    print(f"{what} ...", file=sys.stderr, flush=True)
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        sys.exit(f"{what}: not done within {seconds:g} s")


async def _exec_true(cluster: Cluster) -> list[Figure]:
    through: list[float] = []
    alone: list[float] = []
    hello: list[float] = []
    for turn in range(WARM + EXECS):
        if turn == WARM:
            through, alone, hello = [], [], []
        with timed(through, scale=1e3):
            await _true(cluster)
        with timed(alone, scale=1e3):
            async with cluster.agent.stream("exec", _exec_args("true")) as stream:
                await _drain(stream)
        with timed(hello, scale=1e3):
            await cluster.agent.hello()
    p99 = sorted(through)[int(EXECS * 0.99) - 1]
    return [
        Figure("exec of `true` through the master", "ms", tuple(through), bar=60),
        Figure(f"the 99th percentile of these {EXECS}", "ms", (p99,), bar=200),
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
    """One request after the other, in turn with the same over vsock alone."""
    forwarded: list[float] = []
    raw: list[float] = []
    async with cluster.forwarding() as connection:
        for turn in range(WARM + REQUESTS):
            if turn == WARM:
                forwarded, raw = [], []
            with timed(forwarded, scale=1e3):
                await _ask_forwarded(connection, turn)
            with timed(raw, scale=1e3):
                await _ask_raw(cluster.agent)
    added = statistics.median(forwarded) - statistics.median(raw)
    return [
        Figure("one HTTP request through a port-forward", "ms", tuple(forwarded)),
        Figure("the same over a raw vsock channel", "ms", tuple(raw)),
        Figure("what the port-forward adds, at the medians", "ms", (added,), bar=5),
    ]


async def _forward_many(cluster: Cluster) -> list[Figure]:
    """`AT_ONCE` connections at a time, in turn with as many over vsock alone; every answer is checked."""
    forwarded: list[float] = []
    raw: list[float] = []
    async with cluster.forwarding() as connection:

        async def ask(number: int) -> None:
            with timed(forwarded, scale=1e3):
                await _ask_forwarded(connection, number)

        async def ask_raw() -> None:
            with timed(raw, scale=1e3):
                await _ask_raw(cluster.agent)

        for first in range(0, REQUESTS, AT_ONCE):
            await asyncio.gather(*(ask(first + number) for number in range(AT_ONCE)))
            await asyncio.gather(*(ask_raw() for _ in range(AT_ONCE)))
    added = statistics.median(forwarded) - statistics.median(raw)
    return [
        Figure(f"{REQUESTS} HTTP requests, {AT_ONCE} at once, through a port-forward, each", "ms", tuple(forwarded)),
        Figure("the same over raw vsock channels", "ms", tuple(raw)),
        Figure("what the port-forward adds, at the medians", "ms", (added,), bar=5),
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
    """MB/s into `cat >/dev/null` and out of `cat /dev/zero`; raw: the same agent call over vsock alone."""
    found: dict[str, list[float]] = {"in": [], "out": [], "raw in": [], "raw out": []}
    for _ in range(rounds):
        for name, case in (("in", _in), ("raw in", _raw_in), ("out", _out), ("raw out", _raw_out)):
            start = time.perf_counter()
            await case(cluster)
            found[name].append(MB * 1.048576 / (time.perf_counter() - start))
    share_in = tuple(100 * a / b for a, b in zip(found["in"], found["raw in"], strict=True))
    share_out = tuple(100 * a / b for a, b in zip(found["out"], found["raw out"], strict=True))
    return [
        Figure(f"{MB} MiB into `cat >/dev/null`, through the master", "MB/s", tuple(found["in"])),
        Figure("the same over vsock alone", "MB/s", tuple(found["raw in"])),
        Figure("share of it", "%", share_in, bar=60, at_least=True),
        Figure(f"{MB} MiB out of `cat /dev/zero`, through the master", "MB/s", tuple(found["out"])),
        Figure("the same over vsock alone", "MB/s", tuple(found["raw out"])),
        Figure("share of it", "%", share_out, bar=60, at_least=True),
    ]


async def _in(cluster: Cluster) -> None:
    await _send(cluster, "cat >/dev/null", (BLOCK for _ in range(MB * 16)))


async def _send(cluster: Cluster, command: str, blocks: Iterable[bytes]) -> None:
    """`blocks` into a command's stdin, to its end."""
    last = b""
    async with cluster.exec("sh", "-c", command, stdin=True) as socket:
        for block in blocks:
            await socket.send_bytes(b"\0" + block)
        await socket.send_bytes(b"\xff\0")
        async for message in socket:
            last = message.data
    assert b"Success" in last, last
    assert socket.close_code == 1000, socket.close_code


async def _out(cluster: Cluster) -> None:
    got = 0
    async with cluster.exec("cat", "/dev/zero") as socket:
        while got < MB << 20:
            message = await socket.receive()
            assert message.data[0] == 1, message
            got += len(message.data) - 1


async def _raw_in(cluster: Cluster) -> None:
    async with cluster.agent.stream("exec", _exec_args("sh", "-c", "cat >/dev/null", stdin=True)) as stream:
        for _ in range(MB * 16):
            await stream.send_stdin(BLOCK)
        await stream.close_stdin()
        await _drain(stream)


async def _raw_out(cluster: Cluster) -> None:
    got = 0
    async with cluster.agent.stream("exec", _exec_args("cat", "/dev/zero")) as stream:
        while got < MB << 20:
            got += len((await stream.receive()).payload)


async def _gibibyte(cluster: Cluster) -> list[Figure]:
    """Into a file in memory and out again. Hashed at this end: what hashing takes is left out of the figures."""
    salt = os.urandom(len(BLOCK) - 4)
    blocks = GIB // len(BLOCK)
    sent, got = hashlib.sha256(), hashlib.sha256()
    for index in range(blocks):
        sent.update(index.to_bytes(4, "big") + salt)
    async with cluster.watched_memory() as grown:
        into = await _seconds(_send(cluster, "cat >/mem/big", (i.to_bytes(4, "big") + salt for i in range(blocks))))
        hashing: list[float] = []
        out = await _seconds(_fetch(cluster, got, hashing))
    assert got.digest() == sent.digest(), "what came back is not what was sent"
    return [
        Figure("1 GiB into a memory volume through exec's stdin", "MB/s", (GIB / 1e6 / into,)),
        Figure("the same 1 GiB out of it, hashes equal", "MB/s", (GIB / 1e6 / (out - sum(hashing)),)),
        *(Figure(f"memory that {name} grew by meanwhile", "MiB", (mib,), bar=32) for name, mib in grown.items()),
    ]


async def _fetch(cluster: Cluster, digest: hashlib._Hash, hashing: list[float]) -> None:
    async with cluster.exec("cat", "/mem/big") as socket:
        async for message in socket:
            if message.data[0] == 1:
                with timed(hashing):
                    digest.update(memoryview(message.data)[1:])


async def _seconds(work: Awaitable[object]) -> float:
    start = time.perf_counter()
    await work
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(Path(__file__).parent))
    for figure in run(3):
        print(figure.row())
