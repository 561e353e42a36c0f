"""A cluster whose objects are in a real etcd, driven by the official Python client."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes import client, config, utils, watch
from local_cluster import Cluster, running_cluster

sys.path.append(str(Path(__file__).parents[1] / "unit/master"))
from etcd_server import EtcdServer

from hypervisor.cli.cluster_state import MASTER

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.slow]

MANIFEST = """
apiVersion: v1
kind: ConfigMap
metadata: {name: made}
data: {a: b}
---
apiVersion: v1
kind: Pod
metadata: {name: made}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: c, image: localhost/podvisor/busybox, command: [sleep, "1000"], resources: {limits: {memory: 32Mi}}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    etcd = EtcdServer(tmp_path_factory.mktemp("etcd"))
    etcd.start()
    try:
        with running_cluster(("busybox",), "--store", f"etcd:{etcd.url}") as made:
            yield made
    finally:
        etcd.kill()


@pytest.fixture(scope="module")
def api(cluster: Cluster) -> client.CoreV1Api:
    config.load_kube_config(str(cluster.paths.kubeconfig))
    return client.CoreV1Api()


def test_objects_of_a_file_and_their_watch(cluster: Cluster, api: client.CoreV1Api, tmp_path: Path) -> None:
    (tmp_path / "made.yaml").write_text(MANIFEST)
    before = api.list_namespaced_pod("default").metadata.resource_version
    utils.create_from_yaml(client.ApiClient(), str(tmp_path / "made.yaml"))
    phases = []
    events = watch.Watch().stream(api.list_namespaced_pod, "default", resource_version=before, timeout_seconds=60)
    for event in events:
        phases.append(event["object"].status.phase)
        if phases[-1] == "Running":
            break
    assert phases[0] == "Pending"
    assert phases[-1] == "Running"
    assert api.read_namespaced_config_map("made", "default").data == {"a": "b"}
    assert api.read_namespaced_pod("made", "default").spec.node_name in {n.metadata.name for n in api.list_node().items}


def test_everything_is_there_after_the_master_was_killed(cluster: Cluster, api: client.CoreV1Api) -> None:
    process = cluster.paths.process(MASTER)
    assert process is not None
    process.kill()
    deadline = time.monotonic() + 10
    while cluster.paths.process(MASTER) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    cluster.hv("cluster", "up")
    assert [p.metadata.name for p in api.list_namespaced_pod("default").items] == ["made"]
    assert cluster.hv("exec", "made", "--", "echo", "there") == "there\n"
    with pytest.raises(AssertionError, match="etcdctl snapshot"):
        cluster.hv("cluster", "backup", "/dev/null")
