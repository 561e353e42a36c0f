"""Attach and follow: replay and live output without a gap, back-pressure, half-close, previous instances."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from agent_under_test import AgentUnderTest, Client, open_descriptors, until

from hypervisor.agent import logs
from hypervisor.agent.container import Container
from hypervisor.agent.logs import LogWriter
from hypervisor.agent.spec import User, parse_spec
from hypervisor.agent.streams import PipeWriter
from hypervisor.agent.wire import FrameType


class Piped:
    """A container whose first process is this test."""

    def __init__(self, container: Container) -> None:
        self.container = container
        out, self.stdout = os.pipe()
        err, self.stderr = os.pipe()
        self.stdin, stdin = os.pipe()
        container.streams.add_output(out, b"stdout")
        container.streams.add_output(err, b"stderr")
        container.streams.stdin = PipeWriter(stdin)

    async def end(self, code: int = 0) -> None:
        os.close(self.stdout)
        os.close(self.stderr)
        await self.container.streams.drained()
        self.container.now_exited(code, None)


@pytest.fixture
async def piped(agent: AgentUnderTest, tmp_path: Path) -> Any:
    spec = {"name": "main", "image_disk": "img-0", "argv": ["x"], "stdin": True, "stdin_once": True}
    container = Container(parse_spec(spec), 1)
    container.log_directory = str(tmp_path)
    container.streams.log = LogWriter(str(tmp_path), 1, max_bytes=100_000, max_files=3)
    container.now_running(os.getpid(), os.pidfd_open(os.getpid()), User(0, 0))
    agent.agent.engine.containers["main"] = container
    made = Piped(container)
    yield made
    if container.alive:
        await made.end()
    os.close(made.stdin)


async def attach(agent: AgentUnderTest, **args: Any) -> Client:
    client = await agent.connect()
    wanted = {"stdin": False, "stdout": True, "stderr": True, "replay": True} | args
    answer = await client.ask("attach", container="main", **wanted)
    assert answer["ok"], answer
    return client


async def logged(piped: Piped, text: bytes) -> None:
    await until(lambda: text in b"".join(logs.read_log(piped.container.log_directory, 1, logs.Selection())))


async def test_replay_then_live_without_a_gap(agent: AgentUnderTest, piped: Piped) -> None:
    os.write(piped.stdout, b"before\nprompt> ")
    os.write(piped.stderr, b"oops")
    await logged(piped, b"prompt> ")
    await logged(piped, b"oops")
    client = await attach(agent)
    os.write(piped.stdout, b"after\n")
    await logged(piped, b"after\n")
    await piped.end(3)
    out, err, body = await client.finish()
    assert (out, err) == (b"before\nprompt> after\n", b"oops")
    assert body == {"exit_code": 3, "signal": None, "error": None}


async def test_no_gap_under_a_flood(agent: AgentUnderTest, piped: Piped) -> None:
    piped.container.streams.log = LogWriter(piped.container.log_directory, 1, max_bytes=1 << 30, max_files=1)
    wanted = b"".join(b"%d\n" % i for i in range(400_000))
    flood = asyncio.create_task(asyncio.to_thread(_write_all, piped.stdout, wanted))
    clients = []
    for _ in range(4):
        await asyncio.sleep(0.02)
        clients.append(await attach(agent))
    finishing = [asyncio.create_task(c.finish()) for c in clients]
    await flood
    await piped.end()
    for finished in await asyncio.gather(*finishing):
        assert finished[0] == wanted


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


async def test_a_stream_that_is_not_wanted(agent: AgentUnderTest, piped: Piped) -> None:
    client = await attach(agent, stderr=False)
    os.write(piped.stdout, b"o")
    os.write(piped.stderr, b"e")
    await logged(piped, b"e")
    await piped.end()
    assert (await client.finish())[:2] == (b"o", b"")


async def test_a_client_that_does_not_read_stops_the_output_and_one_that_goes_frees_it(
    agent: AgentUnderTest, piped: Piped
) -> None:
    client = await attach(agent, replay=False)
    data = bytes(16 << 20)
    flood = asyncio.create_task(asyncio.to_thread(_write_all, piped.stdout, data))
    _done, pending = await asyncio.wait({flood}, timeout=1)
    assert pending, "somebody buffered 16 MiB"
    client.writer.transport.abort()
    await asyncio.wait_for(flood, 20)


async def test_stdin_closes_with_its_first_client(agent: AgentUnderTest, piped: Piped) -> None:
    client = await attach(agent, stdin=True)
    await client.send(FrameType.STDIN, b"hello")
    assert await asyncio.to_thread(os.read, piped.stdin, 100) == b"hello"
    await client.send(FrameType.STDIN)
    assert await asyncio.to_thread(os.read, piped.stdin, 100) == b""


async def test_attach_to_one_that_has_ended(agent: AgentUnderTest, piped: Piped) -> None:
    os.write(piped.stdout, b"last words\n")
    await logged(piped, b"last words\n")
    await piped.end(9)
    out, _, body = await (await attach(agent)).finish()
    assert out == b"last words\n" and body["exit_code"] == 9


async def read_logs(agent: AgentUnderTest, **args: Any) -> Client:
    client = await agent.connect()
    assert (await client.ask("logs", container="main", **args))["ok"]
    return client


async def test_follow_through_rotations_to_the_end(agent: AgentUnderTest, piped: Piped) -> None:
    client = await read_logs(agent, follow=True)
    finishing = asyncio.create_task(client.finish())
    for i in range(300):
        os.write(piped.stdout, b"%d " % i + b"x" * 1000 + b"\n")
        await asyncio.sleep(0.002)
    await piped.end()
    out, _, _ = await asyncio.wait_for(finishing, 20)
    assert piped.container.streams.log.generation >= 2
    assert [int(line.split()[0]) for line in out.splitlines()] == list(range(300))


async def test_tail_then_follow(agent: AgentUnderTest, piped: Piped) -> None:
    os.write(piped.stdout, b"a\nb\nc\n")
    await logged(piped, b"c\n")
    client = await read_logs(agent, follow=True, tail=1)
    os.write(piped.stdout, b"d\n")
    await logged(piped, b"d\n")
    await piped.end()
    assert (await client.finish())[0] == b"c\nd\n"


async def test_follow_of_a_log_that_has_not_begun(agent: AgentUnderTest, piped: Piped) -> None:
    client = await read_logs(agent, follow=True)
    os.write(piped.stdout, b"first\n")
    await logged(piped, b"first\n")
    await piped.end()
    assert (await client.finish())[0] == b"first\n"


async def test_previous(agent: AgentUnderTest, piped: Piped, tmp_path: Path) -> None:
    answer = await (await agent.connect()).ask("logs", container="main", previous=True)
    assert answer["error"]["reason"] == "NotFound"
    LogWriter(str(tmp_path), 0, max_bytes=1000, max_files=1).write(b"stdout", b"old\n")
    assert (await (await read_logs(agent, previous=True)).finish())[0] == b"old\n"


async def test_a_follower_that_goes_leaves_no_descriptor(agent: AgentUnderTest, piped: Piped) -> None:
    os.write(piped.stdout, b"x\n")
    await logged(piped, b"x\n")
    before = open_descriptors()
    clients = [await read_logs(agent, follow=True) for _ in range(5)]
    for client in clients:
        await client.receive()
        client.writer.close()
        await client.writer.wait_closed()
    await until(lambda: open_descriptors() <= before)
