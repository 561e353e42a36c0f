"""A cluster of two hosts on this machine, driven by the real kubectl: a pod in a VM on each host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor.cli.cluster_state import MASTER, ClusterPaths

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
BUSYBOX = ROOT / "guest-images/out/samples/busybox.tar"
KUBECTL = Path(sys.executable).parent / "kubectl"
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


class Cluster:
    """``hv`` and ``kubectl`` on one cluster."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.paths = ClusterPaths(state)

    def hv(self, *args: str, timeout: float = 120) -> str:
        return self._run([sys.executable, "-m", "hypervisor.cli.main", "--state-dir", str(self.state), *args], timeout)

    def kubectl(self, *args: str, config: Path | None = None, stdin: str = "", timeout: float = 90) -> str:
        config = config or self.paths.kubeconfig
        return self._run([str(KUBECTL), "--kubeconfig", str(config), *args], timeout, stdin)

    def _run(self, command: list[str], timeout: float, stdin: str = "") -> str:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False, cwd=self.state,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(self.state)},
        )  # fmt: skip
        if done.returncode:
            raise AssertionError(f"{command[1:]} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def kill_everything(self) -> None:
        """Every process of the cluster, VMs included, with SIGKILL."""
        for component in (MASTER, "host-1", "host-2"):
            process = self.paths.process(component)
            assert process is not None
            process.kill()
        for pid in self.processes():
            os.kill(pid, 9)
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)

    def processes(self) -> list[int]:
        """Processes whose command line names the state folder."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes()
            except OSError:
                continue
            if os.fsencode(self.state) in words and int(path.parts[2]) != os.getpid():
                found.append(int(path.parts[2]))
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    state = Path(tempfile.mkdtemp(prefix="hvc-"))
    state.chmod(0o711)
    made = Cluster(state)
    try:
        made.hv("image", "import", str(BUSYBOX))
        made.hv("host", "stop")
        began = time.monotonic()
        made.hv("cluster", "up", "--hosts", "2")
        assert time.monotonic() - began < UP_WITHIN
        yield made
    finally:
        made.hv("cluster", "down", "--delete")
        left = made.processes()
        shutil.rmtree(state, ignore_errors=True)
    assert left == []


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
        ("get", "node", "host-2"),
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
