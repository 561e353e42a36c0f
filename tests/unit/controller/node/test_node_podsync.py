"""Pods of an API server on a host, from binding to deletion, and what each side may lose meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
from fake_guest import Script
from node_bench import PODS, Cluster, api_pod
from pod_bench import manifest

from hypervisor.errors import Unavailable


def reasons(cluster: Cluster) -> set[str]:
    return {obj["reason"] for (c, _, _), obj in cluster.server.objects.items() if c == "/api/v1/events"}


async def test_a_bound_pod_runs_is_reported_and_goes(cluster: Cluster) -> None:
    made = cluster.server.put(PODS, api_pod())
    async with cluster.node():
        await cluster.until(lambda: cluster.status().get("phase") == "Running")
        status = cluster.status()
        assert cluster.bench.pods.get("default", "p").stored.uid == made["metadata"]["uid"]
        assert status["hostIP"] == "127.0.0.9" and status["podIP"] and status["qosClass"] == "BestEffort"
        conditions = {c["type"]: c["status"] for c in status["conditions"]}
        assert conditions["Ready"] == conditions["Initialized"] == conditions["ContainersReady"] == "True"
        container = status["containerStatuses"][0]
        assert container["ready"] and container["started"] and container["state"]["running"]["startedAt"]
        assert container["containerID"].startswith("podvisor://")
        await cluster.until(lambda: {"Pulled", "Created", "Started"} <= reasons(cluster))
        cluster.delete()
        await cluster.until(lambda: cluster.pod() is None)
        assert not list(cluster.bench.pods)
        await cluster.until(lambda: "Killing" in reasons(cluster))
    reads = [p for m, p, _ in cluster.server.requests if m == "GET" and p.endswith("/status")]
    assert reads == []  # an API server does not let nodes read subresources
    for deletion in [b for m, _, b in cluster.server.requests if m == "DELETE"]:
        assert deletion["gracePeriodSeconds"] == 0 and deletion["preconditions"] == {"uid": made["metadata"]["uid"]}


async def test_events_of_an_image_are_those_of_kubernetes(cluster: Cluster) -> None:
    def container(name: str, policy: str) -> dict[str, Any]:
        return {"name": name, "image": "x:1", "imagePullPolicy": policy}

    cluster.bench.images.failures = [Unavailable("no route")]
    cluster.server.put(PODS, api_pod(containers=[container("a", "Always"), container("b", "IfNotPresent")]))
    async with cluster.node():
        await cluster.until(lambda: cluster.status().get("phase") == "Running")
        await cluster.until(lambda: "Started" in reasons(cluster))
        found = [o for (c, _, _), o in cluster.server.objects.items() if c == "/api/v1/events"]
    said = {
        (e["involvedObject"].get("fieldPath"), e["type"], e["reason"], e["message"].split(" in ")[0]) for e in found
    }
    a, b = "spec.containers{a}", "spec.containers{b}"
    assert {
        (a, "Normal", "Pulling", 'Pulling image "x:1"'),
        (a, "Warning", "Failed", 'Failed to pull image "x:1": no route'),
        (a, "Warning", "Failed", "Error: ErrImagePull"),
        (a, "Normal", "BackOff", 'Back-off pulling image "x:1"'),
        (a, "Warning", "Failed", "Error: ImagePullBackOff"),
        (a, "Normal", "Pulled", 'Successfully pulled image "x:1"'),
        (b, "Normal", "Pulled", 'Container image "x:1" already present on machine'),
    } <= said
    assert not any(path == b and reason == "Pulling" for path, _, reason, _ in said)


async def test_a_pod_is_ready_when_its_gates_are_open_too(cluster: Cluster) -> None:
    def condition(kind: str) -> dict[str, Any]:
        return next((c for c in cluster.status().get("conditions", ()) if c["type"] == kind), {})

    made = api_pod(readinessGates=[{"conditionType": "example.com/gate"}, {"conditionType": "example.com/other"}])
    cluster.server.put(PODS, made)
    async with cluster.node():
        await cluster.until(lambda: condition("ContainersReady").get("status") == "True")
        assert condition("Ready")["status"] == "False"
        assert (
            condition("Ready")["reason"] == "ReadinessGatesNotReady"
            and "example.com/other" in condition("Ready")["message"]
        )
        opened = [*cluster.status()["conditions"], {"type": "example.com/other", "status": "True"}]
        cluster.server.put(PODS, {**cluster.pod(), "status": {**cluster.status(), "conditions": opened}})  # type: ignore[dict-item]
        await cluster.until(lambda: condition("Ready").get("status") == "True")
        assert "reason" not in condition("Ready")
        shut = [
            c | ({"status": "False"} if c["type"] == "example.com/gate" else {}) for c in cluster.status()["conditions"]
        ]
        cluster.server.put(PODS, {**cluster.pod(), "status": {**cluster.status(), "conditions": shut}})  # type: ignore[dict-item]
        await cluster.until(lambda: condition("Ready").get("status") == "False")
        assert condition("ContainersReady")["status"] == "True"


async def test_only_differences_are_sent(cluster: Cluster) -> None:
    cluster.server.put(PODS, api_pod())
    async with cluster.node() as sync:
        await cluster.until(lambda: cluster.status().get("phase") == "Running")
        sent = len([1 for m, p, _ in cluster.server.requests if m == "PATCH" and p.endswith("p/status")])
        revision = sync.informer.store.get(("default", "p"))
        cluster.server.put(PODS, {**cluster.pod(), "metadata": cluster.pod()["metadata"] | {"labels": {"a": "b"}}})
        await cluster.until(lambda: sync.informer.store.get(("default", "p")) is not revision)
        cluster.server.put(PODS, api_pod("q"))
        await cluster.until(lambda: cluster.status("q").get("phase") == "Running")
    assert sent == len([1 for m, p, _ in cluster.server.requests if m == "PATCH" and p.endswith("p/status")])


async def test_a_status_that_others_changed_is_mended(cluster: Cluster) -> None:
    cluster.server.put(PODS, api_pod())
    async with cluster.node():
        await cluster.until(lambda: cluster.status().get("phase") == "Running")
        cluster.server.put(PODS, {**cluster.pod(), "status": {**cluster.status(), "phase": "Pending"}})
        await cluster.until(lambda: cluster.status().get("phase") == "Running")


@pytest.mark.parametrize(
    ("spec", "reason", "said"),
    [
        ({"hostNetwork": True}, "InvalidSpec", "spec.hostNetwork"),
        (
            {"containers": [{"name": "c", "image": "x", "resources": {"requests": {"memory": "64Gi"}}}]},
            "OutOfmemory",
            "memory",
        ),
        (
            {"containers": [{"name": "c", "image": "x", "resources": {"requests": {"cpu": "4096"}}}]},
            "OutOfcpu",
            "this host has",
        ),
    ],
)
async def test_what_cannot_run_has_failed_with_the_reason(
    cluster: Cluster, spec: dict[str, Any], reason: str, said: str
) -> None:
    cluster.server.put(PODS, api_pod(**spec))
    async with cluster.node():
        await cluster.until(lambda: cluster.status().get("phase") == "Failed")
        assert cluster.status()["reason"] == reason and said in cluster.status()["message"]
        cluster.delete()
        await cluster.until(lambda: cluster.pod() is None)
    assert cluster.bench.machines.started == []


async def test_a_name_that_is_taken_by_a_pod_of_this_host_only(cluster: Cluster) -> None:
    await cluster.bench.pods.create(manifest())
    cluster.server.put(PODS, api_pod())
    async with cluster.node():
        await cluster.until(lambda: cluster.status().get("reason") == "NameTaken")
    assert [p.stored.source for p in cluster.bench.pods] == ["api"]


async def test_a_pod_that_ended_is_reported_and_not_run_again(cluster: Cluster) -> None:
    cluster.bench.machines.scripts = [Script(ends={"c": [3]})]
    cluster.server.put(PODS, api_pod(policy="Never"))
    async with cluster.node():
        await cluster.until(lambda: cluster.status().get("phase") == "Failed")
        ended = cluster.status()["containerStatuses"][0]["state"]["terminated"]
        assert (ended["exitCode"], ended["reason"]) == (3, "Error")
        pod = cluster.bench.pods.get("default", "p")
        await pod.request_delete(0)
        await pod.gone.wait()
        cluster.server.put(PODS, {**cluster.pod(), "metadata": cluster.pod()["metadata"] | {"labels": {"a": "b"}}})
        cluster.server.put(PODS, api_pod("q"))
        await cluster.until(lambda: cluster.status("q").get("phase") == "Running")
    assert len(cluster.bench.machines.started) == 2


async def test_another_daemon_goes_on_with_the_same_pods(cluster: Cluster) -> None:
    cluster.server.put(PODS, api_pod("stays"))
    cluster.server.put(PODS, api_pod("goes"))
    async with cluster.node():
        await cluster.until(lambda: {cluster.status(n).get("phase") for n in ("stays", "goes")} == {"Running"})
    cluster.server.remove(PODS, "default", "goes")  # nobody listens
    await cluster.bench.restart()
    async with cluster.node():
        await cluster.until(lambda: [p.pod.name for p in cluster.bench.pods] == ["stays"])
        cluster.delete("stays", grace=0)
        await cluster.until(lambda: cluster.pod("stays") is None)
    assert len(cluster.bench.machines.started) == 2


async def test_another_pod_of_the_same_name_waits_for_the_first_to_go(cluster: Cluster) -> None:
    first = cluster.server.put(PODS, api_pod())
    async with cluster.node():
        await cluster.until(lambda: cluster.status().get("phase") == "Running")
        cluster.server.remove(PODS, "default", "p")
        second = cluster.server.put(PODS, api_pod())
        assert first["metadata"]["uid"] != second["metadata"]["uid"]
        await cluster.until(lambda: cluster.status().get("phase") == "Running")
        assert cluster.bench.pods.get("default", "p").stored.uid == second["metadata"]["uid"]


async def test_cut_off_pods_run_on_and_what_changed_meanwhile_is_done(cluster: Cluster) -> None:
    from aiohttp import web

    cluster.server.put(PODS, api_pod())
    cluster.server.put(PODS, api_pod("q"))
    async with cluster.node():
        await cluster.until(lambda: {cluster.status(n).get("phase") for n in ("p", "q")} == {"Running"})
        cluster.server.refuse = lambda _: web.Response(status=500)
        cluster.server.cut()
        cluster.server.remove(PODS, "default", "q")
        guest = cluster.bench.machines.started[0]
        pod = cluster.bench.pods.get("default", "p")
        assert pod.journal.record.phase == "Running" and not guest.silent
        cluster.server.forget()
        cluster.server.refuse = lambda _: None
        await cluster.until(lambda: [p.pod.name for p in cluster.bench.pods] == ["p"])
