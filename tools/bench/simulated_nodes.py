"""Hosts without VMs: each speaks the real API with its own certificate, and says of each of its pods that it runs."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
from apiserver import PODS, Client

from hypervisor.kube.meta import now

LEASE_S = 10.0
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
OFFER = {"cpu": "32", "memory": "64Gi", "pods": "110", "ephemeral-storage": "100Gi"}


class Background:
    """Tasks that end with the block; the first that fails is told by `check`."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: BaseException | None = None

    async def __aenter__(self) -> Background:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs it beside."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def check(self) -> None:
        """Raises what one of them raised."""
        if self._failed is not None:
            raise self._failed

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failed = self._failed or task.exception()


async def follow(session: aiohttp.ClientSession, url: str, seen: Callable[[bytes], None]) -> None:
    """Gives each line of a watch to `seen`, until cancelled."""
    rest = b""
    async with session.get(url, timeout=aiohttp.ClientTimeout(total=None)) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{url}: {answer.status} {await answer.text()}")
        async for chunk in answer.content.iter_any():
            *ended, rest = (rest + chunk).split(b"\n")
            for line in ended:
                seen(line)
    raise RuntimeError(f"{url}: the watch ended")


def text_after(line: bytes, mark: bytes) -> str:
    """The JSON string that begins after `mark`; empty where the mark is not."""
    at = line.find(mark)
    return line[at + len(mark) : line.index(b'"', at + len(mark))].decode() if at >= 0 else ""


class Node:
    """A host, once it has joined."""

    def __init__(self, name: str, session: aiohttp.ClientSession, base: str, background: Background) -> None:
        self.name = name
        self.pods: dict[str, None] = {}
        self._session, self._base, self._background = session, base, background
        self._client = Client(session, base)

    async def join(self, beat_after_s: float) -> None:
        """Registers, and goes on from there in the background."""
        body = {"metadata": {"name": self.name, "labels": {"kubernetes.io/hostname": self.name}}}
        await self._client.send("POST", "/api/v1/nodes", body)
        condition = {"type": "Ready", "status": "True", "reason": "KubeletReady"}
        status = {"capacity": OFFER, "allocatable": OFFER, "conditions": [condition]}
        await self._client.send("PATCH", f"/api/v1/nodes/{self.name}/status", {"status": status}, STRATEGIC)
        lease = {"metadata": {"name": self.name}, "spec": {"holderIdentity": self.name, "leaseDurationSeconds": 40}}
        await self._client.send("POST", LEASES, lease)
        self._background.start(self._beat(beat_after_s))
        url = f"{self._base}/api/v1/pods?watch=1&resourceVersion=0&fieldSelector=spec.nodeName%3D{self.name}"
        self._background.start(follow(self._session, url, self._seen))

    async def change(self, name: str, message: str) -> None:
        """One more change of a pod's status."""
        await self._client.send("PATCH", f"{PODS}/{name}/status", {"status": {"message": message}}, STRATEGIC)

    async def _beat(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        while True:
            await self._client.send("PATCH", f"{LEASES}/{self.name}", {"spec": {"renewTime": now(micro=True)}}, MERGE)
            await asyncio.sleep(LEASE_S)

    def _seen(self, line: bytes) -> None:
        name = text_after(line, b'"name":"')
        if name and name not in self.pods:
            self.pods[name] = None
            self._background.start(self._run(name))

    async def _run(self, name: str) -> None:
        container = {"name": "web", "ready": True, "restartCount": 0, "image": "web", "imageID": "", "started": True}
        container["state"] = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
        conditions = [{"type": t, "status": "True"} for t in ("Initialized", "Ready", "ContainersReady")]
        status = {"phase": "Running", "podIP": "10.1.2.3", "conditions": conditions, "containerStatuses": [container]}
        await self._client.send("PATCH", f"{PODS}/{name}/status", {"status": status}, STRATEGIC)


class Seen:
    """One watch of all pods: when each was bound, and which run."""

    def __init__(self) -> None:
        self.bound: dict[str, float] = {}
        self.running: set[str] = set()
        self._changed = asyncio.Event()

    def line(self, line: bytes) -> None:
        """Of the watch."""
        name = text_after(line, b'"name":"')
        if name not in self.bound and b'"nodeName":"' in line:
            self.bound[name] = time.perf_counter()
        if name not in self.running and b'"phase":"Running"' in line:
            self.running.add(name)
        self._changed.set()

    async def wait_running(self, count: int, seconds: float) -> None:
        """Until so many pods run."""
        async with asyncio.timeout(seconds):
            while len(self.running) < count:
                self._changed.clear()
                await self._changed.wait()


class Delays:
    """From a change's start to its event at each watcher, in milliseconds."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self._sent: dict[str, float] = {}

    def line(self, line: bytes) -> None:
        """Of a watch."""
        mark = text_after(line, b'"message":"beat ')
        if mark in self._sent:
            self.found.append((time.perf_counter() - self._sent[mark]) * 1000)

    async def change(self, nodes: list[Node], background: Background, *, rate: float, seconds: float) -> int:
        """Changes pods' statuses at a steady rate, each by its own node; how many."""
        places = zip(*(node.pods for node in nodes), strict=False)
        turns = [turn for pods in places for turn in zip(nodes, pods, strict=True)]
        start = time.perf_counter()
        for number, (node, pod) in enumerate(itertools.cycle(turns)):
            if number >= rate * seconds:
                return number
            mark = str(len(self._sent))
            self._sent[mark] = time.perf_counter()
            background.start(node.change(pod, f"beat {mark}"))
            await asyncio.sleep(max(0.0, start + (number + 1) / rate - time.perf_counter()))
        raise RuntimeError("no pods")
