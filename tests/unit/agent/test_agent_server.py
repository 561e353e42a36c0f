"""Connections and dispatch: answers, refusals, rubbish, clients that go."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from typing import Any

import pytest
from agent_under_test import AgentUnderTest, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.agent import server as server_module
from hypervisor.agent import wire
from hypervisor.agent.server import Calls, Connection, Server
from hypervisor.agent.wire import FrameType


async def test_hello_and_several_calls_on_one_connection(agent: AgentUnderTest) -> None:
    client = await agent.connect()
    first, second = await client.ask("hello"), await client.ask("hello")
    assert first["ok"] and second["ok"]
    assert first["result"]["wire"] == wire.VERSION
    assert second["result"]["clock_ns"] >= first["result"]["clock_ns"]


@pytest.mark.parametrize(
    ("request_body", "message"),
    [
        (b"{", "payload is not JSON"),
        (b"[]", "not an object"),
        (b'{"v":2,"call":"hello"}', "protocol version 2"),
        (b'{"v":1,"call":7}', "`call` must be a string"),
        (b'{"v":1,"call":"hello","args":[]}', "`args` an object"),
        (b'{"v":1,"call":"hello","more":1}', "unknown field 'more'"),
        (b'{"v":1,"call":"fly"}', "unknown call 'fly'"),
        (b'{"v":1,"call":"hello","args":{"x":1}}', "hello: unknown field 'x'"),
    ],
)
async def test_bad_requests_are_refused_and_the_connection_goes_on(
    agent: AgentUnderTest, request_body: bytes, message: str
) -> None:
    client = await agent.connect()
    await client.send(FrameType.REQUEST, request_body)
    answer = wire.parse_json((await client.receive()).payload)
    assert answer["error"]["reason"] == "Invalid"
    assert message in answer["error"]["message"]
    assert (await client.ask("hello"))["ok"]


@pytest.mark.parametrize(
    "call",
    ["container.stop", "container.signal", "container.remove", "container.pause", "container.update", "exec", "logs"],
)
async def test_calls_about_a_container_that_is_not_there(agent: AgentUnderTest, call: str) -> None:
    args: dict[str, Any] = {"container" if call in ("exec", "logs") else "name": "ghost"}
    args |= {"exec": {"argv": ["x"]}, "container.signal": {"signal": 9}}.get(call, {})
    error = (await (await agent.connect()).ask(call, **args))["error"]
    assert error["reason"] == "NotFound"
    assert "'ghost': the pod has no such container (it has: none)" in error["message"]


@pytest.mark.parametrize(("call", "args"), [("container.remove", {"name": "x"}), ("clock", {})])
async def test_a_call_before_setup_is_a_conflict(agent: AgentUnderTest, call: str, args: dict[str, Any]) -> None:
    agent.agent.setup.done = False
    error = (await (await agent.connect()).ask(call, **args))["error"]
    assert error["reason"] == "Conflict" and "call setup first" in error["message"]


async def test_the_clock_is_told(agent: AgentUnderTest) -> None:
    client = await agent.connect()
    before = time.time_ns()
    assert before <= (await client.ask("clock", add_ns=0))["result"]["clock_ns"] <= time.time_ns()
    error = (await client.ask("clock", add_ns="noon"))["error"]
    assert error["reason"] == "Invalid" and "clock.add_ns" in error["message"]


async def test_a_ten_megabyte_command_line_is_refused(agent: AgentUnderTest) -> None:
    client = await agent.connect()
    argv = ["x" * 1_000_000] * 3
    error = (await client.ask("container.start", name="a", image_disk="img-0", argv=argv))["error"]
    assert error["reason"] == "Invalid" and "Linux takes at most 131072" in error["message"]
    client.writer.write(wire.HEADER.pack(FrameType.REQUEST, 10 << 20))
    assert await client.reader.read() == b"", "a frame beyond the limit ends the connection"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(list(FrameType)), st.binary(max_size=64)) | st.binary(max_size=64), max_size=8)
)
async def test_any_frames_leave_the_server_answering(agent: AgentUnderTest, frames: list[Any]) -> None:
    client = await agent.connect()
    for frame in frames:
        if isinstance(frame, tuple):
            kind, payload = frame
            client.writer.write(wire.HEADER.pack(kind, len(payload)) + payload)
        else:
            client.writer.write(frame)
    client.writer.write_eof()
    async with asyncio.timeout(5):
        while await client.reader.read(65536):
            pass
    client.writer.close()
    assert (await (await agent.connect()).ask("hello"))["ok"]


async def test_events_begin_with_a_snapshot_and_go_on(agent: AgentUnderTest) -> None:
    client = await agent.connect()
    assert (await client.ask("events"))["ok"]
    assert wire.parse_json((await client.receive()).payload) == {"type": "snapshot", "containers": []}
    agent.agent.engine.hub.publish("exit", {"name": "x"})
    assert wire.parse_json((await client.receive()).payload) == {"type": "exit", "container": {"name": "x"}}
    client.writer.close()
    await until(lambda: not agent.agent.engine.hub.subscribers)


async def test_a_listener_that_does_not_read_is_told_and_dropped(agent: AgentUnderTest) -> None:
    client = await agent.connect()
    assert (await client.ask("events"))["ok"]
    await client.receive()
    for _ in range(3000):
        agent.agent.engine.hub.publish("exit", {"name": "x", "message": "m" * 5000})
    _out, _err, body = await asyncio.wait_for(_skip_events(client), 10)
    assert body["error"]["reason"] == "ResourceExhausted"
    assert not agent.agent.engine.hub.subscribers


async def _skip_events(client: Any) -> tuple[bytes, bytes, dict[str, Any]]:
    while (frame := await client.receive()).type is FrameType.EVENT:
        pass
    return b"", b"", wire.parse_json(frame.payload)


class Recorder:
    """A server with calls of the test's own."""

    def __init__(self) -> None:
        self.calls = Calls()
        self.events: list[str] = []
        self.go = asyncio.Event()
        self.calls.unary["slow"] = self.slow
        self.calls.streaming["flood"] = self.flood
        self.calls.unary["broken"] = self.broken

    async def slow(self, _args: dict[str, Any]) -> dict[str, Any]:
        await self.go.wait()
        self.events.append("done")
        return {}

    async def broken(self, _args: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("a bug")

    async def flood(self, _args: dict[str, Any], connection: Connection) -> None:
        connection.accept({})
        try:
            while True:
                await connection.send_all(FrameType.STDOUT, bytes(wire.MAX_DATA))
                self.events.append("sent")
                await asyncio.sleep(0)
        finally:
            self.events.append("cleaned")


async def recorded() -> tuple[Recorder, Server, asyncio.StreamReader, asyncio.StreamWriter]:
    recorder = Recorder()
    server = Server(recorder.calls)
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    server.serve(listener)
    return recorder, server, *await asyncio.open_connection(*address)


async def test_a_unary_call_runs_to_its_end_without_its_client() -> None:
    recorder, server, _reader, writer = await recorded()
    writer.write(wire.pack_json(FrameType.REQUEST, {"v": 1, "call": "slow"}))
    await writer.drain()
    await until(lambda: any(c.task for c in server.connections))
    writer.close()
    await until(lambda: not server.connections)
    recorder.go.set()
    await until(lambda: recorder.events == ["done"])
    await server.close()


async def test_a_streaming_call_is_cancelled_with_its_client_and_never_buffers_much() -> None:
    recorder, server, reader, writer = await recorded()
    writer.write(wire.pack_json(FrameType.REQUEST, {"v": 1, "call": "flood"}))
    await reader.readexactly(5)
    sent = -1
    while sent != len(recorder.events):  # until it stands still: nobody reads
        sent = len(recorder.events)
        await asyncio.sleep(0.2)
    assert sent * wire.MAX_DATA < 16 << 20
    writer.transport.abort()
    await until(lambda: recorder.events[-1] == "cleaned")
    await server.close()


async def test_a_bug_is_an_internal_error_and_the_connection_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    _recorder, server, reader, writer = await recorded()
    for _ in range(2):
        writer.write(wire.pack_json(FrameType.REQUEST, {"v": 1, "call": "broken"}))
        kind, length = wire.parse_header(await reader.readexactly(5))
        error = wire.parse_json(await reader.readexactly(length))["error"]
        assert kind is FrameType.RESPONSE and error["reason"] == "Internal" and "a bug" in error["message"]
    assert "RuntimeError: a bug" in capfd.readouterr().err
    writer.close()
    await server.close()


async def test_too_many_connections_are_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 1)
    _recorder, server, reader, writer = await recorded()
    await until(lambda: server.connections)
    other, closing = await asyncio.open_connection(*writer.get_extra_info("peername"))
    with suppress(ConnectionResetError):
        assert await other.read() == b""
    closing.close()
    writer.close()
    await reader.read()
    await server.close()
