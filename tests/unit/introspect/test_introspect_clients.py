"""Clients that are slow, silent, or gone without a word: the first two are served, the last is noticed."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from agent_under_test import until
from test_introspect_faults import Node, node

from hypervisor.agent.container import Container
from hypervisor.introspect import run
from hypervisor.kube import liveness

__all__ = ["node"]

WEBSOCKET = (
    "GET {target} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
)
SPDY = (
    "POST {target} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
    "X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n"
)
DEAF = "/exec/default/box/main?input=1&output=1&command=sleep&command=1000"


def script(text: str) -> str:
    from urllib.parse import quote

    return f"/exec/default/box/main?input=1&output=1&command=sh&command=-c&command={quote(text)}"


@asynccontextmanager
async def upgraded(node: Node, head: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await node.raw(head.encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
    try:
        yield reader, writer
    finally:
        writer.close()


def frame(payload: bytes, code: int = 2) -> bytes:
    """A client's WebSocket frame, masked with zeros."""
    assert len(payload) < 65536
    return struct.pack(">BBH", 0x80 | code, 0xFE, len(payload)) + bytes(4) + payload


async def answers(reader: asyncio.StreamReader) -> AsyncIterator[tuple[int, bytes]]:
    """What the server sends, by opcode, up to its close."""
    code = 0
    while code != 8:
        first, length = await reader.readexactly(2)
        if length == 126:
            length = int.from_bytes(await reader.readexactly(2), "big")
        code = first & 15
        yield code, await reader.readexactly(length)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PERIOD_S", 0.05)


async def test_a_client_that_answers_no_ping_is_served_to_the_end(node: Node, standin: Container, hasty: None) -> None:
    """It may have stopped reading, or we from it, for as long as it likes."""
    pings, status = 0, b""
    async with (
        asyncio.timeout(20),
        upgraded(node, WEBSOCKET.format(target=script("read x; exit 5"))) as (reader, writer),
    ):
        async for code, payload in answers(reader):
            pings += code == 9
            if pings == 10:
                writer.write(frame(b"\0\n"))
            if code == 2 and payload[0] == 3:
                status = payload[1:]
    assert pings >= 10
    assert json.loads(status)["details"]["causes"][0]["message"] == "5"


async def test_a_status_is_not_lost_on_a_client_that_still_types(node: Node, standin: Container) -> None:
    """The process ends with input unread: a connection that were closed now would be reset, and the status lost."""
    typed = frame(b"\0" + bytes(60_000))
    for _ in range(5):
        status = b""
        async with asyncio.timeout(20), upgraded(node, WEBSOCKET.format(target=script("exit 6"))) as (reader, writer):
            for _ in range(100):
                writer.write(typed)
            await asyncio.sleep(0.3)  # for the server's close, and a reset if it made one
            async for code, payload in answers(reader):
                if code == 2 and payload[0] == 3:
                    status = payload[1:]
            writer.write(frame(struct.pack(">H", 1000), 8))
            assert await reader.read() == b""
        assert json.loads(status)["details"]["causes"][0]["message"] == "6"


@pytest.mark.parametrize("head", [WEBSOCKET, SPDY])
async def test_gone_while_nothing_is_read_from_it(node: Node, standin: Container, hasty: None, head: str) -> None:
    """The process reads nothing, so neither do we: the client's end lies behind what it typed."""
    async with asyncio.timeout(20):
        async with upgraded(node, head.format(target=DEAF)) as (_, writer):
            await _type_until_stuck(writer, spdy=head is SPDY)
            assert sessions() >= {"session-up", "session-down", "pings"}
            writer.transport.abort()
        await until(lambda: not sessions())


def sessions() -> set[str]:
    """The tasks that serve clients."""
    return {task.get_name() for task in asyncio.all_tasks()} & {"session-up", "session-down", "pings", "spdy"}


async def _type_until_stuck(writer: asyncio.StreamWriter, *, spdy: bool) -> None:
    from hypervisor.introspect.spdy.frames import Data, FrameWriter, SynStream

    piece = frame(b"\0" + bytes(60_000))
    if spdy:
        frames = FrameWriter()
        for number, name in enumerate(("error", "stdin", "stdout")):
            writer.write(frames.render(SynStream(2 * number + 1, {"streamtype": name})))
        piece = frames.render(Data(3, bytes(60_000)))
    try:
        while True:
            writer.write(piece)
            async with asyncio.timeout(1):
                await writer.drain()
    except TimeoutError:
        pass


async def test_a_command_without_a_stream(node: Node, standin: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kubelet's ``POST /run``."""

    async def post(command: str) -> tuple[int, str]:
        url = f"http://127.0.0.1:{node.port}/run/default/box/main"
        async with node.session.post(url, params={"cmd": command}) as answer:
            return answer.status, await answer.text()

    assert await post("echo two  words") == (200, "two words\n")
    code, text = await post("ls /nonesuch")
    assert code == 500 and "exit code 2" in text and "/nonesuch" in text
    assert (await post("nonesuch"))[0] == 404
    assert (await post(""))[0] == 422
    assert (await post("cat /dev/zero"))[0] == 507
    monkeypatch.setattr(run, "TIMEOUT_S", 0.2)
    assert (await post("sleep 1000"))[0] == 504
    await until(lambda: not node.front.open)
