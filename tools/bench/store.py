"""The master's stores and the registry over them, without an API server: writes and reads a second, delay of watches.

Run by itself: ``python tools/bench/store.py [--seconds 2]``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from measure import Figure

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/unit/master"))

from hypervisor.kube.resources import PODS
from hypervisor.master.kinds.kind import Kind
from hypervisor.master.registry.registry import Registry
from hypervisor.master.registry.watch import Watch
from hypervisor.master.store.base import Store
from hypervisor.master.store.etcd import EtcdStore
from hypervisor.master.store.sqlite import SqliteStore

POD = Kind(PODS, "pod", "io.k8s.api.core.v1.Pod", selectable=("spec.nodeName", "status.phase"))
VALUE = b"x" * 2000
LISTED = 2000
WATCHERS = 50
Work = Callable[[int], Awaitable[Any]]


def pod(name: str) -> dict[str, Any]:
    """A pod of some 2 KB, as a Deployment would make it."""
    container = {
        "name": "web",
        "image": "registry.example/web:1.2.3",
        "env": [{"name": f"VARIABLE_{n}", "value": f"value {n}"} for n in range(20)],
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}},
        "volumeMounts": [{"name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}],
    }
    labels = {"app": "web", "pod-template-hash": "6b7f"}
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": [container], "restartPolicy": "Always"},
    }


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


async def of_store(name: str, store: Store, seconds: float) -> list[Figure]:
    """Creates with 1 and 32 in flight."""
    found = []
    for in_flight in (1, 32):
        value = await rate(lambda n, i=in_flight: store.create(f"/bench/{i}/{n}", VALUE), in_flight, seconds)
        found.append(Figure(f"{name}: creates of 2 KB, {in_flight} in flight", "/s", (value,)))
    return found


async def of_registry(name: str, registry: Registry, seconds: float) -> list[Figure]:
    """Creates, status updates and reads with 32 in flight, a whole list, and the time from create to event."""
    found = []
    value = await rate(lambda n: registry.create(POD, pod(f"p{n}"), "bench"), 32, seconds)
    found.append(Figure(f"registry on {name}: pods created, 32 in flight", "/s", (value,)))
    value = await rate(lambda n: registry.update(POD, "bench", f"p{n % 500}", _status(n)), 32, seconds)
    found.append(Figure(f"registry on {name}: status updates, 32 in flight", "/s", (value,)))
    value = await rate(lambda n: registry.entry(POD, "bench", f"p{n % 500}"), 32, seconds / 4)
    found.append(Figure(f"registry on {name}: encoded pods got, 32 in flight", "/s", (value,)))
    for n in range(LISTED):
        await registry.create(POD, pod(f"p{n}"), "listed")
    times = []
    for _ in range(10):
        start = time.perf_counter()
        (await registry.list(POD, "listed")).encode(POD)
        times.append((time.perf_counter() - start) * 1e3)
    found.append(Figure(f"registry on {name}: list of {LISTED} pods, encoded", "ms", tuple(times)))
    for watchers in (1, WATCHERS):
        found.append(await latency(name, registry, watchers))
    return found


async def latency(name: str, registry: Registry, watchers: int) -> Figure:
    """From the call of create to the encoded event in the hands of the last of the watchers."""
    times: list[float] = []
    start = 0.0
    told = asyncio.Semaphore(0)

    async def watch(follow: Watch) -> None:
        while True:
            for event in await follow.batch():
                assert event.line
                told.release()

    async def one(ready: asyncio.Semaphore) -> None:
        async with registry.watch(POD, "watched", send_initial_events=False) as follow:
            ready.release()
            await watch(follow)

    ready = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(one(ready)) for _ in range(watchers)]
    for _ in tasks:
        await ready.acquire()
    for n in range(100):
        start = time.perf_counter()
        await registry.create(POD, pod(f"w{watchers}-{n}"), "watched")
        for _ in tasks:
            await told.acquire()
        times.append((time.perf_counter() - start) * 1e3)
        await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return Figure(f"registry on {name}: create to event, {watchers} watchers", "ms", tuple(times))


def _status(n: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda obj: obj | {"status": {"phase": "Running", "observed": n}}


async def on_sqlite(folder: Path, seconds: float) -> list[Figure]:
    """The embedded store, in a fresh file."""
    store = await SqliteStore.open(folder / "store.db")
    registry = await Registry.open(store, [POD])
    found = await of_store("sqlite", store, seconds) + await of_registry("sqlite", registry, seconds)
    await registry.close()
    await store.close()
    return found


async def on_etcd(folder: Path, seconds: float) -> list[Figure]:
    """A fresh etcd process on loopback, with fsync."""
    from etcd_server import EtcdServer

    server = EtcdServer(folder)
    await asyncio.to_thread(server.start)
    try:
        store = await EtcdStore.connect([server.url])
        registry = await Registry.open(store, [POD])
        found = await of_store("etcd", store, seconds) + await of_registry("etcd", registry, seconds)
        await registry.close()
        await store.close()
    finally:
        server.kill()
    return found


async def measure(seconds: float) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        return await on_sqlite(Path(folder), seconds) + await on_etcd(Path(folder), seconds)


def run(rounds: int) -> list[Figure]:
    """As `tools/bench/run.py` calls it."""
    return asyncio.run(measure(float(rounds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2, help="for each rate")
    for figure in asyncio.run(measure(parser.parse_args().seconds)):
        print(f"{figure.name:70} {figure.median:10.2f} {figure.unit}")


if __name__ == "__main__":
    main()
