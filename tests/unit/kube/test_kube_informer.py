"""Informers and work queues against a server that breaks off, forgets and pages."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from kube_fake_server import FakeServer

from hypervisor.kube.http import HttpApiClient
from hypervisor.kube.informer import Handler, Informer, WorkQueue
from hypervisor.kube.kubeconfig import KubeConfig
from hypervisor.kube.meta import get, key_of
from hypervisor.kube.resources import PODS

PATH = "/api/v1/pods"


def pod(name: str, **labels: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "ns", "labels": labels}}


async def until(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not met():  # noqa: ASYNC110 -- the condition is another party's
            await asyncio.sleep(0.005)


@asynccontextmanager
async def following(server: FakeServer, **options: Any) -> AsyncIterator[Informer]:
    async with server.serve() as url, HttpApiClient(KubeConfig(url)) as client:
        informer = Informer(client, PODS, backoff_s=(0.005, 0.05), **options)
        task = asyncio.create_task(informer.run())
        try:
            async with asyncio.timeout(10):
                await informer.wait_synced()
            yield informer
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class Mirror:
    """Builds the state again from what a handler hears, and checks that each change is possible."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.wrong: list[str] = []
        self.handler = Handler(self._added, self._updated, self._deleted)

    def _expect(self, met: bool, what: str) -> None:
        if not met:
            self.wrong.append(what)

    def _added(self, obj: dict[str, Any]) -> None:
        self._expect(key_of(obj) not in self.objects, "added twice")
        self.objects[key_of(obj)] = obj

    def _updated(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        self._expect(self.objects.get(key_of(new)) is old, "updated from another state")
        self._expect(int(old["metadata"]["resourceVersion"]) < int(new["metadata"]["resourceVersion"]), "went back")
        self._expect(old["metadata"]["uid"] == new["metadata"]["uid"], "another object")
        self.objects[key_of(new)] = new

    def _deleted(self, obj: dict[str, Any]) -> None:
        self._expect(key_of(obj) in self.objects, "deleted twice")
        self.objects.pop(key_of(obj), None)


def act(server: FakeServer, rng: random.Random) -> None:
    """One random change, or fault."""
    name = f"p{rng.randrange(12)}"
    there = (PATH, "ns", name) in server.objects
    match rng.randrange(10):
        case 0:
            server.cut()
        case 1:
            server.forget()
            server.cut()
        case 2 | 3 | 4 if there:
            server.remove(PATH, "ns", name)
            if rng.random() < 0.3:
                server.put(PATH, pod(name, again="yes"))
        case _:
            server.put(PATH, pod(name, n=str(rng.randrange(1000))))


@pytest.mark.parametrize("seed", range(6))
async def test_the_cache_converges_whatever_the_server_does(seed: int) -> None:
    rng = random.Random(seed)
    server = FakeServer()
    server.page = 3
    for i in range(8):
        server.put(PATH, pod(f"p{i}"))
    mirror = Mirror()
    async with following(server) as informer:
        informer.add_handler(mirror.handler)
        for _ in range(150):
            act(server, rng)
            await asyncio.sleep(rng.choice((0, 0, 0, 0.002)))
        truth = {(n, name): obj for (_, n, name), obj in server.objects.items()}
        await until(lambda: {key_of(o): o for o in informer.store} == truth)
        assert mirror.objects == truth
        assert mirror.wrong == []


async def test_a_delete_that_nobody_watched_is_told() -> None:
    server = FakeServer()
    server.put(PATH, pod("a"))
    mirror = Mirror()
    async with following(server) as informer:
        informer.add_handler(mirror.handler)
        server.remove(PATH, "ns", "a")
        server.forget()
        server.cut()
        await until(lambda: not mirror.objects)
        assert len(informer.store) == 0


async def test_indexes_follow_changes() -> None:
    server = FakeServer()
    server.put(PATH, pod("a", app="x"))
    by_app = {"app": lambda o: [get(o, "metadata", "labels", "app", default="")]}
    async with following(server, indexers=by_app) as informer:
        assert [key_of(o) for o in informer.store.by_index("app", "x")] == [("ns", "a")]
        server.put(PATH, pod("a", app="y"))
        await until(lambda: bool(informer.store.by_index("app", "y")))
        assert informer.store.by_index("app", "x") == []


async def test_a_failing_handler_disturbs_nobody() -> None:
    server = FakeServer()
    mirror = Mirror()

    def fail(_: object) -> None:
        raise ValueError("on purpose")

    async with following(server) as informer:
        informer.add_handler(Handler(added=fail))
        informer.add_handler(mirror.handler)
        server.put(PATH, pod("a"))
        await until(lambda: len(mirror.objects) == 1)


async def test_resync_tells_everything_again() -> None:
    server = FakeServer()
    server.put(PATH, pod("a"))
    heard: list[str] = []
    async with following(server, resync_s=0.02) as informer:
        informer.add_handler(Handler(updated=lambda old, _new: heard.append(old["metadata"]["name"])))
        await until(lambda: len(heard) > 1)


async def test_a_key_is_never_worked_on_twice_at_once_and_never_lost() -> None:
    queue: WorkQueue[int] = WorkQueue(backoff_s=(0.001, 0.01))
    at_work: set[int] = set()
    asked = dict.fromkeys(range(5), 0)
    seen = dict.fromkeys(range(5), 0)
    failures = random.Random(1)

    async def work(key: int) -> None:
        assert key not in at_work
        at_work.add(key)
        state = asked[key]
        await asyncio.sleep(0.001)
        at_work.discard(key)
        if failures.random() < 0.3:
            raise ValueError("on purpose")
        seen[key] = state

    task = asyncio.create_task(queue.run(work, workers=3))
    for i in range(200):
        asked[i % 5] += 1
        queue.add(i % 5)
        await asyncio.sleep(0.0005)
    await until(lambda: seen == asked)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_sooner_of_two_times_holds() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add_after("a", 60)
    queue.add_after("a", 0.01)
    queue.add_after("a", 60)
    async with asyncio.timeout(5):
        assert await queue.get() == "a"
    queue.close()
