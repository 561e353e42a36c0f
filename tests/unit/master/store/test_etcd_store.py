"""What only the etcd store has: connections that are lost, and a server that is killed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from etcd_server import EtcdServer

from hypervisor.errors import Unavailable
from hypervisor.master.store import gateway
from hypervisor.master.store.base import Compacted, StaleRevision
from hypervisor.master.store.etcd import EtcdStore
from hypervisor.master.store.history import Keep


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """One that may be killed."""
    server = EtcdServer(tmp_path)
    server.start()
    yield server
    server.kill()


class Cutter:
    """A TCP proxy that can cut all connections, at once or after the next request has gone through to the server."""

    def __init__(self, target: str) -> None:
        self._host, self._port = target.removeprefix("http://").split(":")
        self._writers: set[asyncio.StreamWriter] = set()
        self.swallow_answers = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, to_upstream = await asyncio.open_connection(self._host, int(self._port))
        self._writers |= {writer, to_upstream}
        await asyncio.gather(self._pump(reader, to_upstream, False), self._pump(upstream, writer, True))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if answers and self.swallow_answers:
                    self.swallow_answers = False
                    self.cut()
                    break
                writer.write(data)
        writer.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()


@contextlib.asynccontextmanager
async def through_cutter(etcd: EtcdServer) -> AsyncIterator[tuple[Cutter, EtcdStore]]:
    cutter = Cutter(etcd.url)
    server = await asyncio.start_server(cutter.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = await EtcdStore.connect([f"http://127.0.0.1:{port}"])
    try:
        yield cutter, store
    finally:
        await store.close()
        cutter.cut()
        server.close()
        await server.wait_closed()


async def test_a_watch_neither_misses_nor_doubles_across_cuts(etcd: EtcdServer) -> None:
    direct = await EtcdStore.connect([etcd.url])
    start = await direct.revision()
    async with through_cutter(etcd) as (cutter, store), store.watch("/r/", after=start) as changes:

        async def write() -> None:
            for n in range(120):
                await direct.create(f"/r/{n}", b"%d" % n)
                if n % 30 == 29:
                    cutter.cut()

        told: list[int] = []
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(write())
            while len(told) < 120:
                told += [int(change.item.value) for change in await anext(changes)]
    assert told == list(range(120))
    await direct.close()


async def test_a_write_whose_answer_is_lost_is_done_once(etcd: EtcdServer) -> None:
    async with through_cutter(etcd) as (cutter, store):
        cutter.swallow_answers = True
        first = await store.create("/r/a", b"mine")
        assert (await store.get("/r/a")).modified == first  # type: ignore[union-attr]
        cutter.swallow_answers = True
        second = await store.update("/r/a", b"new", expected=first)
        assert (await store.get("/r/a")).modified == second == first + 1  # type: ignore[union-attr]
        cutter.swallow_answers = True
        with pytest.raises(StaleRevision) as stale:
            await store.delete("/r/a", expected=second)
        assert stale.value.current == 0


async def test_a_killed_server_comes_back(own_etcd: EtcdServer) -> None:
    store = await EtcdStore.connect([own_etcd.url])
    start = await store.revision()
    async with store.watch("/r/", after=start) as changes, asyncio.timeout(30):
        await store.create("/r/a", b"1")
        assert [c.item.key for c in await anext(changes)] == ["/r/a"]
        await asyncio.to_thread(own_etcd.kill)
        pending = asyncio.create_task(store.create("/r/b", b"2"))
        with pytest.raises(Unavailable):
            await store.get("/r/a")
        await asyncio.to_thread(own_etcd.start)
        await pending
        assert [c.item.key for c in await anext(changes)] == ["/r/b"]
    await store.close()


async def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, etcd: EtcdServer) -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        await EtcdStore.connect(["http://127.0.0.1:1"])
    store = await EtcdStore.connect(["http://127.0.0.1:1", etcd.url])
    await store.create("/r/a", b"1")
    await store.close()
    monkeypatch.setattr(gateway, "GIVE_UP_S", 0.1)
    monkeypatch.setattr(gateway, "PAUSE_S", 0.01)
    store = await EtcdStore.connect([etcd.url])
    store._gateway._endpoints = ["http://127.0.0.1:1"]
    with pytest.raises(Unavailable, match="unknown"):
        await store.create("/r/b", b"1")
    await store.close()


async def test_history_is_compacted(etcd: EtcdServer) -> None:
    store = await EtcdStore.connect([etcd.url], keep=Keep(age_s=1000, changes=5, check_s=0.02))
    first = await store.create("/r/0", b"")
    for n in range(1, 20):
        await store.create(f"/r/{n}", b"")
    with pytest.raises(Compacted):
        async with asyncio.timeout(10):
            while True:
                await store.range("/r/", revision=first)
                await asyncio.sleep(0.02)
    await store.close()


async def test_callers_share_a_read_of_the_revision_and_see_what_came_before(etcd: EtcdServer) -> None:
    store, other = await EtcdStore.connect([etcd.url]), await EtcdStore.connect([etcd.url])

    async def ask(n: int) -> None:
        made = await other.create(f"/r/{n}", b"")
        assert await store.revision() >= made

    await asyncio.gather(*(ask(n) for n in range(100)))
    asking = [asyncio.create_task(store.revision()) for _ in range(3)]
    await asyncio.sleep(0)
    asking[0].cancel()
    assert await asking[1] == await asking[2] == await other.revision()
    await store.close()
    with pytest.raises(Unavailable):
        await store.revision()
    await other.close()
