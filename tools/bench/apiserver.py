"""The master's API server over HTTPS, SQLite, one process, measured from another: rates, latencies, watches, memory.

Run by itself: ``python tools/bench/apiserver.py [--seconds 3]``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import ssl
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
from master_server import served
from measure import Figure

LISTED = 2000
IN_FLIGHT = 32
WATCH_RATE = 50
PODS = "/api/v1/namespaces/default/pods"
Work = Callable[[int], Awaitable[None]]


def pod(name: str) -> dict[str, Any]:
    """As a Deployment would make it."""
    container = {
        "name": "web",
        "image": "registry.example/web:1.2.3",
        "env": [{"name": f"VARIABLE_{n}", "value": f"value {n}"} for n in range(5)],
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}},
    }
    spec = {"containers": [container], "automountServiceAccountToken": False}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "web"}}, "spec": spec}


class Client:
    """Requests that must succeed."""

    def __init__(self, session: aiohttp.ClientSession, base: str) -> None:
        self._session, self._base = session, base

    async def send(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> bytes:
        """The answer's body."""
        data = None if body is None else json.dumps(body).encode()
        async with self._session.request(
            method, self._base + path, data=data, headers={"Content-Type": kind} if data else None
        ) as answer:
            text = await answer.read()
            if answer.status >= 300:
                raise RuntimeError(f"{method} {path}: {answer.status} {text[:500]!r}")
            return text

    async def watch(self, path: str, seen: Callable[[str], None]) -> None:
        """Tells the names of objects as their events come."""
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._session.get(f"{self._base}{path}?watch=1&resourceVersion=0", timeout=timeout) as answer:
            async for line in answer.content:
                start = line.index(b'"name":"') + 8
                seen(line[start : line.index(b'"', start)].decode())


async def rate(work: Work, in_flight: int, seconds: float) -> float:
    """Calls a second, so many at a time."""
    numbers, end, done = itertools.count(), time.perf_counter() + seconds, 0

    async def one() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await work(next(numbers))
            done += 1

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(in_flight)))
    return done / (time.perf_counter() - start)


async def times(work: Work, count: int) -> list[float]:
    """Milliseconds of each of so many calls, one after the other."""
    found = []
    for number in range(count):
        start = time.perf_counter()
        await work(number)
        found.append((time.perf_counter() - start) * 1000)
    return found


async def rates(client: Client, seconds: float) -> list[Figure]:
    """Creates, status patches, reads."""
    merge = "application/merge-patch+json"
    condition = {"type": "Ready", "status": "True"}

    async def create(n: int) -> None:
        await client.send("POST", PODS, pod(f"c-{n}"))

    async def patch(n: int) -> None:
        body = {"status": {"phase": "Running", "conditions": [condition], "podIP": f"10.0.{n // 250 % 250}.{n % 250}"}}
        await client.send("PATCH", f"{PODS}/c-{n % 200}/status", body, merge)

    async def get(n: int) -> None:
        await client.send("GET", f"{PODS}/c-{n % 200}")

    created = await rate(create, IN_FLIGHT, seconds)
    patched = await rate(patch, IN_FLIGHT, seconds)
    alone = await times(get, 500)
    together = await rate(get, IN_FLIGHT, seconds)
    return [
        Figure("creates", "1/s", (created,), 500, True),
        Figure("status patches", "1/s", (patched,), 500, True),
        Figure("GET, one at a time, p50", "ms", (statistics.median(alone),), 3),
        Figure("GET, one at a time, p99", "ms", (statistics.quantiles(alone, n=100)[98],)),
        Figure("GET, 32 at a time", "1/s", (together,), 1000, True),
    ]


async def lists(client: Client) -> list[Figure]:
    """LIST of `LISTED` pods."""
    namespace = "/api/v1/namespaces/kube-public/pods"
    numbers = iter(range(LISTED))

    async def fill() -> None:
        for n in numbers:
            await client.send("POST", namespace, pod(f"l-{n}"))

    await asyncio.gather(*(fill() for _ in range(IN_FLIGHT)))

    async def get(_n: int) -> None:
        await client.send("GET", namespace)

    return [Figure(f"LIST of {LISTED} pods", "ms", tuple(await times(get, 20)), 60)]


async def watches(client: Client, watchers: int) -> list[Figure]:
    """From a create's start to its event, at `WATCH_RATE` creates a second."""
    namespace = "/api/v1/namespaces/kube-system"
    sent: dict[str, float] = {}
    delays: list[float] = []

    def seen(name: str) -> None:
        if name in sent:
            delays.append((time.perf_counter() - sent[name]) * 1000)

    following = [asyncio.create_task(client.watch(f"{namespace}/configmaps", seen)) for _ in range(watchers)]
    await asyncio.sleep(1.0)
    for number in range(WATCH_RATE * 4):
        name = f"w{watchers}-{number}"
        sent[name] = time.perf_counter()
        body = {"metadata": {"name": name}, "data": {"a": "b"}}
        asyncio.get_running_loop().create_task(client.send("POST", f"{namespace}/configmaps", body))
        await asyncio.sleep(1 / WATCH_RATE)
    await asyncio.sleep(1.0)
    for task in following:
        task.cancel()
    await asyncio.gather(*following, return_exceptions=True)
    if len(delays) != watchers * len(sent):
        raise RuntimeError(f"{watchers * len(sent)} events expected, {len(delays)} came")
    return [
        Figure(f"watch, {watchers} watchers, p50", "ms", (statistics.median(delays),), 8 if watchers == 1 else 15),
        Figure(f"watch, {watchers} watchers, p99", "ms", (statistics.quantiles(delays, n=100)[98],)),
    ]


def resident(pid: int) -> float:
    """MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def prepare(client: Client) -> None:
    """Service accounts: there are no controllers here."""
    for namespace in ("default", "kube-public", "kube-system"):
        body = {"metadata": {"name": "default"}}
        await client.send("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts", body)


async def measure(port: int, tls: ssl.SSLContext, pid: int, seconds: float) -> list[Figure]:
    """All of it."""
    connector = aiohttp.TCPConnector(ssl=tls, limit=0)
    async with aiohttp.ClientSession(connector=connector, headers={"User-Agent": "bench"}) as session:
        client = Client(session, f"https://127.0.0.1:{port}")
        await prepare(client)
        before = resident(pid)
        found = await rates(client, seconds)
        found += await lists(client)
        found += [*await watches(client, 1), *await watches(client, 50)]
        found += [Figure("memory at the start", "MiB", (before,)), Figure("at the end", "MiB", (resident(pid),), 300)]
        return found


def run(rounds: int, seconds: float = 2.0) -> list[Figure]:
    """So many rounds, each with a server of its own."""
    found = [once(seconds) for _ in range(rounds)]
    return [replace(f[0], samples=tuple(s for figure in f for s in figure.samples)) for f in zip(*found, strict=True)]


def once(seconds: float) -> list[Figure]:
    """Starts a server, measures it, ends it."""
    with served(controllers=False) as server:
        return asyncio.run(measure(server.port, server.tls(), server.pid, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    for figure in once(parser.parse_args().seconds):
        print(figure.row())


if __name__ == "__main__":
    main()
