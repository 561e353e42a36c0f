"""Columns: what `kubectl get` prints of each kind."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from objects_of_kinds import LEAST, made

from hypervisor.kube import resources as r
from hypervisor.master.kinds.cells import human, listed, selector
from hypervisor.master.kinds.pod_columns import ready, restarts, status
from hypervisor.master.kinds.table import KINDS

Obj = dict[str, Any]


def ago(**delta: int) -> str:
    return (datetime.now(UTC) - timedelta(**delta)).strftime("%Y-%m-%dT%H:%M:%SZ")


def row(resource: Any, obj: Obj, *, wide: bool = False) -> dict[str, Any]:
    return {c.name: c.value(obj) for c in KINDS.of(resource).columns if wide or not c.priority}


@pytest.mark.parametrize("resource", list(LEAST), ids=lambda r: r.qualified)
def test_every_column_of_every_kind_has_a_cell(resource: Any) -> None:
    for obj in (made(resource), {"metadata": {"name": "a"}}):
        assert all(
            isinstance(cell, (str, int, bool)) for cell in row(resource, obj, wide=True).values() if cell is not None
        )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "<invalid>"),
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (125, "2m5s"),
        (600, "10m"),
        (10799, "179m"),
        (10800, "3h"),
        (11100, "3h5m"),
        (28800, "8h"),
        (172799, "47h"),
        (172800, "2d"),
        (176400, "2d1h"),
        (691200, "8d"),
        (63072000, "2y"),
        (66000000, "2y33d"),
        (252288000, "8y"),
    ],
)
def test_durations(seconds: int, text: str) -> None:
    assert human(seconds) == text


def container(name: str = "c", *, restarts: int = 0, ready: bool = False, last: str = "", **state: Obj) -> Obj:
    made: Obj = {"name": name, "restartCount": restarts, "ready": ready, "state": state}
    return made | ({"lastState": {"terminated": {"finishedAt": last}}} if last else {})


def pod(phase: str, *containers: Obj, init: tuple[Obj, ...] = (), sidecar: bool = False, **more: Any) -> Obj:
    inits = [{"name": s["name"]} | ({"restartPolicy": "Always"} if sidecar else {}) for s in init]
    return {
        "metadata": more.pop("metadata", {}),
        "spec": {"containers": [{"name": c["name"]} for c in containers] or [{"name": "c"}], "initContainers": inits},
        "status": {"phase": phase, "containerStatuses": list(containers), "initContainerStatuses": list(init)} | more,
    }


RUNNING: Obj = {"running": {}}
DONE: Obj = {"terminated": {"exitCode": 0, "reason": "Completed"}}
READY = {"type": "Ready", "status": "True"}
DELETED = {"deletionTimestamp": "2024-01-01T00:00:00Z"}
PODS: list[tuple[Obj, str, str]] = [
    (pod("Pending"), "0/1", "Pending"),
    (pod("Pending", container(waiting={"reason": "ContainerCreating"})), "0/1", "ContainerCreating"),
    (pod("Running", container(ready=True, **RUNNING), conditions=[READY]), "1/1", "Running"),
    (pod("Running", container(waiting={"reason": "CrashLoopBackOff"})), "0/1", "CrashLoopBackOff"),
    (pod("Failed", container(terminated={"exitCode": 1, "reason": "Error"})), "0/1", "Error"),
    (pod("Failed", container(terminated={"exitCode": 3})), "0/1", "ExitCode:3"),
    (pod("Failed", container(terminated={"exitCode": 137, "signal": 9})), "0/1", "Signal:9"),
    (pod("Succeeded", container(**DONE)), "0/1", "Completed"),
    (pod("Running", container(**DONE), container("d", ready=True, **RUNNING), conditions=[READY]), "1/2", "Running"),
    (pod("Running", container(**DONE), container("d", ready=True, **RUNNING)), "1/2", "NotReady"),
    (pod("Running", container(ready=True, **RUNNING), metadata=DELETED), "1/1", "Terminating"),
    (pod("Succeeded", container(**DONE), metadata=DELETED), "0/1", "Completed"),
    (pod("Running", reason="NodeLost", metadata=DELETED), "0/1", "Unknown"),
    (pod("Failed", reason="Evicted"), "0/1", "Evicted"),
    (pod("Pending", init=(container("i", **RUNNING),)), "0/1", "Init:0/1"),
    (pod("Pending", init=(container("i", waiting={"reason": "ImagePullBackOff"}),)), "0/1", "Init:ImagePullBackOff"),
    (pod("Pending", init=(container("i", terminated={"exitCode": 2, "reason": "Error"}),)), "0/1", "Init:Error"),
    (
        pod("Pending", container(waiting={"reason": "PodInitializing"}), init=(container("i", **DONE),)),
        "0/1",
        "PodInitializing",
    ),
    (
        pod(
            "Running",
            container(ready=True, **RUNNING),
            init=(container("i", ready=True, **RUNNING) | {"started": True},),
            sidecar=True,
        ),
        "2/2",
        "Running",
    ),
    (
        pod("Pending", conditions=[{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]),
        "0/1",
        "SchedulingGated",
    ),
]


@pytest.mark.parametrize(("obj", "shown_ready", "shown_status"), PODS, ids=[f"{n}-{p[2]}" for n, p in enumerate(PODS)])
def test_pods(obj: Obj, shown_ready: str, shown_status: str) -> None:
    assert (ready(obj), status(obj)) == (shown_ready, shown_status)


def test_restarts() -> None:
    assert restarts(pod("Running", container(restarts=0, **RUNNING))) == "0"
    assert restarts(pod("Running", container(restarts=3, last=ago(minutes=5), **RUNNING))) in (
        "3 (5m ago)",
        "3 (5m1s ago)",
    )


def test_restarts_of_init_containers_count_until_they_are_done() -> None:
    init = container("i", restarts=2, waiting={"reason": "CrashLoopBackOff"})
    assert restarts(pod("Pending", init=(init,))) == "2"
    assert restarts(pod("Running", container(ready=True, **RUNNING), init=(container("i", restarts=2, **DONE),))) == "0"


def test_nodes() -> None:
    node = {
        "metadata": {"name": "n", "labels": {"node-role.kubernetes.io/worker": ""}, "creationTimestamp": ago(days=3)},
        "spec": {"unschedulable": True},
        "status": {
            "conditions": [READY],
            "nodeInfo": {"kubeletVersion": "v1.37"},
            "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}],
        },
    }
    found = row(r.NODES, node, wide=True)
    assert found["Status"] == "Ready,SchedulingDisabled"
    assert (found["Roles"], found["Version"], found["Internal-IP"], found["External-IP"]) == (
        "worker",
        "v1.37",
        "10.0.0.1",
        "<none>",
    )
    assert found["Age"].startswith("3d")


def test_workloads() -> None:
    deployment = made(r.DEPLOYMENTS) | {"status": {"readyReplicas": 1, "updatedReplicas": 1, "availableReplicas": 1}}
    found = row(r.DEPLOYMENTS, deployment, wide=True)
    assert (found["Ready"], found["Up-to-date"], found["Available"]) == ("1/1", 1, 1)
    assert (found["Containers"], found["Images"], found["Selector"]) == ("c", "nginx:1", "app=a")
    job = made(r.JOBS) | {
        "status": {
            "succeeded": 1,
            "startTime": "2024-01-01T00:00:00Z",
            "completionTime": "2024-01-01T00:02:05Z",
            "conditions": [{"type": "Complete", "status": "True"}],
        }
    }
    found = row(r.JOBS, job)
    assert (found["Status"], found["Completions"], found["Duration"]) == ("Complete", "1/1", "2m5s")


def test_services_events_and_requests() -> None:
    service = made(
        r.SERVICES, spec={"type": "NodePort", "clusterIP": "10.0.0.9", "ports": [{"port": 80, "nodePort": 30000}]}
    )
    found = row(r.SERVICES, service)
    assert (found["Type"], found["Cluster-IP"], found["External-IP"], found["Port(s)"]) == (
        "NodePort",
        "10.0.0.9",
        "<none>",
        "80:30000/TCP",
    )
    event = {
        "involvedObject": {"kind": "Pod", "name": "p"},
        "type": "Normal",
        "reason": "R",
        "message": " m\n",
        "lastTimestamp": ago(seconds=30),
    }
    found = row(r.EVENTS, event)
    assert (found["Object"], found["Message"], found["Reason"]) == ("pod/p", "m", "R")
    assert found["Last Seen"] in ("30s", "31s")
    csr = made(r.CSRS) | {"status": {"conditions": [{"type": "Approved"}], "certificate": "eA=="}}
    assert row(r.CSRS, csr)["Condition"] == "Approved,Issued"


def test_selectors_and_lists() -> None:
    rules = [{"key": "k", "operator": "In", "values": ["b", "a"]}, {"key": "x", "operator": "DoesNotExist"}]
    assert selector({"matchLabels": {"a": "b"}, "matchExpressions": rules}) == "a=b,k in (a,b),!x"
    assert selector(None) == "<none>"
    assert listed(["a", "b", "c", "d", "e"], 3) == "a,b,c + 2 more..."
