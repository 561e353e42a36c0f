"""Bad input and faults of the streaming routes: a real aiohttp server, a real agent behind a vsock-like front."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from agent_under_test import AgentUnderTest, open_descriptors, until
from aiohttp import WSMsgType, web

from hypervisor.agent.container import Container
from hypervisor.agent.wire import AGENT_PORT
from hypervisor.controller.api_errors import errors, note_started
from hypervisor.errors import NotFound
from hypervisor.introspect.routes import add_routes
from hypervisor.introspect.spdy.connection import SpdyConnection
from hypervisor.introspect.target import PodTarget
from hypervisor.vsock.address import UnixVsock

V4, V5 = "v4.channel.k8s.io", "v5.channel.k8s.io"
EXEC = "/exec/default/box/main?output=1&error=1&command="


class Front:
    """The host side of a VM's vsock: takes ``CONNECT 1024`` and joins the agent's socket."""

    def __init__(self, agent: Path) -> None:
        self._agent = agent
        self.open: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.add(writer)
        try:
            assert await reader.readline() == b"CONNECT %d\n" % AGENT_PORT
            there = await self._connect()
            writer.write(b"OK 5000\n")
            await asyncio.gather(_copy(reader, there[1]), _copy(there[0], writer))
        finally:
            self.open.discard(writer)
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        while True:
            try:
                sock.connect(str(self._agent))
                return await asyncio.open_connection(sock=sock)
            except BlockingIOError:  # its backlog is full; a guest's kernel would wait
                await asyncio.sleep(0.001)

    def cut(self) -> None:
        """As if the VM had gone."""
        for writer in self.open:
            writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


class Pods:
    """One pod, or none by another name."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def find(self, namespace: str, name: str) -> PodTarget:
        if (namespace, name) != ("default", "box"):
            raise NotFound(f"no pod {namespace}/{name}")
        return PodTarget(namespace, name, UnixVsock(self._socket), ("main",))


