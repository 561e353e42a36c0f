"""A whole master without a network of hosts: real store, registry, admission, scheduler and controllers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from hypervisor.errors import HvError
from hypervisor.kube import meta
from hypervisor.kube.client import ApiClient, Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.informer import Handler, Informer
from hypervisor.kube.resources import LEASES, NODES, PODS
from hypervisor.master.daemon import MasterConfig, running


class Hosts:
    """Stands in for hosts: nodes whose pods run as soon as they are bound, and end when they are deleted."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._pods = Informer(client, PODS)
        self._tasks: set[asyncio.Task[None]] = set()
        self.silent: set[str] = set()
        self.outcome: Callable[[Object], str] = lambda pod: "Running"
        self._known: set[tuple[str, str]] = set()
        self._addresses = iter(range(1, 60000))

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        self._pods.add_handler(Handler(added=self._see, updated=lambda _, new: self._see(new)))
        following = asyncio.create_task(self._pods.run())
        try:
            yield
        finally:
            for task in (following, *self._tasks):
                task.cancel()
            await asyncio.gather(following, *self._tasks, return_exceptions=True)

    async def add(self, *names: str, cpu: str = "8", **labels: str) -> None:
        for name in names:
            allocatable = {"cpu": cpu, "memory": "32Gi", "pods": "110"}
            node = {
                "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **labels}},
                "status": {"allocatable": allocatable, "capacity": allocatable},
            }
            await self._client.create(NODES, node)
            await self.beat(name)

    async def beat(self, name: str) -> None:
        """A sign of life."""
        ready = {"type": "Ready", "status": "True", "lastHeartbeatTime": meta.now(), "lastTransitionTime": meta.now()}
        patch = {"status": {"conditions": [ready]}}
        await self._client.patch(NODES, name, None, patch, subresource="status")
        spec = {"renewTime": meta.now(micro=True), "holderIdentity": name}
        try:
            lease = {"metadata": {"name": name, "namespace": "kube-node-lease"}, "spec": spec}
            await self._client.create(LEASES, lease, "kube-node-lease")
        except ApiError:
            await self._client.patch(LEASES, name, "kube-node-lease", {"spec": spec})

    def _see(self, pod: Object) -> None:
        node = meta.get(pod, "spec", "nodeName")
        if not node or node in self.silent:
            return
        step = "end" if meta.is_deleting(pod) else "run"
        if (meta.uid_of(pod), step) in self._known:
            return
        self._known.add((meta.uid_of(pod), step))
        task = asyncio.create_task(self._end(pod) if step == "end" else self._run(pod))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, pod: Object) -> None:
        namespace, name = meta.key_of(pod)
        phase = self.outcome(pod)
        condition = {"type": "Ready", "status": str(phase == "Running"), "lastTransitionTime": meta.now()}
        address = f"10.0.{(number := next(self._addresses)) // 250}.{number % 250 + 1}"
        status = {"phase": phase, "conditions": [condition], "podIP": address, "podIPs": [{"ip": address}]}
        with contextlib.suppress(HvError):
            await self._client.patch(PODS, name, namespace, {"status": status}, subresource="status")

    async def _end(self, pod: Object) -> None:
        namespace, name = meta.key_of(pod)
        with contextlib.suppress(HvError):
            await self._client.delete(PODS, name, namespace, grace_s=0, uid=meta.uid_of(pod))


class Cluster:
    """What a test works with."""

    def __init__(self, client: ApiClient, hosts: Hosts) -> None:
        self.client = client
        self.hosts = hosts

    async def until(self, what: Callable[[], Awaitable[Any]], *, seconds: float = 20.0) -> Any:
        """Waits until `what` gives something true (or stops raising NotFound), and gives that."""
        seen: Any = None
        try:
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        if seen := await what():
                            return seen
                    except ApiError as e:
                        seen = e
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"did not happen in {seconds:g} s; last: {seen!r}") from None

    async def pods(self, selector: str = "", namespace: str = "default") -> list[Any]:
        return list((await self.client.list(PODS, namespace, label_selector=selector)).items)

    async def gone(self, *args: Any) -> bool:
        try:
            await self.client.get(*args)
        except ApiError as e:
            return e.reason == "NotFound"
        return False


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    async with running(MasterConfig(tmp_path / "master", port=0)) as master:
        hosts = Hosts(master.client)
        async with hosts.working():
            yield Cluster(master.client, hosts)
