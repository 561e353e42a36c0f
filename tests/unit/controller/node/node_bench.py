"""A host whose guests are made up, as a node of a made-up API server (`kube_fake_server`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from kube_fake_server import FakeServer
from pod_bench import Bench

from hypervisor.controller.node.config import Beats, NodeConfig
from hypervisor.controller.node.objects import ClusterObjects
from hypervisor.controller.node.podsync import PodSync
from hypervisor.kube.events import EventRecorder
from hypervisor.kube.http import HttpApiClient
from hypervisor.kube.kubeconfig import KubeConfig

PODS = "/api/v1/pods"


def api_pod(name: str = "p", *, node: str = "n1", policy: str = "Always", **spec: Any) -> dict[str, Any]:
    """As an API server stores it: with its defaults and its bookkeeping."""
    container = {
        "name": "c",
        "image": "x",
        "imagePullPolicy": "IfNotPresent",
        "resources": {},
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
    }
    tolerated = {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "default",
            "generateName": "p-",
            "finalizers": ["example.com/x"],
            "managedFields": [{"manager": "m"}],
        },
        "spec": {
            "nodeName": node,
            "restartPolicy": policy,
            "containers": [container],
            "serviceAccountName": "default",
            "serviceAccount": "default",
            "automountServiceAccountToken": True,
            "tolerations": [tolerated | {"tolerationSeconds": 300}],
            "enableServiceLinks": True,
            "priority": 0,
            "preemptionPolicy": "PreemptLowerPriority",
            "dnsPolicy": "ClusterFirst",
            "schedulerName": "default-scheduler",
            "securityContext": {},
            "terminationGracePeriodSeconds": 1,
        }
        | spec,
        "status": {"phase": "Pending", "conditions": [{"type": "example.com/gate", "status": "True"}]},
    }


class Cluster:
    """The server, the host, and what ties them."""

    def __init__(self, bench: Bench, url: str, server: FakeServer) -> None:
        self.bench = bench
        self.url = url
        self.server = server
        self.objects = bench.objects = ClusterObjects()
        bench.pods = bench.new_pods()
        self.config = NodeConfig("n1", Path("/nonexistent"), "127.0.0.9")

    @asynccontextmanager
    async def node(self) -> AsyncIterator[PodSync]:
        """A daemon's node side, while it is open."""
        async with HttpApiClient(KubeConfig(self.url)) as client:
            events = EventRecorder(client, "kubelet", "n1")
            sync = PodSync(client, self.bench.pods, self.config, events, Beats(resync_s=2))
            with self.objects.through(client) as services:
                tasks = [asyncio.create_task(part.run()) for part in (sync, events, services)]
                try:
                    yield sync
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

    def pod(self, name: str = "p") -> dict[str, Any] | None:
        """As the server has it."""
        return self.server.objects.get((PODS, "default", name))

    def status(self, name: str = "p") -> dict[str, Any]:
        """As the server has it."""
        pod = self.pod(name)
        return {} if pod is None else pod.get("status", {})

    def delete(self, name: str = "p", grace: int = 1) -> None:
        """As an API server begins a deletion."""
        pod = self.pod(name)
        assert pod is not None
        meta = pod["metadata"] | {"deletionTimestamp": "2024-01-01T00:00:01Z", "deletionGracePeriodSeconds": grace}
        self.server.put(PODS, pod | {"metadata": meta})

    async def until(self, met: Callable[[], Any]) -> None:
        """Waits for a condition that other parties bring about."""
        async with asyncio.timeout(20):
            while not met():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
