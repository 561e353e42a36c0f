"""Static pods are shown at the API server, and only shown."""

from __future__ import annotations

from typing import Any

import pytest
from fake_guest import Script
from node_bench import PODS, Cluster
from pod_bench import manifest

from hypervisor.controller.node.mirrors import NodePods
from hypervisor.errors import NotFound

NAME = "web-n1"


@pytest.fixture(autouse=True)
def node(cluster: Cluster) -> None:
    cluster.server.put("/api/v1/nodes", {"metadata": {"name": "n1"}})


async def static_pod(cluster: Cluster, **spec: Any) -> Any:
    made = manifest("web", "Always", **spec)
    made["metadata"] |= {"labels": {"app": "web"}}
    return await cluster.bench.pods.create(made, source="file:web.yaml")


async def test_a_static_pod_has_a_mirror_that_follows_it(cluster: Cluster) -> None:
    cluster.bench.machines.scripts = [Script()]
    pod = await static_pod(cluster)
    async with cluster.node():
        await cluster.until(lambda: cluster.status(NAME).get("phase") == "Running")
        mirror = cluster.pod(NAME)
        assert mirror is not None
        assert mirror["metadata"]["annotations"]["kubernetes.io/config.mirror"] == pod.stored.uid
        assert mirror["metadata"]["annotations"]["kubernetes.io/config.source"] == "file"
        assert mirror["metadata"]["labels"] == {"app": "web"}
        assert mirror["metadata"]["ownerReferences"][0]["kind"] == "Node"
        assert mirror["spec"]["nodeName"] == "n1" and cluster.status(NAME)["hostIP"] == "127.0.0.9"
        await cluster.until(lambda: any(e["involvedObject"]["uid"] == pod.stored.uid for e in events(cluster)))
        assert {e["involvedObject"]["name"] for e in events(cluster)} == {NAME}
        await pod.request_delete(0)
        await cluster.until(lambda: cluster.pod(NAME) is None)
    assert len(cluster.bench.machines.started) == 1


def events(cluster: Cluster) -> list[Any]:
    return [obj for (c, _, _), obj in cluster.server.objects.items() if c == "/api/v1/events"]


async def test_a_deleted_mirror_is_made_again_and_the_pod_runs_on(cluster: Cluster) -> None:
    pod = await static_pod(cluster)
    async with cluster.node():
        await cluster.until(lambda: cluster.status(NAME).get("phase") == "Running")
        first = cluster.pod(NAME)
        assert first is not None
        cluster.delete(NAME)
        await cluster.until(
            lambda: cluster.pod(NAME) and cluster.pod(NAME)["metadata"]["uid"] != first["metadata"]["uid"]
        )  # type: ignore[index]
        await cluster.until(lambda: cluster.status(NAME).get("phase") == "Running")
    assert pod.journal.record.intent.kind == "run" and len(cluster.bench.machines.started) == 1


async def test_a_mirror_whose_static_pod_is_gone_or_another_goes(cluster: Cluster) -> None:
    stale = {"metadata": {"name": NAME, "namespace": "default", "annotations": {"kubernetes.io/config.mirror": "old"}}}
    orphan = {
        "metadata": {"name": "gone-n1", "namespace": "default", "annotations": {"kubernetes.io/config.mirror": "x"}}
    }
    for one in (stale, orphan):
        cluster.server.put(PODS, one | {"spec": {"nodeName": "n1"}})
    pod = await static_pod(cluster)
    async with cluster.node():
        await cluster.until(lambda: cluster.pod("gone-n1") is None)
        await cluster.until(lambda: cluster.status(NAME).get("phase") == "Running")
        mirror = cluster.pod(NAME)
        assert mirror is not None
        assert mirror["metadata"]["annotations"]["kubernetes.io/config.mirror"] == pod.stored.uid
    assert [p.pod.name for p in cluster.bench.pods] == ["web"]


async def test_the_nodes_server_finds_it_by_the_mirrors_name(cluster: Cluster) -> None:
    pod = await static_pod(cluster)
    named = NodePods(cluster.bench.pods, "n1")
    assert named.get("default", NAME) is pod and named.get("default", "web") is pod
    assert named.find("default", NAME).containers == ("c",)
    await cluster.bench.create("other")
    with pytest.raises(NotFound):
        named.get("default", "other-n1")  # no static pod
