"""Connections to the agent that wait for the next call: the agent's server is the real one, its host side too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from agent_under_test import AgentUnderTest, until
from test_introspect_faults import Front

from hypervisor.errors import HvError, NotFound, Timeout, Unavailable
from hypervisor.introspect import kept as kept_module
from hypervisor.introspect.agent import AgentClient
from hypervisor.introspect.kept import MAX_IDLE, KeptConnections
from hypervisor.vsock.address import UnixVsock


@asynccontextmanager
async def fronted(agent: AgentUnderTest, path: Path) -> AsyncIterator[Front]:
    front = Front(agent.path)
    server = await asyncio.start_unix_server(front.serve, path)
    try:
        yield front
    finally:
        server.close()
        front.cut()
        path.unlink()  # noqa: ASYNC240
        await until(lambda: not front.open)


async def test_one_connection_serves_calls_one_after_the_other(agent: AgentUnderTest, short_path: Path) -> None:
    path, kept = short_path / "vsock", KeptConnections()
    client = AgentClient(UnixVsock(path), kept)
    async with fronted(agent, path) as front:
        for _ in range(5):
            await client.hello()
            await until(lambda: len(agent.server.connections) == 1)
        assert (len(kept), len(front.open)) == (1, 1)
        kept.close()
        await until(lambda: not agent.server.connections)
        await client.hello()
        await until(lambda: not agent.server.connections)
        assert len(kept) == 0


async def test_calls_at_once_have_connections_of_their_own(agent: AgentUnderTest, short_path: Path) -> None:
    path, kept = short_path / "vsock", KeptConnections()
    client = AgentClient(UnixVsock(path), kept)
    async with fronted(agent, path):
        answers = await asyncio.gather(*(client.hello() for _ in range(MAX_IDLE + 20)))
        assert all(answer["wire"] == 1 for answer in answers)
        assert len(kept) == MAX_IDLE
        await until(lambda: len(agent.server.connections) == MAX_IDLE)
        kept.close()


async def test_an_idle_one_ends_by_itself(
    agent: AgentUnderTest, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_module, "IDLE_S", 0.01)
    path, kept = short_path / "vsock", KeptConnections()
    async with fronted(agent, path) as front:
        await AgentClient(UnixVsock(path), kept).hello()
        await until(lambda: not kept and not front.open and not agent.server.connections)


async def test_a_device_process_is_replaced(agent: AgentUnderTest, short_path: Path) -> None:
    """What the old one left is not used; the next call reaches the new one at once."""
    path, kept = short_path / "vsock", KeptConnections()
    client = AgentClient(UnixVsock(path), kept)
    async with fronted(agent, path):
        await client.hello()
    with pytest.raises(Unavailable):
        await client.hello()
    async with fronted(agent, path) as front:
        await client.hello()
        assert (len(kept), len(front.open)) == (1, 1)
        kept.close()


async def test_a_refused_call_or_one_that_is_given_up_keeps_nothing(agent: AgentUnderTest, short_path: Path) -> None:
    path, kept = short_path / "vsock", KeptConnections()
    client = AgentClient(UnixVsock(path), kept)
    async with fronted(agent, path):
        for call, args, error in (
            ("container.remove", {"name": "nonesuch"}, NotFound),
            ("nonesuch", {}, HvError),
        ):
            with pytest.raises(error):
                await client.call(call, args)
        assert len(kept) == 0
        agent.server.calls.unary["hello"] = lambda _: asyncio.sleep(5, {})
        with pytest.raises(Timeout):
            await client.hello(timeout=0.05)
        assert len(kept) == 0
        await until(lambda: not agent.server.connections)
