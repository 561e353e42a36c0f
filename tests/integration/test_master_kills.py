"""kill -9 of a master under a stream of creates over HTTPS, over and over: what was acknowledged is there, once.

``HV_MASTER_KILLS`` says how often (``make soak``: 300).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from hypervisor.kube import kubeconfig

HERE = Path(__file__).parent
KILLS = int(os.environ.get("HV_MASTER_KILLS", "30"))
LONGEST_S = 0.15
CREATORS = 6
WATCHERS = 3
MAPS = "/api/v1/namespaces/default/configmaps"
OURS = "labelSelector=stream%3Dkilled"
GONE = (aiohttp.ClientError, ConnectionError, TimeoutError)


@dataclass
class Told:
    """What clients know.

    :ivar acknowledged: name and uid by token

    """

    acknowledged: dict[str, tuple[str, str]] = field(default_factory=dict)
    tokens: Any = field(default_factory=itertools.count)
    events: list[list[tuple[int, str]]] = field(default_factory=lambda: [[] for _ in range(WATCHERS)])


class Api:
    """The master wherever it is in its lives."""

    def __init__(self, state: Path, session: aiohttp.ClientSession, base: str) -> None:
        self.state, self.session, self.base = state, session, base

    async def create(self, told: Told) -> None:
        """One object with a token of its own, of a fixed or a generated name; asked for once only."""
        token = f"t{next(told.tokens)}"
        named = {"generateName": "made-"} if int(token[1:]) % 2 else {"name": token}
        body = {"metadata": named | {"labels": {"stream": "killed"}}, "data": {"token": token}}
        async with self.session.post(self.base + MAPS, json=body) as answer:
            made = await answer.json()
            assert answer.status == 201, made
            told.acknowledged[token] = made["metadata"]["name"], made["metadata"]["uid"]

    async def list(self) -> Any:
        async with self.session.get(f"{self.base}{MAPS}?{OURS}") as answer:
            assert answer.status == 200
            return await answer.json()

    async def follow(self, events: list[tuple[int, str]], since: int) -> None:
        """Goes on with a watch from the last event that was seen, until the connection breaks."""
        version = events[-1][0] if events else since
        url = f"{self.base}{MAPS}?watch=1&{OURS}&resourceVersion={version}"
        async with self.session.get(url, timeout=aiohttp.ClientTimeout(total=None)) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if not line.endswith(b"\n"):
                    return  # cut by the kill
                event = json.loads(line)
                assert event["type"] == "ADDED", event
                metadata = event["object"]["metadata"]
                events.append((int(metadata["resourceVersion"]), metadata["name"]))


async def again_and_again(work: Any) -> None:
    """Repeats what a killed master broke off."""
    while True:
        try:
            await work()
        except GONE:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def forker(state: Path, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, str(HERE / "master_forker.py"), str(state), str(port)]
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await asyncio.wait_for(process.wait(), 20)


async def said(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 20)).decode().strip()


async def until_ready(api: Api) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                async with api.session.get(f"{api.base}/readyz") as answer:
                    if answer.status == 200:
                        return
            except GONE:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def life(process: asyncio.subprocess.Process, api: Api) -> AsyncIterator[None]:
    """A master that serves, and is killed at the end of the block."""
    assert process.stdin is not None
    process.stdin.write(b"\n")
    pid = int(await said(process))
    try:
        await until_ready(api)
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        assert await said(process) == "ended"


async def made_first(process: asyncio.subprocess.Process, state: Path, port: int) -> aiohttp.ClientSession:
    """A client with the keys that the first start makes."""
    assert process.stdin is not None
    process.stdin.write(b"\n")
    pid = int(await said(process))
    try:
        async with asyncio.timeout(30):
            while not (state / "admin.kubeconfig").exists():  # noqa: ASYNC110  # a file, not an event of ours
                await asyncio.sleep(0.02)
    finally:
        os.kill(pid, signal.SIGKILL)
        assert await said(process) == "ended"
    tls = kubeconfig.load(state / "admin.kubeconfig").tls()
    assert tls is not None
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls, limit=0))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Clients:
    """Creators and watchers, who go on whatever happens to the master; one that finds something wrong ends."""

    def __init__(self, api: Api, told: Told, since: int) -> None:
        def follow(events: list[tuple[int, str]]) -> Any:
            return again_and_again(lambda: api.follow(events, since))

        self.told = told
        self.creators = [asyncio.create_task(again_and_again(lambda: api.create(told))) for _ in range(CREATORS)]
        self.watchers = [asyncio.create_task(follow(events)) for events in told.events]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                for task in (*self.creators, *self.watchers):
                    assert not task.done() or task.cancelled() or task.result()
                await asyncio.sleep(0.005)

    async def end(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_nothing_acknowledged_is_lost_and_nothing_is_there_twice(tmp_path: Path) -> None:
    port, told = free_port(), Told()
    async with forker(tmp_path, port) as process, await made_first(process, tmp_path, port) as session:
        api = Api(tmp_path, session, f"https://127.0.0.1:{port}")
        async with life(process, api):
            clients = Clients(api, told, int((await api.list())["metadata"]["resourceVersion"]))
        for _ in range(KILLS):
            known = len(told.acknowledged)
            async with life(process, api):  # in each something is written
                await clients.until(lambda known=known: len(told.acknowledged) > known)  # type: ignore[misc]
                await asyncio.sleep(random.uniform(0, LONGEST_S))
        await clients.end(clients.creators)
        async with life(process, api):
            items = (await api.list())["items"]
            await clients.until(lambda: all(len(e) >= len(items) for e in told.events))
        await clients.end(clients.watchers)
    check(told, items)


def check(told: Told, items: list[Any]) -> None:
    by_token = Counter(item["data"]["token"] for item in items)
    assert not [token for token, count in by_token.items() if count > 1], "made twice"
    there = {i["data"]["token"]: (i["metadata"]["name"], i["metadata"]["uid"]) for i in items}
    assert len(told.acknowledged) > KILLS
    assert {t: there.get(t) for t in told.acknowledged} == told.acknowledged, "acknowledged, and lost"
    in_order = sorted((int(i["metadata"]["resourceVersion"]), i["metadata"]["name"]) for i in items)
    for events in told.events:
        assert events == in_order, "a watcher missed or doubled an event"
