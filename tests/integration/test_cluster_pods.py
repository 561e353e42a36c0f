"""A host of a cluster under load: its daemon killed at random moments while pods come and go; static pods; limits.

``HV_HOST_KILLS`` says how often it is killed (``make soak``: 200).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for
from local_cluster import Cluster, running_cluster

from hypervisor.kube import kubeconfig
from hypervisor.kube.errors import ApiError
from hypervisor.kube.http import HttpApiClient
from hypervisor.kube.meta import get
from hypervisor.kube.resources import PODS
from hypervisor.vmm.cgroup import scope_of

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.slow]

KILLS = int(os.environ.get("HV_HOST_KILLS", "20"))
HOST = "host-1"
IMAGE = "localhost/podvisor/busybox"
AT_ONCE = 3
LONGEST_S = 1.2
RANK = {"Pending": 0, "Running": 1, "Succeeded": 2, "Failed": 3}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(("busybox",)) as made:
        yield made


def pod(name: str, script: str, **spec: Any) -> dict[str, Any]:
    container = {"name": "c", "image": IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", script]}
    body = {"nodeName": HOST, "restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"}, "spec": body | spec}


# ---- static pods and Services ----------------------------------------------------------------------------------------


def test_a_static_pod_is_seen_through_the_api_server_and_outlives_its_mirror(cluster: Cluster) -> None:
    manifest = pod("fixed", 'echo "at $KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT"; exec sleep 1000')
    del manifest["spec"]["nodeName"]
    file = cluster.paths.host(HOST) / "manifests" / "fixed.yaml"
    file.write_text(json.dumps(manifest))
    wait_for(lambda: "fixed-host-1" in cluster.kubectl("get", "pods", "-o", "name"), "the mirror is there")
    cluster.kubectl("wait", "--for=condition=Ready", "pod/fixed-host-1", "--timeout=60s")
    address = cluster.kubectl("get", "service", "kubernetes", "-o", "jsonpath={.spec.clusterIP}:{.spec.ports[0].port}")
    assert cluster.kubectl("logs", "fixed-host-1") == f"at {address}\n"
    assert cluster.kubectl("exec", "fixed-host-1", "--", "hostname") == "fixed\n"
    uid = cluster.kubectl("get", "pod", "fixed-host-1", "-o", "jsonpath={.metadata.uid}")
    cluster.kubectl("delete", "pod", "fixed-host-1", "--wait=false")
    path = ("get", "pod", "fixed-host-1", "-o", "jsonpath={.metadata.uid}", "--ignore-not-found")
    wait_for(lambda: cluster.kubectl(*path) not in ("", uid), "it is made again")
    assert cluster.kubectl("logs", "fixed-host-1") == f"at {address}\n"  # of the same run
    assert "Started container c" in cluster.kubectl("describe", "pod", "fixed-host-1")
    file.unlink()
    wait_for(lambda: cluster.kubectl("get", "pods", "-o", "name") == "", "pod and mirror are gone")


# ---- kill -9 of the daemon -------------------------------------------------------------------------------------------


class Churn:
    """Pods that come and go on one host, and what a watch has seen of them."""

    def __init__(self, client: HttpApiClient) -> None:
        self.client = client
        self.victims: dict[str, float] = {}
        self.wanted: set[str] = set()  # not deleted by us: must come to a good end
        self.seen: dict[str, list[dict[str, Any]]] = {}
        self._numbers = iter(range(10**6))

    async def step(self) -> None:
        """Makes a pod where there are fewer than `AT_ONCE`; deletes one whose time has come."""
        there = await self.client.list(PODS, "default")
        busy = [p for p in there.items if get(p, "status", "phase") not in ("Succeeded", "Failed")]
        if len(busy) < AT_ONCE:
            name = f"p{next(self._numbers)}"
            script = f"echo began; sleep 0.{random.randrange(9)}; echo ended"
            await self.client.create(PODS, pod(name, script), "default")
            self.wanted.add(name)
            if random.random() < 0.3:
                self.victims[name] = time.monotonic() + random.uniform(0, 3)
        for victim in [name for name, at in self.victims.items() if at < time.monotonic()]:
            del self.victims[victim]
            self.wanted.discard(victim)
            await self.client.delete(PODS, victim, "default", grace_s=random.choice((0, 1)))

    async def run(self) -> None:
        while True:
            try:
                await self.step()
            except ApiError as e:
                if e.code != 404:
                    raise
            await asyncio.sleep(0.1)

    async def watch(self) -> None:
        listed = await self.client.list(PODS, "default")
        async with self.client.watch(PODS, "default", resource_version=listed.resource_version) as events:
            async for event in events:
                if event.type in ("ADDED", "MODIFIED"):
                    self.seen.setdefault(event.object["metadata"]["uid"], []).append(event.object)

    def ended(self) -> int:
        """Pods that have come to an end."""
        last = (states[-1] for states in self.seen.values())
        return sum(get(state, "status", "phase") in ("Succeeded", "Failed") for state in last)

    async def one_more_ends(self) -> None:
        before = self.ended()
        async with asyncio.timeout(120):
            while self.ended() == before:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def settled(self) -> bool:
        there = await self.client.list(PODS, "default")
        phases = {p["metadata"]["name"]: get(p, "status", "phase") for p in there.items}
        return set(phases) == self.wanted and set(phases.values()) <= {"Succeeded", "Failed"}


def kill_and_restart(cluster: Cluster) -> None:
    process = cluster.paths.process(HOST)
    assert process is not None
    folder = Path(f"/proc/{process.pid}")
    words = [word.decode() for word in (folder / "cmdline").read_bytes().split(b"\0")[:-1]]
    variables = (line.decode().partition("=") for line in (folder / "environ").read_bytes().split(b"\0"))
    environment = {name: value for name, equals, value in variables if equals}
    os.kill(process.pid, signal.SIGKILL)
    while process.alive():
        time.sleep(0.005)
    cluster.paths.start(HOST, words[words.index("hypervisor.cli.main") + 1 :], environment)
    wait_for(lambda: cluster.paths.process(HOST) is not None, "the next daemon is on record")


def serves(cluster: Cluster) -> bool:
    process = cluster.paths.process(HOST)
    try:
        announced = json.loads((cluster.paths.host(HOST) / "host.json").read_text())["pid"]
    except (OSError, ValueError):
        return False
    return process is not None and announced == process.pid


async def churn_and_kill(cluster: Cluster) -> Churn:
    access = await asyncio.to_thread(kubeconfig.load, cluster.paths.kubeconfig)
    async with HttpApiClient(access) as client:
        churn = Churn(client)
        tasks = [asyncio.create_task(churn.watch()), asyncio.create_task(churn.run())]
        await churn.one_more_ends()  # the template is there
        for number in range(KILLS):
            match number % 3:  # amid its own start, amid those of pods, and about when one ends
                case 1:
                    await asyncio.to_thread(wait_for, lambda: serves(cluster), "the daemon serves")
                case 2:
                    await churn.one_more_ends()
            await asyncio.sleep(random.uniform(0.0, LONGEST_S))
            await asyncio.to_thread(kill_and_restart, cluster)
        tasks[1].cancel()
        churn.wanted -= set(churn.victims)
        for victim in churn.victims:
            await client.delete(PODS, victim, "default", grace_s=1)
        async with asyncio.timeout(180):
            while not await churn.settled():
                assert not tasks[0].done(), tasks[0].exception()
                await asyncio.sleep(0.2)
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return churn


def test_pods_come_and_go_while_the_daemon_is_killed(cluster: Cluster) -> None:
    try:
        churn = asyncio.run(churn_and_kill(cluster))
    except TimeoutError:
        pytest.fail(f"{cluster.kubectl('get', 'pods', '-o', 'wide')}\n" + "\n".join(log_lines(cluster)[-60:]))
    assert churn.ended() >= KILLS // 4, "hardly anything ran"
    vms = Counter(
        line["uid"]
        for line in map(json.loads, filter(None, log_lines(cluster)))
        if line.get("event") == "VM is up" and "uid" in line
    )
    items = json.loads(cluster.kubectl("get", "pods", "-o", "json"))["items"]
    for item in items:
        name, status = item["metadata"]["name"], item["status"]
        (container,) = status["containerStatuses"]
        assert (status["phase"], container["restartCount"]) == ("Succeeded", 0), log_of(cluster, item)
        assert container["state"]["terminated"]["reason"] == "Completed"
        assert vms[item["metadata"]["uid"]] <= 1, f"{name} ran in {vms[item['metadata']['uid']]} VMs"
        assert cluster.kubectl("logs", name) == "began\nended\n"
    for states in churn.seen.values():
        ranks = [RANK[get(s, "status", "phase", default="Pending")] for s in states]
        assert ranks == sorted(ranks), [get(s, "status", "phase") for s in states]
    cluster.kubectl("delete", "pods", "--all", "--timeout=60s")
    folder = cluster.paths.host(HOST)
    wait_for(lambda: not any((folder / "pods").iterdir()), "no pod's folder is left")
    assert cluster.processes(folder / "pods") == []
    assert f"{folder}/pods" not in Path("/proc/self/mounts").read_text()
    left = [p for p in Path("/sys/fs/cgroup").glob(f"**/podvisor/{scope_of(folder)}/*") if p.is_dir()]
    assert left == []


def log_of(cluster: Cluster, item: dict[str, Any]) -> str:
    """What the daemons said of a pod, for a failure's message."""
    uid = item["metadata"]["uid"]
    return "\n".join(
        [
            json.dumps(item["status"]),
            *(line for line in log_lines(cluster) if uid in line or '"level": "error"' in line),
        ]
    )


def log_lines(cluster: Cluster) -> list[str]:
    return [line for line in cluster.paths.log(HOST).read_text().splitlines() if line.startswith("{")]
