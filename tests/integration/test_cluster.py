"""A cluster of two hosts on this machine, driven by the real kubectl: a pod in a VM on each host."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

import pytest
from local_cluster import Cluster, running_cluster

from hypervisor.cli.cluster_state import MASTER

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.slow]

UP_WITHIN = 15.0  # seconds until every node is Ready: what docs/cluster.md promises
POD = """
apiVersion: v1
kind: Pod
metadata: {name: on-%(host)s}
spec:
  nodeName: %(host)s
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: localhost/podvisor/busybox
    command: [sh, -c, 'echo hello from %(host)s; exec sleep 1000']
    resources: {limits: {memory: 64Mi}}
---
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(("busybox",), within=UP_WITHIN) as made:
        yield made


@pytest.fixture(scope="module")
def pods(cluster: Cluster) -> Cluster:
    manifest = "".join(POD % {"host": host} for host in ("host-1", "host-2"))
    cluster.kubectl("apply", "-f", "-", stdin=manifest)
    cluster.kubectl("wait", "--for=condition=Ready", "pod/on-host-1", "pod/on-host-2", "--timeout=80s")
    return cluster


def test_status_and_hosts(cluster: Cluster) -> None:
    status = json.loads(cluster.hv("cluster", "status", "-o", "json"))
    assert [(c["name"], c["ready"]) for c in status["components"]] == [(n, True) for n in (MASTER, "host-1", "host-2")]
    assert cluster.hv("host", "ls", "-o", "name").split() == ["host-1", "host-2"]
    assert "master serves" in cluster.hv("cluster", "logs")
    before = status["components"]
    cluster.hv("cluster", "up")
    assert json.loads(cluster.hv("cluster", "status", "-o", "json"))["components"] == before


@pytest.mark.parametrize("host", ["host-1", "host-2"])
def test_a_pod_on_each_host(pods: Cluster, host: str) -> None:
    kernel = pods.kubectl("exec", f"on-{host}", "--", "uname", "-r")
    assert kernel.strip() != os.uname().release
    assert pods.kubectl("logs", f"on-{host}") == f"hello from {host}\n"
    phases = pods.kubectl("get", "pod", f"on-{host}", "-o", "jsonpath={.status.phase} {.spec.nodeName}")
    assert phases == f"Running {host}"


@pytest.mark.parametrize(
    "verb",
    [
        ("delete", "pod", "on-host-2"),
        ("label", "node", "host-2", "a=b"),
        ("get", "secrets"),
        ("label", "node", "host-1", "node-restriction.kubernetes.io/a=b"),
        ("patch", "pod", "on-host-2", "--subresource=status", "-p", '{"status":{"message":"mine"}}'),
    ],
)
def test_a_node_is_kept_to_itself(pods: Cluster, verb: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError, match=r"[Ff]orbidden"):
        pods.kubectl(*verb, config=pods.paths.node_kubeconfig("host-1"))


def test_everything_is_there_after_kill_9_of_everything(pods: Cluster) -> None:
    pods.kubectl("create", "configmap", "kept", "--from-literal=a=b")
    pods.kill_everything()
    pods.hv("cluster", "up")
    assert pods.kubectl("get", "configmap", "kept", "-o", "jsonpath={.data.a}") == "b"
    pods.kubectl("wait", "--for=condition=Ready", "pod/on-host-1", "pod/on-host-2", "--timeout=80s")
    deadline = time.monotonic() + 60
    while True:  # Ready may still be what the node said before it was killed
        try:
            assert "on-host-1" in pods.kubectl("exec", "on-host-1", "--", "hostname")
            break
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def test_drain_and_delete(pods: Cluster) -> None:
    pods.hv("host", "drain", "host-2", "--force")
    assert "SchedulingDisabled" in pods.hv("host", "ls")
    pods.kubectl("delete", "pod", "on-host-1", "--timeout=40s")
    assert pods.kubectl("get", "pods", "-o", "name") == ""
    for host in ("host-1", "host-2"):
        folder = pods.paths.host(host) / "pods"
        deadline = time.monotonic() + 20
        while any(folder.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(folder.iterdir())
