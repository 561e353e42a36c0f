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


# ---- gRPC: answers as grpcio's own server gives them (recorded), and what no server should give ----------------------

_OPENED = (
    "000018040000000000000400400000000500400000000600004000fe0300000001000004080000000000003f0001000000040100000000"
)
_HEADERS = (
    "00004f0104000000012088400c636f6e74656e742d74797065106170706c69636174696f6e2f677270634014677270632d6163636570742d"
    "656e636f64696e67176964656e746974792c206465666c6174652c20677a6970"
)
_ENDED = "00001e010500000001400b677270632d7374617475730130000c677270632d6d65737361676500"
_SERVING = f"{_OPENED}{_HEADERS}00000700000000000100000000020801{_ENDED}"
_ILL = f"{_OPENED}{_HEADERS}00000700000000000100000000020802{_ENDED}"
_UNKNOWN = f"{_OPENED}{_HEADERS}0000050000000000010000000000{_ENDED}"
_NO_SERVICE = (
    f"{_OPENED}0000510105000000012088400c636f6e74656e742d74797065106170706c69636174696f6e2f67727063400b677270632d73746174"
    "7573023132000c677270632d6d657373616765114d6574686f64206e6f7420666f756e6421"
)
_PADDED = f"{_OPENED}{_HEADERS}00000b0008000000010300000000020801000000{_ENDED}"


@pytest.mark.usefixtures("anything")
@pytest.mark.parametrize(
    ("answer", "ok", "message"),
    [
        (_SERVING, True, ""),
        (_PADDED, True, ""),
        (_ILL, False, 'service unhealthy (responded with "NOT_SERVING")'),
        (_UNKNOWN, False, 'service unhealthy (responded with "UNKNOWN")'),
        (_NO_SERVICE, False, "no health service"),
        (_OPENED, False, "ended before an answer"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".hex(), False, "not HTTP/2"),
        (f"{_OPENED}000004030000000001{8:08x}", False, "error code 8"),
        (f"{_OPENED}00000807000000000000000001{1:08x}", False, "error code 1"),
        (f"{_OPENED}000002000900000001ff00", False, "damaged"),
        (f"{_OPENED}00000600010000000100000000ff08", False, "no health status"),
        (f"{_OPENED}0000060001000000010000000001ff", False, "cut off"),
        ("0000ff0400000000ff" + "00" * 0xFF + ("000000060100000000" * 8000), False, "more than 65536 bytes"),
    ],
)
async def test_grpc(agent: AgentUnderTest, answer: str, ok: bool, message: str) -> None:
    async with serving(bytes.fromhex(answer)) as (port, heads):
        result = (await look(agent, grpc={"host": "127.0.0.1", "port": port, "service": "x"}, timeout_s=10))["result"]
    assert result["ok"] is ok and message in result["message"]
    assert heads[0].startswith(b"PRI * HTTP/2.0\r\n")