class Node:
    """The kubelet's routes on a port, and the front behind them."""

    def __init__(self, port: int, front: Front, session: aiohttp.ClientSession) -> None:
        self.port = port
        self.front = front
        self.session = session

    @asynccontextmanager
    async def websocket(self, target: str, *protocols: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        url = f"http://127.0.0.1:{self.port}{target}"
        async with self.session.ws_connect(url, protocols=protocols, max_msg_size=0) as socket:
            yield socket

    async def raw(self, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        return reader, writer

    async def status(self, target: str, **headers: str) -> tuple[int, dict[str, Any]]:
        async with self.session.get(f"http://127.0.0.1:{self.port}{target}", headers=headers) as answer:
            return answer.status, await answer.json()


@pytest.fixture
async def node(agent: AgentUnderTest, short_path: Path) -> AsyncIterator[Node]:
    app = web.Application(middlewares=[errors])
    app.on_response_prepare.append(note_started)
    add_routes(app, Pods(short_path / "vsock"))
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    front = Front(agent.path)
    server = await asyncio.start_unix_server(front.serve, short_path / "vsock", limit=1 << 18, backlog=1024)
    connector = aiohttp.TCPConnector(limit=0)
    try:
        async with server, aiohttp.ClientSession(connector=connector) as session:
            yield Node(runner.addresses[0][1], front, session)
            front.cut()
    finally:
        await runner.cleanup()


async def finish(socket: aiohttp.ClientWebSocketResponse) -> tuple[bytes, bytes, dict[str, Any]]:
    """stdout, stderr and the status."""
    out = {1: b"", 2: b"", 3: b""}
    async for message in socket:
        assert message.type is WSMsgType.BINARY
        out[message.data[0]] += message.data[1:]
    return out[1], out[2], json.loads(out[3] or b"{}")


# ---- refused before anything is upgraded -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "headers", "code", "says"),
    [
        (
            "/exec/default/box/main?output=1&command=x",
            {"Sec-WebSocket-Protocol": "v9.channel.k8s.io"},
            422,
            "v5.channel",
        ),
        ("/exec/default/box/main?output=1&command=x", {}, 422, "upgrade to SPDY/3.1"),
        ("/exec/default/box/main?output=1&command=x", {"Upgrade": "SPDY/3.1"}, 422, "X-Stream-Protocol-Version"),
        ("/exec/default/box/main?output=1", {}, 422, "no command"),
        ("/exec/default/box/main?command=x", {}, 422, "at least one of stdin"),
        ("/exec/default/box/main?output=maybe&command=x", {}, 422, "boolean"),
        ("/exec/default/box/other?output=1&command=x", {}, 404, "it has main"),
        ("/exec/default/%2e%2e%2fbox/main?output=1&command=x", {}, 404, "no pod"),
        ("/exec/other/box/main?output=1&command=x", {}, 404, "no pod other/box"),
        ("/containerLogs/default/box/..%2f..%2fetc", {}, 404, "no container"),
        ("/portForward/default/box?port=80", {}, 422, "upgrade"),
        ("/portForward/default/box?port=0", {"Sec-WebSocket-Protocol": V4}, 422, "not a port"),
        ("/portForward/default/box?port=-1", {"Sec-WebSocket-Protocol": V4}, 422, "not a port"),
        ("/portForward/default/box?port=99999999999", {"Sec-WebSocket-Protocol": V4}, 422, "not a port"),
        ("/portForward/default/box", {"Sec-WebSocket-Protocol": V4}, 422, "at least one port"),
        ("/portForward/default/box?port=" + ",".join(["1"] * 101), {"Sec-WebSocket-Protocol": V4}, 422, "at most 100"),
    ],
)
async def test_what_is_wrong_is_said_in_a_status(
    node: Node, target: str, headers: dict[str, str], code: int, says: str
) -> None:
    from yarl import URL

    url = URL(f"http://127.0.0.1:{node.port}{target}", encoded=True)
    async with node.session.get(url, headers=headers) as answer:
        body = await answer.json()
    assert (answer.status, body["kind"]) == (code, "Status")
    assert says in body["message"] + json.dumps(body.get("details", {}))


@pytest.mark.parametrize("upgrade", ["websocket", "SPDY/3.1"])
async def test_half_an_upgrade_leaves_nothing(node: Node, upgrade: str) -> None:
    before = open_descriptors()
    request = (
        f"GET /portForward/default/box?port=80 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n"
    )
    for size in range(10, len(request), 15):
        _, writer = await node.raw(request[:size].encode())
        writer.close()
    await until(lambda: open_descriptors() == before)


# ---- a session gone wrong --------------------------------------------------------------------------------------------


async def test_what_makes_no_sense_is_ignored(node: Node, standin: Container) -> None:
    async with asyncio.timeout(20), node.websocket(EXEC + "cat&input=1", V5) as socket:
        for message in (
            b"",
            b"\xfe",
            b"\x07x",
            b"\x80" + b"y" * 1000,
            b"\x04",
            b"\x04{",
            b"\x04" + b"[" * 5000,
            b"\xff\x01",
        ):
            await socket.send_bytes(message)
        sizes: list[Any] = [{"Width": -1, "Height": 3}, {"Width": 10**9, "Height": 3}, {"Width": "x"}, [], None]
        for size in sizes:
            await socket.send_bytes(b"\x04" + json.dumps(size).encode())
        await socket.send_bytes(b"\0\xff\xfe\0bytes")
        await socket.send_str("\0text")
        await socket.send_bytes(b"\xff\0")
        out, err, status = await finish(socket)
    assert (out, err, status["status"]) == (b"\xff\xfe\0bytestext", b"", "Success")


@pytest.mark.parametrize("protocol", [V4, V5])
async def test_a_message_too_long_ends_the_session(node: Node, standin: Container, protocol: str) -> None:
    async with asyncio.timeout(20), node.websocket(EXEC + "cat&input=1", protocol) as socket:
        with suppress(OSError):
            await socket.send_bytes(b"\0" + bytes(5 << 20))
        await finish(socket)
    assert socket.close_code in (1009, 1006)  # the close frame, or a reset that overtook it
    await until(lambda: not node.front.open)


async def test_broken_frames_of_a_websocket(node: Node, standin: Container) -> None:
    """Every frame a client might send: the server ends that connection, and nothing of it stays."""
    chance = random.Random(7)
    head = (
        f"GET {EXEC}cat&input=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        f"Sec-WebSocket-Protocol: {V4}\r\n\r\n"
    ).encode()
    before = open_descriptors()
    for _ in range(25):
        reader, writer = await node.raw(head)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        with suppress(OSError):
            writer.write(chance.randbytes(chance.randrange(1, 200)))
            await writer.drain()
        writer.close()
    await until(lambda: not node.front.open)
    await until(lambda: open_descriptors() <= before)


async def test_broken_frames_of_spdy(node: Node) -> None:
    chance = random.Random(8)
    head = (
        b"POST /portForward/default/box HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
        b"X-Stream-Protocol-Version: portforward.k8s.io\r\n\r\n"
    )
    before = open_descriptors()
    tasks = len(asyncio.all_tasks())
    for turn in range(40):
        reader, writer = await node.raw(head)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        body = chance.randbytes(chance.randrange(1, 60))
        frame = struct.pack(">II", 0x8003_0001 if turn % 2 else chance.getrandbits(32), len(body)) + body
        with suppress(OSError):
            writer.write(frame if turn % 4 else frame[: len(frame) // 2])
            await writer.drain()
        writer.close()
    await until(lambda: open_descriptors() <= before and len(asyncio.all_tasks()) <= tasks)


@pytest.mark.parametrize("command", ["cat", "sh&command=-c&command=while+echo+x%3B+do+sleep+0.01%3B+done"])
async def test_a_client_that_goes_takes_its_process_along(node: Node, standin: Container, command: str) -> None:
    before, tasks = open_descriptors(), len(asyncio.all_tasks())
    async with asyncio.timeout(20):
        async with node.websocket(EXEC + command + "&input=1", V5) as socket:
            await until(lambda: _children(standin) > 0)
            assert socket._response.connection is not None
            transport = socket._response.connection.transport
            assert transport is not None
            transport.abort()
        await until(lambda: _children(standin) == 0)
        await until(lambda: not node.front.open and open_descriptors() <= before and len(asyncio.all_tasks()) <= tasks)


def _children(container: Container) -> int:
    """Processes in the stand-in beside its own first."""
    found = 0
    namespace = Path(f"/proc/{container.pid}/ns/pid").readlink()
    for path in Path("/proc").glob("[0-9]*/ns/pid"):
        with suppress(OSError):
            found += path.readlink() == namespace and path.parts[2] != str(container.pid)
    return found


async def test_an_agent_that_goes_is_told_at_once(node: Node, standin: Container) -> None:
    async with asyncio.timeout(5), node.websocket(EXEC + "sleep&command=100", V5) as socket:
        await until(lambda: node.front.open)
        node.front.cut()
        _, _, status = await finish(socket)
    assert (status["status"], status["code"]) == ("Failure", 500)
    assert "agent" in status["message"]


async def test_no_agent_is_an_answer(node: Node, short_path: Path) -> None:
    (short_path / "vsock").unlink()
    async with asyncio.timeout(5):
        code, body = await node.status(EXEC + "x", **{"Sec-WebSocket-Protocol": V4, "Upgrade": "websocket"})
    assert (code, body["reason"]) == (503, "ServiceUnavailable")


async def test_a_resize_storm(node: Node, standin: Container) -> None:
    sizes = [(1 + i % 300, 1 + i % 90) for i in range(2000)]
    target = "/exec/default/box/main?input=1&output=1&tty=1&command=sh&command=-c&command=read+x%3B+stty+size"
    async with asyncio.timeout(20), node.websocket(target, V4) as socket:
        for width, height in sizes:
            await socket.send_bytes(b"\x04" + json.dumps({"Width": width, "Height": height}).encode())
        await socket.send_bytes(b"\0go\n")
        out, _, status = await finish(socket)
    assert status["status"] == "Success"
    assert f"{sizes[-1][1]} {sizes[-1][0]}".encode() in out


async def test_many_sessions_at_once(node: Node, standin: Container) -> None:
    before, tasks = open_descriptors(), len(asyncio.all_tasks())

    async def one(number: int) -> None:
        script = f"cat%3B+exit+{number % 256}"
        async with node.websocket(f"{EXEC}sh&command=-c&command={script}&input=1", V5) as socket:
            await socket.send_bytes(b"\0%d" % number)
            await socket.send_bytes(b"\xff\0")
            out, _, status = await finish(socket)
        causes = status.get("details", {}).get("causes", [{"message": "0"}])
        assert (out, causes[0]["message"]) == (b"%d" % number, str(number % 256))

    async with asyncio.timeout(240):  # one for each exit code
        await asyncio.gather(*(one(n) for n in range(200)))
        await asyncio.gather(*(one(n) for n in range(200, 256)))
        await until(
            lambda: not node.front.open and open_descriptors() <= before + 256 and len(asyncio.all_tasks()) <= tasks
        )
    await node.session.close()
    await until(lambda: open_descriptors() <= before)


# ---- port-forward ----------------------------------------------------------------------------------------------------

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


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


@asynccontextmanager
async def forwarding(node: Node) -> AsyncIterator[SpdyConnection]:
    reader, writer = await node.raw(
        b"POST /portForward/default/box HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
        b"X-Stream-Protocol-Version: portforward.k8s.io\r\n\r\n"
    )
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
    connection = SpdyConnection(_Bytes(reader, writer), server=False)
    running = asyncio.create_task(connection.run())
    try:
        yield connection
    finally:
        await connection.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def dial(connection: SpdyConnection, port: object, request: int) -> tuple[Any, Any]:
    ids = {"port": str(port), "requestid": str(request)}
    error = await connection.open({"streamtype": "error", **ids}, fin=True)
    return await connection.open({"streamtype": "data", **ids}), error


async def _all(stream: Any) -> bytes:
    found = b""
    while data := await stream.read():
        found += data
    return found


@asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[int]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def test_a_refused_port_leaves_the_others(node: Node) -> None:
    async with asyncio.timeout(10), listening(_echo) as port, forwarding(node) as connection:
        good, error = await dial(connection, port, 1)
        for wrong, says in ((1, b"port 1 in the pod"), (0, b"not a port"), ("x" * 50, b"not a port")):
            data, told = await dial(connection, wrong, 7)
            assert says in await _all(told)
            assert await _all(data) == b""
        await good.write(b"still here")
        await good.close()
        assert (await _all(good), await _all(error)) == (b"still here", b"")


async def test_a_reset_in_the_pod_is_no_error_of_the_whole(node: Node) -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SOL_SOCKET, SO_LINGER: close sends a reset
        writer.transport.abort()

    async with asyncio.timeout(10), listening(reset) as port, forwarding(node) as connection:
        data, error = await dial(connection, port, 1)
        await data.write(b"xyz")
        assert (await _all(data), await _all(error)) == (b"", b"")
        assert not connection.over


async def test_many_connections_at_once_and_none_left(node: Node) -> None:
    before, tasks = open_descriptors(), len(asyncio.all_tasks())
    payload = os.urandom(100_000)

    async def one(connection: SpdyConnection, port: int, number: int) -> None:
        data, error = await dial(connection, port, number)
        await data.write(payload)
        await data.close()
        assert await _all(data) == payload
        assert await _all(error) == b""

    async with asyncio.timeout(30), listening(_echo) as port, forwarding(node) as connection:
        await asyncio.gather(*(one(connection, port, n) for n in range(50)))
        await dial(connection, port, 1000)  # one is open when the client goes
        await until(lambda: len(node.front.open) == 1)
    await until(lambda: open_descriptors() <= before and len(asyncio.all_tasks()) <= tasks)


async def test_the_agent_goes_amid_a_forwarding(node: Node) -> None:
    async with asyncio.timeout(5), listening(_echo) as port, forwarding(node) as connection:
        data, error = await dial(connection, port, 1)
        await data.write(b"x")
        assert await data.read() == b"x"
        node.front.cut()
        assert b"agent" in await _all(error)
