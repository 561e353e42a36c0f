"""Control loops that are killed right after any one of their writes: the next ones go on, and nothing is doubled."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from whole_master import Cluster, Hosts

from hypervisor.kube import meta
from hypervisor.kube.client import ApiClient
from hypervisor.kube.resources import DEPLOYMENTS, JOBS, NAMESPACES, PODS, REPLICA_SETS, SERVICE_ACCOUNTS
from hypervisor.master.controllers.run import run_control_loops
from hypervisor.master.daemon import Master, MasterConfig, running
from hypervisor.master.kinds.table import KINDS

_WRITES = ("create", "update", "patch", "delete")


class Mortal:
    """An `ApiClient` whose `count`-th write is carried out and never answered: its caller is dead by then."""

    def __init__(self, client: ApiClient, count: int) -> None:
        self._client = client
        self._left = count
        self.died = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)
        if name not in _WRITES:
            return call

        async def write(*args: Any, **kwargs: Any) -> Any:
            if self._left <= 0:
                await asyncio.Event().wait()
            self._left -= 1
            last = self._left == 0
            try:
                return await call(*args, **kwargs)
            finally:
                if last:
                    self.died.set()
                    await asyncio.Event().wait()

        return write


def loops(master: Master, client: Any) -> Any:
    stored = [k.resource for k in KINDS if k.stored and k.kept_as is None]
    return run_control_loops(client, ca_pem=master.auth.ca.pem.decode(), collected=stored)


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 30])
async def test_what_was_begun_is_finished_once(tmp_path: Path, step: int) -> None:
    config = MasterConfig(tmp_path / "master", port=0, controllers=False)
    async with running(config) as master, asyncio.timeout(60):
        hosts = Hosts(master.client)
        cluster = Cluster(master.client, hosts)
        hosts.outcome = lambda pod: "Succeeded" if "job" in meta.key_of(pod)[1] else "Running"
        async with hosts.working():
            await hosts.add("a", "b")
            template = {"metadata": {"labels": {"app": "x"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
            spec = {"replicas": 3, "selector": {"matchLabels": {"app": "x"}}, "template": template}
            await master.client.create(DEPLOYMENTS, {"metadata": {"name": "web"}, "spec": spec}, "default")
            once = {"metadata": {}, "spec": {**template["spec"], "restartPolicy": "Never"}}
            job = {"metadata": {"name": "job"}, "spec": {"completions": 2, "template": once}}
            await master.client.create(JOBS, job, "default")

            mortal = Mortal(master.client, step)
            first = asyncio.create_task(loops(master, mortal))
            await mortal.died.wait()
            await end(first)

            second = asyncio.create_task(loops(master, master.client))
            try:
                await cluster.until(lambda: settled(cluster))
                await exactly_once(cluster)
            finally:
                await end(second)


async def settled(cluster: Cluster) -> bool:
    deployment = await cluster.client.get(DEPLOYMENTS, "web", "default")
    job = await cluster.client.get(JOBS, "job", "default")
    return meta.get(deployment, "status", "availableReplicas") == 3 and meta.is_true(job, "Complete")


async def exactly_once(cluster: Cluster) -> None:
    pods = list((await cluster.client.list(PODS, "default")).items)
    by_owner: dict[str, int] = {}
    for pod in pods:
        owner = meta.controller_of(pod)
        assert owner is not None
        by_owner[owner["kind"]] = by_owner.get(owner["kind"], 0) + 1
    assert by_owner == {"ReplicaSet": 3, "Job": 2}
    assert len((await cluster.client.list(REPLICA_SETS, "default")).items) == 1
    job = await cluster.client.get(JOBS, "job", "default")
    assert job["status"]["succeeded"] == 2


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 9, 12])
async def test_an_update_and_a_deletion_are_finished_by_the_next(tmp_path: Path, step: int) -> None:
    """A rolling update, a scale to another number and a namespace's end, each begun by loops that die in it."""
    config = MasterConfig(tmp_path / "master", port=0, controllers=False)
    async with running(config) as master, asyncio.timeout(60):
        hosts = Hosts(master.client)
        cluster = Cluster(master.client, hosts)
        async with hosts.working():
            await hosts.add("a", "b")
            await master.client.create(NAMESPACES, {"metadata": {"name": "team"}})
            template = {"metadata": {"labels": {"app": "x"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
            spec = {"replicas": 3, "selector": {"matchLabels": {"app": "x"}}, "template": template}
            await master.client.create(SERVICE_ACCOUNTS, {"metadata": {"name": "default"}}, "team")
            for namespace in ("default", "team"):
                await master.client.create(DEPLOYMENTS, {"metadata": {"name": "web"}, "spec": spec}, namespace)
            task = asyncio.create_task(loops(master, master.client))
            await cluster.until(lambda: available(cluster, 3))
            await cluster.until(lambda: available(cluster, 3, "team"))
            await end(task)

            changed = {"replicas": 2, "template": {"spec": {"containers": [{"name": "c", "image": "new"}]}}}
            await master.client.patch(DEPLOYMENTS, "web", "default", {"spec": changed})
            await master.client.delete(NAMESPACES, "team")
            mortal = Mortal(master.client, step)
            first = asyncio.create_task(loops(master, mortal))
            await mortal.died.wait()
            await end(first)

            second = asyncio.create_task(loops(master, master.client))
            try:
                await cluster.until(lambda: cluster.gone(NAMESPACES, "team"))
                await cluster.until(lambda: only_new(cluster))
            finally:
                await end(second)


async def available(cluster: Cluster, count: int, namespace: str = "default") -> bool:
    deployment = await cluster.client.get(DEPLOYMENTS, "web", namespace)
    return bool(meta.get(deployment, "status", "availableReplicas") == count)


async def only_new(cluster: Cluster) -> bool:
    pods = await cluster.pods()
    images = [meta.get(p, "spec", "containers", 0, "image") for p in pods if not meta.is_deleting(p)]
    return images == ["new"] * 2 and await available(cluster, 2)
