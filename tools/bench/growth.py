"""A whole master (scheduler and controllers on) with 100 simulated nodes and 5,000 pods, over HTTPS.

Each node has a certificate of its own, its Node, its Lease and a watch of its pods, and reports each pod Running as a
host does. Then 100 more clients watch all pods, while pods' statuses change and leases are renewed at a steady rate.
The client is one other process on the same cores: its own work is in the figures.

Run by itself: ``python tools/bench/growth.py [--rounds 5]``; about a minute and a half.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from apiserver import IN_FLIGHT, PODS, Client, pod, resident
from master_server import Server, served
from measure import Figure
from simulated_nodes import Background, Delays, Node, Seen, follow

from hypervisor.master.auth import parties
from hypervisor.master.auth.ca import client_context

NODES = 100
BATCH, BATCHES = 1000, 5
WATCHERS = 100
CHANGES_S = 50
WINDOW_S = 4.0
LONGEST_S = 120.0


@dataclass(frozen=True)
class Cluster:
    """What is measured.

    :ivar pid: of the master
    :ivar seen: by the administrator, who watches all pods
    """

    session: aiohttp.ClientSession
    base: str
    pid: int
    nodes: list[Node]
    seen: Seen
    background: Background

    @property
    def client(self) -> Client:
        """The administrator."""
        return Client(self.session, self.base)


async def fill(cluster: Cluster, batch: int) -> float:
    """Makes `BATCH` pods; pods bound a second, from the first create to the last binding."""
    names = [f"g{batch}-{n}" for n in range(BATCH)]
    left = iter(names)

    async def make() -> None:
        for name in left:
            await cluster.client.send("POST", PODS, pod(name))

    start = time.perf_counter()
    await asyncio.gather(*(make() for _ in range(IN_FLIGHT)))
    await cluster.seen.wait_running(BATCH * (batch + 1), LONGEST_S)
    cluster.background.check()
    return BATCH / (max(cluster.seen.bound[name] for name in names) - start)


async def timed_gets(cluster: Cluster, seconds: float) -> list[float]:
    """Milliseconds of GETs, one after the other."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    for name in itertools.cycle(list(cluster.seen.bound)):
        start = time.perf_counter()
        if start >= end:
            break
        await cluster.client.send("GET", f"{PODS}/{name}")
        found.append((time.perf_counter() - start) * 1000)
        await asyncio.sleep(0.005)
    return found


async def timed_lists(cluster: Cluster, seconds: float) -> list[float]:
    """Milliseconds of LISTs of all pods, one after the other."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        await cluster.client.send("GET", PODS)
        found.append((time.perf_counter() - start) * 1000)
        await asyncio.sleep(0.2)
    return found


def cpu(pid: int) -> float:
    """Seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def steady(cluster: Cluster, rounds: int) -> list[Figure]:
    """GET, LIST and watch while `CHANGES_S` statuses change a second."""
    delays, gets, lists, watches = Delays(), [], [], []
    url = f"{cluster.base}{PODS}?watch=1&resourceVersion={await revision(cluster)}"
    async with Background() as background:
        for _ in range(WATCHERS):
            background.start(follow(cluster.session, url, delays.line))
        await asyncio.sleep(2.0)
        for number in range(rounds * 2):
            delays.found.clear()
            changes = asyncio.create_task(
                delays.change(cluster.nodes, cluster.background, rate=CHANGES_S, seconds=WINDOW_S)
            )
            if number % 2:
                lists += await timed_lists(cluster, WINDOW_S)
            else:
                gets.append(p99(await timed_gets(cluster, WINDOW_S)))
            expected = await changes * WATCHERS
            await asyncio.sleep(1.0)
            if not number % 2:
                watches.append(p99(delays.found))
            if len(delays.found) != expected:
                raise RuntimeError(f"{expected} events expected, {len(delays.found)} came")
            background.check()
            cluster.background.check()
    return [
        Figure("GET, p99", "ms", tuple(gets), 25),
        Figure(f"LIST of {BATCH * BATCHES} pods", "ms", tuple(lists), 250),
        Figure(f"watch, {NODES + WATCHERS} watchers, p99", "ms", tuple(watches), 250),
    ]


async def revision(cluster: Cluster) -> str:
    """Of now."""
    body = await cluster.client.send("GET", f"{PODS}?limit=1")
    return body.split(b'"resourceVersion":"')[1].split(b'"')[0].decode()


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(values, n=100)[98]


@asynccontextmanager
async def joined(server: Server) -> AsyncIterator[Cluster]:
    """The cluster with all its nodes."""
    ca, base = server.ca, f"https://127.0.0.1:{server.port}"
    async with AsyncExitStack() as stack:

        async def session(pair: Path) -> aiohttp.ClientSession:
            connector = aiohttp.TCPConnector(ssl=client_context(pair, ca.certificate_file), limit=0)
            made = aiohttp.ClientSession(connector=connector, headers={"User-Agent": "bench"})
            return await stack.enter_async_context(made)

        admin = await session(parties.admin(ca))
        background = await stack.enter_async_context(Background())
        nodes = []
        for name in (f"node-{n}" for n in range(NODES)):
            pair = server.folder / f"{name}.pem"
            pair.write_bytes(parties.node(ca, name).both)
            nodes.append(Node(name, await session(pair), base, background))
        cluster = Cluster(admin, base, server.pid, nodes, Seen(), background)
        await settled(cluster.client)
        await asyncio.gather(*(node.join(10 * n / NODES) for n, node in enumerate(nodes)))
        background.start(follow(admin, f"{base}{PODS}?watch=1&resourceVersion=0", cluster.seen.line))
        yield cluster


async def settled(client: Client) -> None:
    """Waits until the controllers have made the service account that pods run as."""
    async with asyncio.timeout(LONGEST_S):
        while True:
            with contextlib.suppress(RuntimeError):
                await client.send("GET", "/api/v1/namespaces/default/serviceaccounts/default")
                return
            await asyncio.sleep(0.1)


async def measure(server: Server, rounds: int) -> list[Figure]:
    """All of it."""
    pid = server.pid
    async with joined(server) as cluster:
        start = cpu(pid)
        first = await fill(cluster, 0)
        used, small = cpu(pid) - start, resident(pid)
        more = [await fill(cluster, batch) for batch in range(1, BATCHES)]
        found = [
            Figure(f"first {BATCH} pods over {NODES} nodes, bound", "1/s", (first,), 200, True),
            Figure("the master's CPU time for each of them", "ms", (used * 1000 / BATCH,)),
            Figure(f"up to {BATCH * BATCHES} pods, bound", "1/s", tuple(more)),
            *await steady(cluster, rounds),
        ]
        memory = resident(pid)
    return [
        *found,
        Figure(f"memory with {BATCH} pods", "MiB", (small,), 300),
        Figure(f"memory with {BATCH * BATCHES} pods", "MiB", (memory,), 600),
    ]


def run(rounds: int) -> list[Figure]:
    """Starts a server, measures it, ends it."""
    with served(controllers=True) as server:
        return asyncio.run(measure(server, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    for figure in run(parser.parse_args().rounds):
        print(figure.row())


if __name__ == "__main__":
    main()
