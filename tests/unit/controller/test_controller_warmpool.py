"""The warm pool's states, and spare VMs in the ledger, with made-up clones."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from hypervisor.controller import warmvm
from hypervisor.controller.backoff import BackoffPolicy
from hypervisor.controller.sizing import MIB, PROCESS_OVERHEAD, MemoryLedger, VmSize
from hypervisor.controller.warmpool import Kind, WarmPool
from hypervisor.errors import HvError, ResourceExhausted, Unavailable

GIB = 1024 * MIB
SIZE = VmSize(1, GIB - PROCESS_OVERHEAD, GIB)  # is promised 1 GiB
KIND = Kind(1, SIZE.memory_bytes, GIB, "user", "image-1")


class Clone:
    """A clone that does nothing."""

    def __init__(self, uid: str, kind: Kind, ended: list[str]) -> None:
        self.uid = uid
        self.kind = kind
        self.used = 100 * MIB
        self._ended = ended
        self.death: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def memory_used(self) -> int:
        return self.used

    async def wait_dead(self) -> str:
        return await asyncio.shield(self.death)

    async def end(self) -> None:
        self._ended.append(self.uid)


class Clones:
    """Where they come from."""

    def __init__(self) -> None:
        self.kind = KIND
        self.size = SIZE
        self.made: list[Clone] = []
        self.ended: list[str] = []
        self.failures: list[HvError] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.starting = 0
        self.most = 0
        self.began = asyncio.Event()

    def new_uid(self) -> str:
        return f"w{len(self.made)}-{self.starting}"

    async def current(self) -> Kind:
        return self.kind

    async def start(self, uid: str) -> Clone:
        self.starting += 1
        self.most = max(self.most, self.starting)
        self.began.set()
        try:
            await self.hold.wait()
            if self.failures:
                raise self.failures.pop(0)
        finally:
            self.starting -= 1
        self.made.append(Clone(uid, self.kind, self.ended))
        return self.made[-1]


class Bench:
    def __init__(self) -> None:
        self.free = 10 * GIB
        self.clones = Clones()
        self.ledger = MemoryLedger(available=lambda: self.free, reserve=0)
        self.tasks: list[asyncio.Task[None]] = []

    def pool(self, wanted: int) -> WarmPool[Clone]:
        backoff = BackoffPolicy(0.02, 0.05)
        pool = WarmPool[Clone](wanted, self.clones, self.ledger, backoff, quiet_s=0.05, look_s=0.02)
        self.tasks.append(asyncio.create_task(pool.run()))
        return pool


@pytest.fixture
async def it() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    for task in bench.tasks:
        task.cancel()
    await asyncio.gather(*bench.tasks, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def ready(pool: WarmPool[Clone]) -> int:
    return pool.usage()["ready"]


async def test_is_filled_one_by_one_and_refilled(it: Bench) -> None:
    pool = it.pool(3)
    await until(lambda: ready(pool) == 3)
    taken = pool.take(KIND)
    assert taken is it.clones.made[0] and ready(pool) == 2
    await until(lambda: ready(pool) == 3)
    assert it.clones.most == 1 and not it.clones.ended
    assert pool.usage()["taken"] == 1 and pool.usage()["memory_bytes"] == 300 * MIB


@pytest.mark.parametrize(
    "other", [{"vcpus": 2}, {"memory_bytes": 1}, {"disk_bytes": 1}, {"network": "none"}, {"guest": "image-2"}]
)
async def test_what_does_not_fit_is_not_taken(it: Bench, other: dict[str, object]) -> None:
    pool = it.pool(1)
    await until(lambda: ready(pool) == 1)
    assert pool.take(dataclasses.replace(KIND, **other)) is None  # type: ignore[arg-type]
    assert ready(pool) == 1


async def test_an_empty_pool_has_nothing_and_counts_it(it: Bench) -> None:
    it.clones.hold.clear()
    pool = it.pool(1)
    assert pool.take(KIND) is None
    assert pool.usage()["missed"] == 1


async def test_no_clone_is_started_while_pods_are(it: Bench) -> None:
    pool = it.pool(1)
    await until(lambda: ready(pool) == 1)
    with pool.starting():
        assert pool.take(KIND)
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert len(it.clones.made) == 1
    await until(lambda: ready(pool) == 1)


async def test_a_clone_that_dies_is_removed_and_replaced(it: Bench) -> None:
    pool = it.pool(1)
    await until(lambda: ready(pool) == 1)
    it.clones.made[0].death.set_result("killed")
    await until(lambda: len(it.clones.made) == 2 and ready(pool) == 1)
    assert it.clones.ended == [it.clones.made[0].uid]


async def test_a_stale_clone_is_dropped(it: Bench) -> None:
    pool = it.pool(2)
    await until(lambda: ready(pool) == 2)
    it.clones.kind = dataclasses.replace(KIND, guest="image-2")
    await until(lambda: len(it.clones.ended) == 2 and ready(pool) == 2)
    assert pool.take(KIND) is None
    assert pool.take(it.clones.kind) is not None


async def test_failures_are_tried_again(it: Bench) -> None:
    it.clones.failures = [Unavailable("no"), Unavailable("no")]
    pool = it.pool(1)
    await until(lambda: ready(pool) == 1)
    it.ledger.promise("pod", VmSize(1, 9 * GIB - PROCESS_OVERHEAD, 0))  # failed starts hold nothing


async def test_memory_pressure_gives_clones_up_before_a_pod_is_refused(it: Bench) -> None:
    it.free = 4 * GIB
    pool = it.pool(4)
    await until(lambda: ready(pool) == 4 or len(it.clones.made) == 4)
    it.ledger.promise("pod", VmSize(1, 2 * GIB, 0))
    await until(lambda: len(it.clones.ended) >= 2)
    assert pool.usage()["given_up"] >= 2
    with pytest.raises(ResourceExhausted):
        it.ledger.promise("too-big", VmSize(1, 3 * GIB, 0))


async def test_a_clone_given_up_while_it_starts_never_gets_ready(it: Bench) -> None:
    it.free = GIB
    it.clones.hold.clear()
    pool = it.pool(1)
    await it.clones.began.wait()
    it.ledger.promise("pod", SIZE)
    it.clones.hold.set()
    await until(lambda: len(it.clones.ended) == 1)
    assert ready(pool) == 0


async def test_the_pool_waits_for_memory(it: Bench) -> None:
    it.free = GIB - 1
    pool = it.pool(1)
    for _ in range(10):
        await asyncio.sleep(0.005)
    assert not it.clones.made
    it.free = GIB
    await until(lambda: ready(pool) == 1)


async def test_the_host_s_own_shortage_is_relieved(it: Bench) -> None:
    pool = it.pool(1)
    await until(lambda: ready(pool) == 1)
    it.free = 100 * MIB
    await until(lambda: len(it.clones.ended) == 1)
    assert ready(pool) == 0


async def test_close_ends_all(it: Bench) -> None:
    pool = it.pool(2)
    await until(lambda: ready(pool) == 2)
    it.tasks[0].cancel()
    await asyncio.gather(*it.tasks, return_exceptions=True)
    await pool.close()
    assert sorted(it.clones.ended) == sorted(c.uid for c in it.clones.made)


def test_ledger_counts_the_memory_of_a_leaving_spare_as_free() -> None:
    gone: list[str] = []
    used = 0
    ledger = MemoryLedger(available=lambda: GIB - used, reserve=0)
    ledger.promise_spare("spare", SIZE, lambda: gone.append("spare"))
    used = GIB // 2
    ledger.measure("spare", lambda: used)
    ledger.promise("pod", SIZE)
    assert gone == ["spare"]
    ledger.release("spare")
    used = 0
    with pytest.raises(ResourceExhausted):
        ledger.promise("another", SIZE)


def test_a_pods_folder_leads_to_the_vms(tmp_path: Path) -> None:
    own, pods = tmp_path / "warm/abc", tmp_path / "pods/1/vm"
    own.mkdir(parents=True)
    pods.parent.mkdir(parents=True)
    assert warmvm.linked(pods) == pods
    warmvm.link(pods, own)
    assert warmvm.linked(pods) == own and pods.exists()
    with pytest.raises(HvError):
        warmvm.link(pods, own)
    warmvm.unlink(pods)
    warmvm.unlink(pods)
    assert warmvm.linked(pods) == pods and own.exists()
