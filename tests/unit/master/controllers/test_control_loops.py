"""Controllers and scheduler in a real master; only the hosts are stood in for."""

from __future__ import annotations

from typing import Any

import pytest
from whole_master import Cluster

from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import (
    CLUSTER_ROLES,
    CONFIG_MAPS,
    CONTROLLER_REVISIONS,
    DAEMON_SETS,
    DEPLOYMENTS,
    ENDPOINT_SLICES,
    EVENTS,
    JOBS,
    NAMESPACES,
    NODES,
    PODS,
    REPLICA_SETS,
    SERVICE_ACCOUNTS,
    SERVICES,
)


def template(app: str = "web", image: str = "i:1", **spec: Any) -> Object:
    return {"metadata": {"labels": {"app": app}}, "spec": {"containers": [{"name": "c", "image": image}], **spec}}


def deployment(name: str = "web", replicas: int = 3, **spec: Any) -> Object:
    spec = {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": template(), **spec}
    return {"metadata": {"name": name, "namespace": "default"}, "spec": spec}


async def available(cluster: Cluster, count: int, name: str = "web") -> Any:
    async def look() -> Any:
        found = await cluster.client.get(DEPLOYMENTS, name, "default")
        status = found.get("status") or {}
        done = status.get("observedGeneration") == found["metadata"]["generation"]
        done &= (
            status.get("availableReplicas", 0) == status.get("updatedReplicas", 0) == status.get("replicas", 0) == count
        )
        return found if done else None

    return await cluster.until(look)


async def test_a_deployment_is_rolled_out_updated_and_undone(cluster: Cluster) -> None:
    await cluster.hosts.add("a", "b")
    await cluster.client.create(DEPLOYMENTS, deployment(replicas=4), "default")
    first = await available(cluster, 4)
    assert meta.is_true(first, "Available")
    assert {meta.get(p, "spec", "nodeName") for p in await cluster.pods()} == {"a", "b"}
    patch = {"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "i:2"}]}}}}
    await cluster.client.patch(DEPLOYMENTS, "web", "default", patch, how="strategic")
    second = await available(cluster, 4)
    assert meta.get(second, "metadata", "annotations", "deployment.kubernetes.io/revision") == "2"
    assert {p["spec"]["containers"][0]["image"] for p in await cluster.pods()} == {"i:2"}
    back = {"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "i:1"}]}}}}
    await cluster.client.patch(DEPLOYMENTS, "web", "default", back, how="strategic")
    third = await available(cluster, 4)
    assert meta.get(third, "metadata", "annotations", "deployment.kubernetes.io/revision") == "3"
    sets = (await cluster.client.list(REPLICA_SETS, "default")).items
    assert sorted(rs["spec"]["replicas"] for rs in sets) == [0, 4]


async def test_a_deployment_is_scaled_and_its_deletion_takes_everything(cluster: Cluster) -> None:
    await cluster.hosts.add("a")
    await cluster.client.create(DEPLOYMENTS, deployment(replicas=2), "default")
    await available(cluster, 2)
    await cluster.client.patch(DEPLOYMENTS, "web", "default", {"spec": {"replicas": 5}})
    await available(cluster, 5)
    await cluster.client.patch(DEPLOYMENTS, "web", "default", {"spec": {"replicas": 1}})
    await available(cluster, 1)
    await cluster.client.delete(DEPLOYMENTS, "web", "default", propagation="Background")

    async def all_gone() -> bool:
        return not await cluster.pods() and not (await cluster.client.list(REPLICA_SETS, "default")).items

    await cluster.until(all_gone)


async def test_foreground_deletion_waits_and_orphans_stay(cluster: Cluster) -> None:
    await cluster.hosts.add("a")
    await cluster.client.create(DEPLOYMENTS, deployment(replicas=2), "default")
    await available(cluster, 2)
    await cluster.client.delete(DEPLOYMENTS, "web", "default", propagation="Orphan")
    await cluster.until(lambda: cluster.gone(DEPLOYMENTS, "web", "default"))
    (rs,) = (await cluster.client.list(REPLICA_SETS, "default")).items
    assert not meta.owners_of(rs)
    assert len(await cluster.pods()) == 2
    await cluster.client.delete(REPLICA_SETS, meta.key_of(rs)[1], "default", propagation="Foreground")
    await cluster.until(lambda: cluster.gone(REPLICA_SETS, meta.key_of(rs)[1], "default"))
    assert not await cluster.pods()


async def test_a_replica_set_replaces_adopts_and_releases(cluster: Cluster) -> None:
    await cluster.hosts.add("a")
    alone = {"metadata": {"name": "alone", "labels": {"app": "web"}}, "spec": template()["spec"]}
    await cluster.client.create(PODS, alone, "default")
    spec = {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": template()}
    await cluster.client.create(REPLICA_SETS, {"metadata": {"name": "rs"}, "spec": spec}, "default")

    async def two() -> Any:
        rs = await cluster.client.get(REPLICA_SETS, "rs", "default")
        return (rs.get("status") or {}).get("readyReplicas") == 2 and rs

    await cluster.until(two)
    names = {meta.key_of(p)[1] for p in await cluster.pods()}
    assert "alone" in names
    assert len(names) == 2
    await cluster.client.patch(PODS, "alone", "default", {"metadata": {"labels": {"app": "other"}}})

    async def released() -> Any:
        pod = await cluster.client.get(PODS, "alone", "default")
        return not meta.owners_of(pod) and len(await cluster.pods("app=web")) == 2

    await cluster.until(released)


async def test_a_daemon_set_is_on_every_node_that_takes_it(cluster: Cluster) -> None:
    await cluster.hosts.add("a", "b")
    await cluster.hosts.add("c", disk="ssd")
    await cluster.client.patch(NODES, "b", None, {"spec": {"taints": [{"key": "k", "effect": "NoSchedule"}]}})
    spec = {"selector": {"matchLabels": {"app": "web"}}, "template": template()}
    await cluster.client.create(DAEMON_SETS, {"metadata": {"name": "d"}, "spec": spec}, "default")

    async def on(nodes: set[str], image: str = "i:1") -> bool:
        pods = await cluster.pods()
        there = {meta.get(p, "spec", "nodeName") for p in pods if p["spec"]["containers"][0]["image"] == image}
        status = (await cluster.client.get(DAEMON_SETS, "d", "default")).get("status") or {}
        return there == nodes and status.get("numberAvailable") == status.get("updatedNumberScheduled") == len(nodes)

    await cluster.until(lambda: on({"a", "c"}))
    await cluster.client.patch(NODES, "b", None, {"spec": {"taints": None}})
    await cluster.until(lambda: on({"a", "b", "c"}))
    patch = {"spec": {"template": {"spec": {"nodeSelector": {"disk": "ssd"}}}}}
    await cluster.client.patch(DAEMON_SETS, "d", "default", patch)
    await cluster.until(lambda: on({"c"}))
    assert len((await cluster.client.list(CONTROLLER_REVISIONS, "default")).items) == 2


@pytest.mark.parametrize("mode", ["NonIndexed", "Indexed"])
async def test_a_job_runs_to_its_completions(cluster: Cluster, mode: str) -> None:
    await cluster.hosts.add("a")
    cluster.hosts.outcome = lambda pod: "Succeeded"
    spec = {"completions": 5, "parallelism": 2, "completionMode": mode, "template": template(restartPolicy="Never")}
    await cluster.client.create(JOBS, {"metadata": {"name": "j"}, "spec": spec}, "default")

    async def complete() -> Any:
        job = await cluster.client.get(JOBS, "j", "default")
        return meta.is_true(job, "Complete") and job

    job = await cluster.until(complete)
    assert job["status"]["succeeded"] == 5
    if mode == "Indexed":
        assert job["status"]["completedIndexes"] == "0-4"

    async def untracked() -> bool:
        return all(not meta.get(p, "metadata", "finalizers") for p in await cluster.pods())

    await cluster.until(untracked)
    assert len(await cluster.pods()) == 5


async def test_a_job_that_fails_too_often_has_failed(cluster: Cluster) -> None:
    await cluster.hosts.add("a")
    cluster.hosts.outcome = lambda pod: "Failed"
    spec = {"backoffLimit": 0, "template": template(restartPolicy="Never")}
    await cluster.client.create(JOBS, {"metadata": {"name": "j"}, "spec": spec}, "default")

    async def failed() -> Any:
        return meta.condition(await cluster.client.get(JOBS, "j", "default"), "Failed")

    assert (await cluster.until(failed))["reason"] == "BackoffLimitExceeded"


async def test_a_service_has_slices_that_follow_its_pods(cluster: Cluster) -> None:
    await cluster.hosts.add("a")
    await cluster.client.create(DEPLOYMENTS, deployment(replicas=2), "default")
    service = {
        "metadata": {"name": "s"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
    }
    await cluster.client.create(SERVICES, service, "default")

    async def ready(count: int) -> Any:
        own = "kubernetes.io/service-name=s"
        slices = (await cluster.client.list(ENDPOINT_SLICES, "default", label_selector=own)).items
        endpoints = [e for s in slices for e in s.get("endpoints") or () if e["conditions"]["ready"]]
        return len(endpoints) == count and slices

    (one,) = await cluster.until(lambda: ready(2))
    assert one["ports"] == [{"name": "", "port": 8080, "protocol": "TCP"}]
    await cluster.client.patch(DEPLOYMENTS, "web", "default", {"spec": {"replicas": 1}})
    await cluster.until(lambda: ready(1))
    await cluster.client.delete(SERVICES, "s", "default")

    async def gone() -> bool:
        own = "kubernetes.io/service-name=s"
        return not (await cluster.client.list(ENDPOINT_SLICES, "default", label_selector=own)).items

    await cluster.until(gone)


async def test_a_namespace_has_its_account_and_goes_with_all_that_is_in_it(cluster: Cluster) -> None:
    await cluster.hosts.add("a")
    await cluster.client.create(NAMESPACES, {"metadata": {"name": "team"}})
    await cluster.until(lambda: cluster.client.get(SERVICE_ACCOUNTS, "default", "team"))
    ca = await cluster.until(lambda: cluster.client.get(CONFIG_MAPS, "kube-root-ca.crt", "team"))
    assert ca["data"]["ca.crt"].startswith("-----BEGIN CERTIFICATE-----")
    made = deployment()
    made["metadata"]["namespace"] = "team"
    await cluster.client.create(DEPLOYMENTS, made, "team")
    await cluster.until(lambda: cluster.pods(namespace="team"))
    await cluster.client.delete(NAMESPACES, "team")
    await cluster.until(lambda: cluster.gone(NAMESPACES, "team"))
    assert not await cluster.pods(namespace="team")
    with pytest.raises(ApiError, match="not found"):
        await cluster.client.create(CONFIG_MAPS, {"metadata": {"name": "late"}}, "team")


async def test_why_a_pod_fits_nowhere_is_an_event(cluster: Cluster) -> None:
    await cluster.hosts.add("a", cpu="1")
    big = {"name": "c", "image": "i", "resources": {"requests": {"cpu": "3"}}}
    await cluster.client.create(PODS, {"metadata": {"name": "big"}, "spec": {"containers": [big]}}, "default")

    async def told() -> Any:
        events = (await cluster.client.list(EVENTS, "default")).items
        return [e["message"] for e in events if e["reason"] == "FailedScheduling"]

    assert "0/1 nodes are available: 1 Insufficient cpu." in await cluster.until(told)
    await cluster.hosts.add("b", cpu="4")

    async def bound() -> Any:
        return meta.get(await cluster.client.get(PODS, "big", "default"), "spec", "nodeName") == "b"

    await cluster.until(bound)


async def test_events_are_found_where_their_object_is(cluster: Cluster) -> None:
    await cluster.hosts.add("a")
    await cluster.client.create(NAMESPACES, {"metadata": {"name": "team"}})
    made = await cluster.client.create(DEPLOYMENTS, {**deployment(), "metadata": {"name": "web"}}, "team")

    async def told() -> Any:
        events = (await cluster.client.list(EVENTS, "team")).items
        about = {e["reason"]: e["involvedObject"] for e in events}
        return about if {"ScalingReplicaSet", "Scheduled"} <= set(about) else None

    about = await cluster.until(told)
    expected = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web", "namespace": "team"}
    assert about["ScalingReplicaSet"] == {**expected, "uid": meta.uid_of(made)}
    pod = await cluster.client.get(PODS, about["Scheduled"]["name"], "team")
    assert (about["Scheduled"]["kind"], about["Scheduled"]["uid"]) == ("Pod", meta.uid_of(pod))


async def test_a_pod_of_higher_priority_sends_others_away(cluster: Cluster) -> None:
    from hypervisor.kube.resources import PRIORITY_CLASSES

    await cluster.hosts.add("a", cpu="2")
    await cluster.client.create(PRIORITY_CLASSES, {"metadata": {"name": "high"}, "value": 1000})

    def pod(name: str, **spec: Any) -> Object:
        container = {"name": "c", "image": "i", "resources": {"requests": {"cpu": "2"}}}
        return {"metadata": {"name": name}, "spec": {"containers": [container], **spec}}

    await cluster.client.create(PODS, pod("low", terminationGracePeriodSeconds=0), "default")

    async def runs(name: str) -> Any:
        return meta.get(await cluster.client.get(PODS, name, "default"), "status", "phase") == "Running"

    await cluster.until(lambda: runs("low"))
    await cluster.client.create(PODS, pod("urgent", priorityClassName="high"), "default")
    await cluster.until(lambda: runs("urgent"))
    assert await cluster.gone(PODS, "low", "default")


async def test_pods_of_a_lost_node_are_replaced_and_not_doubled(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hypervisor.master.controllers import nodelifecycle

    await cluster.hosts.add("a", "b")
    tolerated = [
        {"key": f"node.kubernetes.io/{k}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0}
        for k in ("unreachable", "not-ready")
    ]
    await cluster.client.create(
        DEPLOYMENTS, deployment(replicas=2, template=template(tolerations=tolerated)), "default"
    )
    await available(cluster, 2)
    cluster.hosts.silent.add("b")
    lost = [{"type": "Ready", "status": "Unknown", "lastTransitionTime": meta.now(), "reason": "NodeStatusUnknown"}]
    await cluster.client.patch(NODES, "b", None, {"status": {"conditions": lost}}, subresource="status")

    async def moved() -> Any:
        pods = await cluster.pods()
        running = [p for p in pods if not meta.is_deleting(p)]
        return len(running) == 2 and all(meta.get(p, "spec", "nodeName") == "a" for p in running) and pods

    pods = await cluster.until(moved)
    stuck = [p for p in pods if meta.is_deleting(p)]
    assert [meta.get(p, "spec", "nodeName") for p in stuck] == ["b"]
    node = await cluster.client.get(NODES, "b")
    assert {t["key"] for t in node["spec"]["taints"]} == {nodelifecycle.UNREACHABLE}
    await cluster.client.delete(NODES, "b")

    async def cleared() -> bool:
        return len(await cluster.pods()) == 2

    await cluster.until(cleared)


async def test_a_role_that_aggregates_shows_what_it_allows(cluster: Cluster) -> None:
    rule = {"verbs": ["get"], "apiGroups": ["example.org"], "resources": ["things"]}
    labels = {"rbac.authorization.k8s.io/aggregate-to-view": "true"}
    part = {"metadata": {"name": "things", "labels": labels}, "rules": [rule]}
    await cluster.client.create(CLUSTER_ROLES, part)

    async def shown(name: str) -> bool:
        role = await cluster.client.get(CLUSTER_ROLES, name)
        return any(r["apiGroups"] == ["example.org"] for r in role["rules"])

    for name in ("view", "edit", "admin"):  # each takes in the one before
        await cluster.until(lambda name=name: shown(name))  # type: ignore[misc]
    await cluster.client.delete(CLUSTER_ROLES, "things")

    async def gone() -> bool:
        return not await shown("admin") and not await shown("view")

    await cluster.until(gone)
