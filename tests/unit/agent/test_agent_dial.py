"""``dial``: into a real server on loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from hashlib import sha256

import pytest
from agent_under_test import AgentUnderTest, Client, open_descriptors, until

from hypervisor.agent import wire
from hypervisor.agent.wire import FrameType

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(handler: Handler, host: str = "127.0.0.1") -> AsyncIterator[int]:
    server = await asyncio.start_server(handler, host, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def dial(agent: AgentUnderTest, port: int) -> Client:
    agent.agent.setup.done = True
    client = await agent.connect()
    assert (await client.ask("dial", port=port))["ok"]
    return client


async def test_both_directions_and_half_close(agent: AgentUnderTest) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        question = await reader.read()  # to the client's end of file
        writer.write(b"got " + question)
        writer.write_eof()

    async with listening(answer) as port, asyncio.timeout(10):
        client = await dial(agent, port)
        await client.send(FrameType.STDIN, b"hello")
        await client.send(FrameType.STDIN)
        out, err, end = await client.finish()
    assert (out, err, end) == (b"got hello", b"", {})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_much_data_in_both_directions_at_once(agent: AgentUnderTest, host: str) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    sent, got = sha256(), sha256()
    async with listening(echo, host) as port, asyncio.timeout(20):
        client = await dial(agent, port)

        async def push() -> None:
            for number in range(64):
                block = bytes([number]) * 100_000
                sent.update(block)
                await client.send(FrameType.STDIN, block)
            await client.send(FrameType.STDIN)

        pushing = asyncio.create_task(push())
        while (frame := await client.receive()).type is FrameType.STDOUT:
            got.update(frame.payload)
        await pushing
    assert got.digest() == sent.digest()


async def test_a_port_where_nobody_listens_is_refused_by_name(agent: AgentUnderTest) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    agent.agent.setup.done = True
    answer = await (await agent.connect()).ask("dial", port=port)
    assert answer["error"] == {"reason": "Unavailable", "message": f"port {port} in the pod: Connection refused"}


@pytest.mark.parametrize("port", [0, 65536, -1, "80", None])
async def test_what_is_no_port_is_refused(agent: AgentUnderTest, port: object) -> None:
    agent.agent.setup.done = True
    answer = await (await agent.connect()).ask("dial", port=port)
    assert answer["error"]["reason"] == "Invalid"
    assert "dial.port" in answer["error"]["message"]


async def test_a_server_that_hangs_up_is_told(agent: AgentUnderTest) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.close()

    async with listening(hang_up) as port, asyncio.timeout(10):
        client = await dial(agent, port)
        assert (await client.receive()).payload == b"bye"
        assert (await client.receive()).payload == b""
        await client.send(FrameType.STDIN)
        frame = await client.receive()
        assert frame.type is FrameType.END
        assert wire.parse_json(frame.payload) == {}


async def test_a_client_that_goes_ends_the_connection(agent: AgentUnderTest) -> None:
    gone = asyncio.Event()

    async def wait_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        gone.set()
        writer.close()

    before = open_descriptors()
    async with listening(wait_end) as port, asyncio.timeout(10):
        client = await dial(agent, port)
        client.writer.close()
        await gone.wait()
    await until(lambda: open_descriptors() <= before)


async def test_what_is_sent_before_the_answer(agent: AgentUnderTest) -> None:
    """It reaches the server; refused, it is dropped, and the connection can be used for the next call."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"got " + await reader.read())
        writer.write_eof()

    def request(port: int) -> bytes:
        asked = wire.pack_json(FrameType.REQUEST, {"v": 1, "call": "dial", "args": {"port": port}})
        return asked + wire.pack(FrameType.STDIN, b"early") + wire.pack(FrameType.STDIN)

    async with listening(answer) as port, asyncio.timeout(20):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            refused = taken.getsockname()[1]
        client = await agent.connect()
        client.writer.write(request(refused))
        told = wire.parse_json((await client.receive()).payload)
        assert not told["ok"] and f"port {refused} in the pod" in told["error"]["message"]
        await client.send(FrameType.STDIN, b"late")
        assert (await client.ask("hello"))["ok"]
        client.writer.write(request(port))
        assert (await client.receive()).type is FrameType.RESPONSE
        assert (await client.finish())[0] == b"got early"
