"""What a user of a cluster sees over a day, on two hosts with the real kubectl: rolling updates, hosts lost and back.

The tests go in their order; each leaves the Deployment at six replicas.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for
from local_cluster import KUBECTL, Cluster, running_cluster

from hypervisor.cli.cluster_state import MASTER

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.slow]

REPLICAS = 6
SMALL = "resources: {limits: {memory: 32Mi}}"
FOREVER = """command: [sh, -c, 'trap "exit 0" TERM; while :; do sleep 1 & wait $!; done']"""
DEPLOYMENT = f"""
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web, annotations: {{kubernetes.io/change-cause: first}}}}
spec:
  replicas: {REPLICAS}
  strategy: {{rollingUpdate: {{maxUnavailable: 1, maxSurge: 2}}}}
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      terminationGracePeriodSeconds: 1
      tolerations:
      - {{key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 1}}
      - {{key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute, tolerationSeconds: 1}}
      containers:
      - {{name: c, image: localhost/podvisor/busybox, {SMALL}, {FOREVER}}}
"""
OTHERS = f"""
apiVersion: v1
kind: ConfigMap
metadata: {{name: live}}
data: {{word: one}}
---
apiVersion: v1
kind: Pod
metadata: {{name: live}}
spec:
  nodeName: host-1
  terminationGracePeriodSeconds: 1
  containers:
  - {{name: c, image: localhost/podvisor/busybox, {SMALL}, {FOREVER}, volumeMounts: [{{name: v, mountPath: /live}}]}}
  volumes: [{{name: v, configMap: {{name: live}}}}]
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {{name: every}}
spec:
  selector: {{matchLabels: {{app: every}}}}
  template:
    metadata: {{labels: {{app: every}}}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{{name: c, image: localhost/podvisor/busybox, {SMALL}, {FOREVER}}}]
---
apiVersion: batch/v1
kind: Job
metadata: {{name: sum}}
spec:
  completions: 3
  parallelism: 2
  template:
    spec:
      restartPolicy: Never
      containers:
      - {{name: c, image: localhost/podvisor/busybox, {SMALL}, command: [sh, -c, 'echo summed on $(uname -r)']}}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(("busybox", "web"), "--node-grace-seconds", "14") as made:
        made.kubectl("apply", "-f", "-", stdin=OTHERS)
        yield made


def listed(cluster: Cluster, *args: str) -> list[dict[str, Any]]:
    return list(json.loads(cluster.kubectl("get", *args, "-o", "json"))["items"])


def is_ready(pod: dict[str, Any]) -> bool:
    conditions = {c["type"]: c["status"] for c in pod["status"].get("conditions", ())}
    return conditions.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]


def ready_on(cluster: Cluster) -> Counter[str]:
    """Ready pods of the Deployment by host."""
    return Counter(pod["spec"]["nodeName"] for pod in listed(cluster, "pods", "-l", "app=web") if is_ready(pod))


def settled(cluster: Cluster) -> bool:
    """Six pods, all Ready, and no VM on any host that is not one of the cluster's pods."""
    pods = listed(cluster, "pods", "-l", "app=web")
    known = {pod["metadata"]["uid"] for pod in listed(cluster, "pods")}
    there = {uid for name in ("host-1", "host-2") for uid in uids_on(cluster, name)}
    return len(pods) == REPLICAS and all(map(is_ready, pods)) and there <= known


def uids_on(cluster: Cluster, host: str) -> set[str]:
    """Pods that a host's own daemon has."""
    items = json.loads(cluster.hv("--host", host, "ps", "-o", "json"))["items"]
    return {pod["metadata"]["uid"] for pod in items}


class Watch:
    """The Deployment's available and present replicas, as they change."""

    def __init__(self, cluster: Cluster) -> None:
        path = "jsonpath={.status.availableReplicas} {.status.replicas}{'\\n'}"
        command = [
            str(KUBECTL),
            "--kubeconfig",
            str(cluster.paths.kubeconfig),
            "get",
            "deploy",
            "web",
            "-w",
            "-o",
            path,
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)

    def end(self) -> list[tuple[int, int]]:
        self._process.terminate()
        output = self._process.communicate(timeout=10)[0]
        return [(int(a or 0), int(b or 0)) for a, _, b in (line.partition(" ") for line in output.splitlines())]


def test_a_deployment_runs_on_both_hosts(cluster: Cluster) -> None:
    cluster.kubectl("apply", "-f", "-", stdin=DEPLOYMENT)
    cluster.kubectl("rollout", "status", "deploy/web", "--timeout=60s")
    assert set(ready_on(cluster)) == {"host-1", "host-2"}


def test_a_job_and_a_daemon_set_run(cluster: Cluster) -> None:
    cluster.kubectl("wait", "--for=condition=Complete", "job/sum", "--timeout=60s")
    cluster.kubectl("rollout", "status", "ds/every", "--timeout=60s")
    logs = cluster.kubectl("logs", "-l", "job-name=sum").splitlines()
    assert len(logs) == 3
    assert f"summed on {os.uname().release}" not in logs, "they ran in VMs"
    assert {p["spec"]["nodeName"] for p in listed(cluster, "pods", "-l", "app=every")} == {"host-1", "host-2"}


