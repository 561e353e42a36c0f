"""StatefulSets: names that stay, one after the other; updates from the last, to a partition; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from whole_master import Cluster

from hypervisor.kube import meta
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import CONTROLLER_REVISIONS, PODS, STATEFUL_SETS


def stateful(replicas: int = 3, image: str = "old", **spec: Any) -> dict[str, Any]:
    template = {"metadata": {"labels": {"app": "db"}}, "spec": {"containers": [{"name": "c", "image": image}]}}
    body = {"replicas": replicas, "serviceName": "db", "selector": {"matchLabels": {"app": "db"}}, "template": template}
    return {"metadata": {"name": "db"}, "spec": {**body, **spec}}


async def images(cluster: Cluster) -> dict[str, str]:
    """Of pods that stay, by name."""
    pods = [p for p in await cluster.pods() if not meta.is_deleting(p)]
    return {meta.key_of(p)[1]: meta.get(p, "spec", "containers", 0, "image") for p in pods}


async def status(cluster: Cluster) -> Any:
    return (await cluster.client.get(STATEFUL_SETS, "db", "default")).get("status") or {}


async def ready(cluster: Cluster, count: int) -> bool:
    found = await status(cluster)
    return found.get("readyReplicas") == found.get("replicas") == count


async def test_pods_are_made_in_order_and_end_in_reverse(cluster: Cluster) -> None:
    await cluster.hosts.add("a")
    held = {"db-1"}
    cluster.hosts.outcome = lambda pod: "Pending" if meta.key_of(pod)[1] in held else "Running"
    await cluster.client.create(STATEFUL_SETS, stateful(), "default")

    async def two() -> bool:
        return set(await images(cluster)) == {"db-0", "db-1"} and await cluster_ready(cluster, 1)

    await cluster.until(two)  # db-2 waits for db-1
    first = next(p for p in await cluster.pods() if meta.key_of(p)[1] == "db-0")
    assert first["spec"]["hostname"] == "db-0"
    assert first["spec"]["subdomain"] == "db"
    assert meta.labels_of(first)["apps.kubernetes.io/pod-index"] == "0"
    held.clear()
    patch = {"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}}
    await cluster.client.patch(PODS, "db-1", "default", patch, subresource="status")
    await cluster.until(lambda: ready(cluster, 3))
    uid = meta.uid_of(first)
    await cluster.client.delete(PODS, "db-0", "default")

    async def again() -> bool:
        pods = {meta.key_of(p)[1]: p for p in await cluster.pods()}
        return "db-0" in pods and meta.uid_of(pods["db-0"]) != uid and await ready(cluster, 3)

    await cluster.until(again)
    await cluster.client.patch(STATEFUL_SETS, "db", "default", {"spec": {"replicas": 1}}, subresource="scale")
    await cluster.until(lambda: ready(cluster, 1))
    assert set(await images(cluster)) == {"db-0"}


async def cluster_ready(cluster: Cluster, count: int) -> bool:
    return bool((await status(cluster)).get("readyReplicas", 0) == count)


async def test_an_update_goes_from_the_last_to_the_partition(cluster: Cluster) -> None:
    await cluster.hosts.add("a")
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"partition": 2}}
    await cluster.client.create(STATEFUL_SETS, stateful(updateStrategy=strategy), "default")
    await cluster.until(lambda: ready(cluster, 3))
    template = {"spec": {"containers": [{"name": "c", "image": "new"}]}}
    await cluster.client.patch(STATEFUL_SETS, "db", "default", {"spec": {"template": template}})

    async def partly() -> bool:
        placed = await images(cluster) == {"db-0": "old", "db-1": "old", "db-2": "new"}
        return placed and await ready(cluster, 3) and (await status(cluster))["updatedReplicas"] == 1

    await cluster.until(partly)
    await cluster.client.delete(PODS, "db-0", "default")  # below the partition: made anew as it was

    await cluster.until(partly)
    rest = {"spec": {"updateStrategy": {"rollingUpdate": {"partition": 0}}}}
    await cluster.client.patch(STATEFUL_SETS, "db", "default", rest)

    async def through() -> bool:
        found = await status(cluster)
        done = found.get("currentRevision") == found.get("updateRevision") and found.get("updatedReplicas") == 3
        return bool(done) and set((await images(cluster)).values()) == {"new"}

    await cluster.until(through)
    revisions = (await cluster.client.list(CONTROLLER_REVISIONS, "default")).items
    assert sorted(r["revision"] for r in revisions) == [1, 2]


async def test_in_parallel_nobody_waits(cluster: Cluster) -> None:
    await cluster.hosts.add("a")
    cluster.hosts.outcome = lambda pod: "Pending"
    await cluster.client.create(STATEFUL_SETS, stateful(podManagementPolicy="Parallel"), "default")

    async def all_there() -> bool:
        return set(await images(cluster)) == {"db-0", "db-1", "db-2"}

    await cluster.until(all_there)


async def test_what_makes_identities_stays(cluster: Cluster) -> None:
    with pytest.raises(ApiError, match="volumes of storage providers"):
        claim = {"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"]}}
        await cluster.client.create(STATEFUL_SETS, stateful(volumeClaimTemplates=[claim]), "default")
    await cluster.client.create(STATEFUL_SETS, stateful(0), "default")
    with pytest.raises(ApiError, match="other than 'replicas'"):
        await cluster.client.patch(STATEFUL_SETS, "db", "default", {"spec": {"serviceName": "other"}})
