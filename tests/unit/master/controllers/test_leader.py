"""Two masters on one etcd: one acts; when it goes, or dies, the other does, and nothing is done twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from etcd_server import EtcdServer
from whole_master import Cluster, Hosts

from hypervisor.kube import meta
from hypervisor.kube.client import ApiClient
from hypervisor.kube.resources import DEPLOYMENTS, LEASES
from hypervisor.master.controllers import leader
from hypervisor.master.controllers.leader import Leadership
from hypervisor.master.daemon import MasterConfig, running


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("DURATION_S", 2.0), ("GIVE_UP_S", 1.0), ("RENEW_S", 0.2)):
        monkeypatch.setattr(leader, name, seconds)


def config(folder: Path, etcd: EtcdServer) -> MasterConfig:
    return MasterConfig(folder, port=0, store=f"etcd:{etcd.url}")


@asynccontextmanager
async def cluster_of(client: ApiClient) -> AsyncIterator[Cluster]:
    hosts = Hosts(client)
    async with hosts.working():
        yield Cluster(client, hosts)


async def holder(client: ApiClient) -> str:
    lease = await client.get(LEASES, leader.NAME, leader.NAMESPACE)
    return str(lease["spec"]["holderIdentity"])


async def available(cluster: Cluster, count: int) -> bool:
    found = await cluster.client.get(DEPLOYMENTS, "web", "default")
    return bool(meta.get(found, "status", "availableReplicas") == count)


async def test_the_second_master_goes_on_where_the_first_has_ended(tmp_path: Path, etcd: EtcdServer) -> None:
    async with running(config(tmp_path / "b", etcd)) as second, cluster_of(second.client) as cluster:
        b = await cluster.until(lambda: holder(second.client))
        async with running(config(tmp_path / "a", etcd)) as first:
            await cluster.hosts.add("n")
            template = {"metadata": {"labels": {"app": "x"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
            spec = {"replicas": 3, "selector": {"matchLabels": {"app": "x"}}, "template": template}
            await first.client.create(DEPLOYMENTS, {"metadata": {"name": "web"}, "spec": spec}, "default")
            await cluster.until(lambda: available(cluster, 3))
            assert await holder(first.client) == b  # one acts, whoever is asked
            assert len(await cluster.pods()) == 3
    async with running(config(tmp_path / "a", etcd)) as first, cluster_of(first.client) as cluster:
        a = await cluster.until(lambda: holder(first.client))
        assert a != b
        await first.client.patch(DEPLOYMENTS, "web", "default", {"spec": {"replicas": 5}})
        await cluster.until(lambda: available(cluster, 5))
        assert len(await cluster.pods()) == 5


async def test_a_leader_that_died_is_followed_when_its_lease_has_lapsed(tmp_path: Path, etcd: EtcdServer) -> None:
    quiet = MasterConfig(tmp_path / "a", port=0, store=f"etcd:{etcd.url}", controllers=False)
    async with running(quiet) as master:
        leads = {"dead": asyncio.Event(), "alive": asyncio.Event()}
        ended: list[str] = []

        async def lead(name: str) -> None:
            leads[name].set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(name)

        dead = asyncio.create_task(Leadership(Mute(master.client), "dead").run(lambda: lead("dead")))
        await leads["dead"].wait()
        alive = asyncio.create_task(Leadership(master.client, "alive").run(lambda: lead("alive")))
        Mute.speaks = False  # the dead one is not heard of any more
        async with asyncio.timeout(20):
            await leads["alive"].wait()
        assert ended == ["dead"]  # before anybody else began
        assert await holder(master.client) == "alive"
        for task in (dead, alive):
            task.cancel()
        await asyncio.gather(dead, alive, return_exceptions=True)


class Mute:
    """A client whose calls are never answered once it speaks no more."""

    speaks = True

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        Mute.speaks = True

    def __getattr__(self, name: str) -> object:
        call = getattr(self._client, name)

        async def maybe(*args: object, **kwargs: object) -> object:
            if not Mute.speaks:
                await asyncio.Event().wait()
            return await call(*args, **kwargs)

        return maybe