def test_a_pods_token_is_good_at_the_api_server(cluster: Cluster, tmp_path: Path) -> None:
    cluster.kubectl("wait", "--for=condition=Ready", "pod/live", "--timeout=60s")
    secrets = "/var/run/secrets/kubernetes.io/serviceaccount"
    token = cluster.kubectl("exec", "live", "--", "cat", f"{secrets}/token")
    (tmp_path / "ca.crt").write_text(cluster.kubectl("exec", "live", "--", "cat", f"{secrets}/ca.crt"))
    spec = cluster.paths.must_load()
    asked = ["--server", spec.server, "--certificate-authority", str(tmp_path / "ca.crt"), "--token", token]
    said = cluster.kubectl("auth", "whoami", "-o", "json", *asked, config=Path("/dev/null"))
    user = json.loads(said)["status"]["userInfo"]
    assert user["username"] == "system:serviceaccount:default:default"
    assert user["extra"]["authentication.kubernetes.io/pod-name"] == ["live"]
    with pytest.raises(AssertionError, match="Forbidden"):
        cluster.kubectl("get", "secrets", *asked, config=Path("/dev/null"))


def test_hv_goes_through_the_master(cluster: Cluster) -> None:
    cluster.kubectl("patch", "configmap", "live", "-p", '{"data": {"word": "two"}}')  # looked at by the last test
    done = cluster.run_hv(
        "run", "--name", "short", "--rm", "busybox", "--", "sh", "-c", "echo out; echo err >&2; exit 5"
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, "out\n", "err\n")
    assert cluster.hv("-n", "default", "exec", "live", "--", "cat", "/live/..data/word") == "one"
    assert "live" in cluster.hv("ps", "-o", "name").split()
    assert cluster.hv("cp", "live:/etc/passwd", "-").count("root:x:0") == 1
    assert cluster.hv("run", "-d", "--name", "long", "busybox", "--", "sleep", "1000") == "long\n"
    node = cluster.kubectl("get", "pod", "long", "-o", "jsonpath={.spec.nodeName}")
    assert "long" in cluster.hv("--host", node, "ps", "-o", "name").split()
    assert "long" not in cluster.hv("--local", "ps", "-o", "name").split()
    cluster.hv("--local", "host", "stop")
    cluster.hv("stop", "-t", "0", "long")
    assert cluster.kubectl("get", "pod", "long", "-o", "jsonpath={.status.phase}") in ("Failed", "Succeeded")
    cluster.hv("rm", "long")
    assert cluster.run_hv("exec", "long", "--", "true").returncode == 125


def test_a_rolling_update_and_its_undo_keep_what_the_strategy_promises(cluster: Cluster) -> None:
    watch = Watch(cluster)
    cluster.kubectl("set", "image", "deploy/web", "c=localhost/podvisor/web")
    cluster.kubectl("annotate", "deploy/web", "kubernetes.io/change-cause=second", "--overwrite")
    cluster.kubectl("rollout", "status", "deploy/web", "--timeout=60s")
    images = {p["spec"]["containers"][0]["image"] for p in listed(cluster, "pods", "-l", "app=web") if is_ready(p)}
    assert images == {"localhost/podvisor/web"}
    history = cluster.kubectl("rollout", "history", "deploy/web")
    assert [line.split() for line in history.splitlines()[2:4]] == [["1", "first"], ["2", "second"]]
    cluster.kubectl("rollout", "undo", "deploy/web")
    cluster.kubectl("rollout", "status", "deploy/web", "--timeout=60s")
    seen = watch.end()
    assert len(seen) > 10
    assert min(available for available, _ in seen) >= REPLICAS - 1
    assert max(present for _, present in seen) <= REPLICAS + 2
    wait_for(lambda: settled(cluster), "the old pods have gone", 30)


def test_a_killed_host_is_replaced_and_comes_back_empty(cluster: Cluster) -> None:
    cluster.kill_host("host-2")
    wait_for(lambda: ready_on(cluster)["host-1"] == REPLICAS, "its pods are made anew on host-1", 60)
    assert "NotReady" in cluster.kubectl("get", "node", "host-2")
    cluster.hv("cluster", "up")
    wait_for(lambda: settled(cluster), "no pod is there twice", 30)
    cluster.kubectl("rollout", "status", "ds/every", "--timeout=30s")


def test_a_host_that_is_cut_off_ends_what_was_replaced(cluster: Cluster) -> None:
    assert set(ready_on(cluster)) == {"host-1"}, "all are there since host-2 was lost"
    daemon = cluster.paths.process("host-1")
    assert daemon is not None
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        wait_for(lambda: ready_on(cluster)["host-2"] == REPLICAS, "its pods are made anew on host-2", 60)
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    wait_for(lambda: settled(cluster), "host-1 ends its own", 30)
    cluster.kubectl("wait", "--for=condition=Ready", "node/host-1", "--timeout=30s")


def test_a_changed_config_map_has_reached_the_running_pod(cluster: Cluster) -> None:
    def word() -> str:
        return cluster.kubectl("exec", "live", "--", "cat", "/live/word")

    wait_for(lambda: word() == "two", "the file in the pod has the new word", 70)


def test_a_backup_brings_everything_back(cluster: Cluster, tmp_path: Path) -> None:
    cluster.kubectl("delete", "deploy/web", "ds/every", "job/sum", "pod/live", "--timeout=60s")
    cluster.kubectl("create", "configmap", "kept", "--from-literal=a=b")
    cluster.hv("cluster", "backup", str(tmp_path / "objects.db"))
    cluster.kubectl("delete", "configmap", "kept")
    cluster.hv("cluster", "down")
    assert cluster.paths.process(MASTER) is None
    cluster.hv("cluster", "restore", str(tmp_path / "objects.db"))
    began = time.monotonic()
    cluster.hv("cluster", "up")
    assert time.monotonic() - began < 15
    assert cluster.kubectl("get", "configmap", "kept", "-o", "jsonpath={.data.a}") == "b"
