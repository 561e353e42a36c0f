"""``probe``: one look into a container, by exec (the real hv-exec), HTTP and TCP (real servers on loopback)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from agent_under_test import AgentUnderTest, open_descriptors

from hypervisor.agent.container import Container
from hypervisor.agent.httpget import MAX_HEAD

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def look(agent: AgentUnderTest, **args: Any) -> dict[str, Any]:
    client = await agent.connect()
    async with asyncio.timeout(20):
        return await client.ask("probe", container="main", **args)


@asynccontextmanager
async def serving(answer: bytes, *, close: bool = True) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that gives `answer` to whoever has sent a head; its port, and the heads."""
    heads: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        if close:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], heads
    finally:
        server.close()


@pytest.fixture
def anything(agent: AgentUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that runs, for handlers that do not enter it."""
    monkeypatch.setattr(agent.agent.engine, "running", lambda _name: None)


@pytest.mark.root
async def test_exec(agent: AgentUnderTest, standin: Container) -> None:
    before = open_descriptors()
    good = await look(agent, exec={"argv": ["sh", "-c", "echo fine"]})
    assert good["result"] == {"ok": True, "message": "fine\n", "exit_code": 0}
    bad = (await look(agent, exec={"argv": ["sh", "-c", "echo out; echo err >&2; exit 3"]}))["result"]
    assert (bad["ok"], sorted(bad["message"].split())) == (False, ["err", "out"])
    missing = (await look(agent, exec={"argv": ["nosuch"]}))["result"]
    assert not missing["ok"]
    assert "executable not found" in missing["message"]
    slow = (await look(agent, exec={"argv": ["sleep", "100"]}, timeout_s=0.2))["result"]
    assert slow == {"ok": False, "message": "command timed out after 0.2 s"}
    much = (await look(agent, exec={"argv": ["head", "-c", "1000000", "/dev/zero"]}, timeout_s=10))["result"]
    assert (much["ok"], len(much["message"])) == (True, 10240)
    assert open_descriptors() <= before + 10, "both ends of a connection a look, nothing else"


@pytest.mark.usefixtures("anything")
@pytest.mark.parametrize(
    ("answer", "ok", "message"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", True, ""),
        (b"HTTP/1.0 399 Odd\r\n\r\n", True, ""),
        (b"HTTP/1.1 503 Busy\r\n\r\nlater", False, "HTTP probe failed with statuscode: 503"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", False, "malformed HTTP response"),
        (b"", False, "ended before an answer"),
        (b"HTTP/1.1 200 OK\r\nX: ", False, "header is cut off"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * (MAX_HEAD + 10), False, "more than 65536 bytes"),
    ],
)
async def test_http(agent: AgentUnderTest, answer: bytes, ok: bool, message: str) -> None:
    async with serving(answer) as (port, _):
        result = (await look(agent, http={"port": port}))["result"]
    assert result["ok"] is ok
    assert message in result["message"]


@pytest.mark.usefixtures("anything")
async def test_http_request_and_redirect(agent: AgentUnderTest) -> None:
    async with serving(b"HTTP/1.1 302 Found\r\nLocation: /other\r\n\r\n") as (port, heads):
        headers = [{"name": "host", "value": "example.org"}, {"name": "X-Key", "value": "v"}]
        result = (await look(agent, http={"port": port, "path": "/a?b=c", "headers": headers}))["result"]
    assert (result["status"], result["location"], result["ok"]) == (302, "/other", True)
    lines = heads[0].decode().split("\r\n")
    assert lines[0] == "GET /a?b=c HTTP/1.1"
    assert "host: example.org" in lines
    assert "X-Key: v" in lines
    assert [line for line in lines if line.lower().startswith("host:")] == ["host: example.org"]
    assert any(line.startswith("User-Agent: kube-probe/") for line in lines)


@pytest.mark.usefixtures("anything")
async def test_server_that_does_not_answer(agent: AgentUnderTest) -> None:
    async with serving(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nfirst", close=False) as (port, _):
        result = (await look(agent, http={"port": port}, timeout_s=0.2))["result"]
    assert not result["ok"]
    assert "no answer within 0.2 s" in result["message"]


@pytest.mark.usefixtures("anything")
async def test_tcp(agent: AgentUnderTest) -> None:
    async with serving(b"") as (port, _):
        assert (await look(agent, tcp={"port": port}))["result"] == {"ok": True, "message": ""}
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        refused = (await look(agent, tcp={"port": port}))["result"]
    assert refused == {"ok": False, "message": f"dial tcp 127.0.0.1:{port}: connection refused"}


@pytest.mark.root
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "give one of"),
        ({"tcp": {"port": 1}, "http": {"port": 1}}, "give one of"),
        ({"tcp": {"port": 70000}}, "probe.tcp.port"),
        ({"http": {"port": 1, "path": "/a b"}}, "blanks"),
        ({"http": {"port": 1, "headers": [{"name": "a\r\nb", "value": ""}]}}, "no header's name"),
        ({"exec": {"argv": []}}, "must name a program"),
        ({"tcp": {"port": 1, "x": 1}}, "unknown field"),
    ],
)
async def test_bad_arguments(agent: AgentUnderTest, standin: Container, args: dict[str, Any], message: str) -> None:
    answer = await look(agent, **args)
    assert answer["error"]["reason"] == "Invalid"
    assert message in answer["error"]["message"]
