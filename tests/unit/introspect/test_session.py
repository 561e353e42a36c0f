"""A session between a client's channels and the agent's frames, the agent's side scripted over a socket pair."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest

from hypervisor.agent import wire
from hypervisor.agent.wire import FrameType
from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound, ProtocolError, Unavailable
from hypervisor.introspect import session
from hypervisor.introspect.agent import AgentStream, Ending
from hypervisor.introspect.session import ClientEvent, Resize, Stdin, StdinEnd


class Client:
    """A client in memory. `gate` is closed while it does not read."""

    def __init__(self, *events: ClientEvent, stays: bool = True) -> None:
        self._events = events
        self._stays = stays
        self.gate = asyncio.Event()
        self.gate.set()
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.ending: Ending | None = None

    async def events(self) -> AsyncGenerator[ClientEvent, None]:
        for event in self._events:
            yield event
        if self._stays:
            await asyncio.Event().wait()

    async def wait_gone(self) -> None:
        await asyncio.Event().wait()

    async def send_stdout(self, data: bytes) -> None:
        await self.gate.wait()
        self.stdout += data

    async def send_stderr(self, data: bytes) -> None:
        self.stderr += data

    async def send_ending(self, ending: Ending) -> None:
        self.ending = ending


class Peer:
    """The agent's end of the connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def expect(self, kind: FrameType) -> bytes:
        got, length = wire.parse_header(await self.reader.readexactly(wire.HEADER.size))
        assert got is kind
        return await self.reader.readexactly(length)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


@asynccontextmanager
async def connection() -> AsyncIterator[tuple[AgentStream, Peer]]:
    here, there = socket.socketpair()
    stream = AgentStream(*await asyncio.open_connection(sock=here))
    peer = Peer(*await asyncio.open_connection(sock=there))
    try:
        yield stream, peer
    finally:
        await stream.close()
        peer.writer.close()


END_7 = wire.pack_json(FrameType.END, {"exit_code": 7, "signal": None, "error": None})


async def test_streams_stay_apart_and_the_exit_code_arrives() -> None:
    async with connection() as (stream, peer):
        client = Client()
        await peer.send(wire.pack(FrameType.STDOUT, b"out") + wire.pack(FrameType.STDERR, b"err") + END_7)
        ending = await session.run(client, stream)
    assert (bytes(client.stdout), bytes(client.stderr)) == (b"out", b"err")
    assert ending == client.ending == Ending(7)


async def test_stdin_its_end_and_sizes_go_up_in_order() -> None:
    data = bytes(range(256)) * 4096  # longer than one frame
    async with connection() as (stream, peer):
        running = asyncio.create_task(session.run(Client(Resize(100, 40), Stdin(data), StdinEnd()), stream))
        assert wire.parse_resize(await peer.expect(FrameType.RESIZE)) == (100, 40)
        received = b""
        while piece := await peer.expect(FrameType.STDIN):
            received += piece
        assert received == data
        await peer.send(END_7)
        assert await running == Ending(7)


async def test_a_client_that_goes_away_ends_the_session() -> None:
    async with connection() as (stream, _peer):
        client = Client(stays=False)
        assert await asyncio.wait_for(session.run(client, stream), 5) is None
        assert client.ending is None


async def test_a_broken_agent_connection_is_told_to_the_client() -> None:
    async with connection() as (stream, peer):
        client = Client()
        peer.writer.close()
        await asyncio.wait_for(session.run(client, stream), 5)
    assert client.ending is not None
    assert isinstance(client.ending.error, Unavailable)


async def test_a_broken_frame_is_told_to_the_client() -> None:
    async with connection() as (stream, peer):
        client = Client()
        await peer.send(b"\xee\x00\x00\x00\x01x")
        await asyncio.wait_for(session.run(client, stream), 5)
    assert client.ending is not None
    assert isinstance(client.ending.error, ProtocolError)


async def test_a_slow_client_stops_the_agent() -> None:
    frame = wire.pack(FrameType.STDOUT, b"x" * wire.MAX_DATA)
    async with connection() as (stream, peer):
        client = Client()
        client.gate.clear()
        running = asyncio.create_task(session.run(client, stream))
        sent = 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                for _ in range(1000):
                    await peer.send(frame)
                    sent += len(frame)
        assert sent < 8 * 1024 * 1024  # what sockets and one frame a side hold, not the 250 MB on offer
        client.gate.set()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_cancelling_a_session_leaves_no_task() -> None:
    async with connection() as (stream, _peer):
        before = asyncio.all_tasks()
        running = asyncio.create_task(session.run(Client(), stream))
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert asyncio.all_tasks() == before


@pytest.mark.parametrize(
    ("reason", "kind"),
    [("NotFound", NotFound), ("Conflict", Conflict), ("Invalid", InvalidInput), ("Whatever", HvError)],
)
async def test_refusals_become_errors(reason: str, kind: type[HvError]) -> None:
    async with connection() as (stream, peer):
        body = {"ok": False, "error": {"reason": reason, "message": "no"}}
        await peer.send(wire.pack_json(FrameType.RESPONSE, body))
        with pytest.raises(kind) as caught:
            await stream.request("exec", {})
        assert type(caught.value) is kind
        request = wire.parse_json(await peer.expect(FrameType.REQUEST))
        assert (request["v"], request["call"]) == (wire.VERSION, "exec")


async def test_a_request_that_is_too_long_is_refused_here() -> None:
    async with connection() as (stream, _peer):
        with pytest.raises(InvalidInput, match="too long"):
            await stream.request("exec", {"argv": ["x" * wire.MAX_JSON]})
