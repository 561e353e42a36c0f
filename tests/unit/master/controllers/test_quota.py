"""Quotas and limit ranges: what they give, what they refuse, what they tell."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from whole_master import Cluster

from hypervisor.kube import meta
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import CONFIG_MAPS, LIMIT_RANGES, PODS, RESOURCE_QUOTAS, SERVICE_ACCOUNTS, SERVICES


def pod(name: str, **resources: Any) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"containers": [{"name": "c", "image": "i", "resources": resources}]}}


async def quota(cluster: Cluster, hard: dict[str, str], **spec: Any) -> None:
    await cluster.until(lambda: cluster.client.get(SERVICE_ACCOUNTS, "default", "default"))
    await cluster.client.create(RESOURCE_QUOTAS, {"metadata": {"name": "q"}, "spec": {"hard": hard, **spec}}, "default")
    await cluster.until(lambda: used(cluster))


async def used(cluster: Cluster) -> dict[str, str]:
    found = await cluster.client.get(RESOURCE_QUOTAS, "q", "default")
    return dict(meta.get(found, "status", "used", default={}))


async def refused(cluster: Cluster, body: dict[str, Any], resource: Any = PODS) -> str:
    with pytest.raises(ApiError) as caught:
        await cluster.client.create(resource, body, "default")
    assert caught.value.reason == "Forbidden"
    return str(caught.value)


async def test_many_at_once_do_not_get_past_a_quota(cluster: Cluster) -> None:
    await quota(cluster, {"pods": "3", "requests.cpu": "1", "limits.memory": "512Mi"})
    given = {"requests": {"cpu": "100m"}, "limits": {"memory": "64Mi"}}
    made = await asyncio.gather(
        *(cluster.client.create(PODS, pod(f"p{n}", **given), "default") for n in range(8)), return_exceptions=True
    )
    assert sum(isinstance(m, dict) for m in made) == 3
    assert {str(m.reason) for m in made if isinstance(m, ApiError)} == {"Forbidden"}

    async def told() -> bool:
        return await used(cluster) == {"pods": "3", "requests.cpu": "300m", "limits.memory": "192Mi"}

    await cluster.until(told)
    said = await refused(cluster, pod("more", **given))
    assert "exceeded quota: q, requested: pods=1, used: pods=3, limited: pods=3" in said
    gone = next(m for m in made if isinstance(m, dict))
    await cluster.client.delete(PODS, gone["metadata"]["name"], "default", grace_s=0)
    await cluster.until(lambda: cluster.client.create(PODS, pod("more", **given), "default"))


async def test_what_a_quota_must_know(cluster: Cluster) -> None:
    await quota(cluster, {"limits.memory": "1Gi", "requests.cpu": "1"})
    assert "must specify limits.memory for: c; requests.cpu for: c" in await refused(cluster, pod("bare"))
    big = {"requests": {"cpu": "2"}, "limits": {"memory": "64Mi"}}
    assert "requested: requests.cpu=2, used: requests.cpu=0, limited: requests.cpu=1" in await refused(
        cluster, pod("big", **big)
    )


async def test_objects_are_counted(cluster: Cluster) -> None:
    await quota(cluster, {"configmaps": "2", "count/services": "1", "services.nodeports": "0"})
    await cluster.until(lambda: cluster.client.get(CONFIG_MAPS, "kube-root-ca.crt", "default"))
    await cluster.client.create(CONFIG_MAPS, {"metadata": {"name": "a"}}, "default")
    assert "used: configmaps=2" in await refused(cluster, {"metadata": {"name": "b"}}, CONFIG_MAPS)
    service = {"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}}
    assert "count/services=1" in await refused(cluster, service, SERVICES)  # default/kubernetes is one


async def test_scopes(cluster: Cluster) -> None:
    await quota(cluster, {"pods": "0"}, scopes=["BestEffort"])
    await refused(cluster, pod("any"))
    assert await cluster.client.create(PODS, pod("some", requests={"cpu": "1m"}), "default")


async def test_a_limit_range_completes_and_refuses(cluster: Cluster) -> None:
    await cluster.until(lambda: cluster.client.get(SERVICE_ACCOUNTS, "default", "default"))
    row = {
        "type": "Container",
        "default": {"memory": "128Mi"},
        "defaultRequest": {"cpu": "50m"},
        "min": {"cpu": "10m"},
        "max": {"memory": "256Mi"},
    }
    of_pods = {"type": "Pod", "max": {"memory": "300Mi"}}
    body = {"metadata": {"name": "r"}, "spec": {"limits": [row, of_pods]}}
    await cluster.client.create(LIMIT_RANGES, body, "default")
    made = await cluster.client.create(PODS, pod("bare"), "default")
    assert made["spec"]["containers"][0]["resources"] == {
        "limits": {"memory": "128Mi"},
        "requests": {"memory": "128Mi", "cpu": "50m"},
    }
    own = await cluster.client.create(PODS, pod("own", limits={"memory": "64Mi"}), "default")
    assert own["spec"]["containers"][0]["resources"]["limits"] == {"memory": "64Mi"}
    assert "maximum memory usage per Container" in await refused(cluster, pod("big", limits={"memory": "1Gi"}))
    assert "minimum cpu usage" in await refused(cluster, pod("small", requests={"cpu": "1m"}))
    two = pod("two", limits={"memory": "200Mi"})
    two["spec"]["containers"].append({**two["spec"]["containers"][0], "name": "d"})
    assert "maximum memory usage per Pod is 300Mi" in await refused(cluster, two)


async def test_bad_ones_are_refused(cluster: Cluster) -> None:
    for resource, spec in (
        (RESOURCE_QUOTAS, {"hard": {"pods": "-1"}}),
        (RESOURCE_QUOTAS, {"hard": {}, "scopes": ["Odd"]}),
        (LIMIT_RANGES, {"limits": [{"type": "Container", "min": {"cpu": "2"}, "max": {"cpu": "1"}}]}),
        (LIMIT_RANGES, {"limits": [{"type": "Node"}]}),
    ):
        with pytest.raises(ApiError) as caught:
            await cluster.client.create(resource, {"metadata": {"name": "x"}, "spec": spec}, "default")
        assert caught.value.code in (400, 422), spec
