"""Volumes made of config maps, secrets, tokens and fields: fetched, and written before containers start."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from node_bench import PODS, Cluster, api_pod

from hypervisor.controller.manifest import parse_pod
from hypervisor.controller.node.objects import ClusterObjects
from hypervisor.controller.node.translate import host_manifest
from hypervisor.controller.podobjects import HostObjects
from hypervisor.errors import NotFound
from hypervisor.kube.http import HttpApiClient
from hypervisor.kube.kubeconfig import KubeConfig

ACCESS: dict[str, Any] = {
    "name": "kube-api-access-abcde",
    "projected": {
        "defaultMode": 420,
        "sources": [
            {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
        ],
    },
}
MOUNT = {"name": ACCESS["name"], "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": True}


def with_volumes(*volumes: dict[str, Any]) -> dict[str, Any]:
    return host_manifest(api_pod(volumes=list(volumes)))


async def files(cluster: Cluster, *volumes: dict[str, Any]) -> dict[str, bytes]:
    pod = parse_pod(with_volumes(*volumes))
    objects = ClusterObjects()
    async with HttpApiClient(KubeConfig(cluster.url)) as client:
        with objects.through(client):
            return {f.path: f.data for v in pod.volumes for f in await objects.files(pod, "u", v)}


def put(cluster: Cluster, plural: str, name: str, **content: Any) -> None:
    cluster.server.put(f"/api/v1/{plural}", {"metadata": {"name": name, "namespace": "default"}, **content})


async def test_the_volume_of_every_pod_of_a_service_account(cluster: Cluster) -> None:
    put(cluster, "configmaps", "kube-root-ca.crt", data={"ca.crt": "PEM"})
    assert await files(cluster, ACCESS) == {"token": b"a-token", "ca.crt": b"PEM", "namespace": b"default"}
    (asked,) = [body for method, path, body in cluster.server.requests if path.endswith("/token")]
    assert asked["spec"]["boundObjectRef"] == {"kind": "Pod", "apiVersion": "v1", "name": "p", "uid": "u"}


async def test_config_maps_and_secrets(cluster: Cluster) -> None:
    put(cluster, "configmaps", "m", data={"a": "1"}, binaryData={"b": base64.b64encode(b"\0").decode()})
    put(cluster, "secrets", "s", data={"k": base64.b64encode(b"v").decode()})
    secret = {"secretName": "s", "items": [{"key": "k", "path": "x/y", "mode": 256}]}
    found = await files(cluster, {"name": "m", "configMap": {"name": "m"}}, {"name": "s", "secret": secret})
    assert found == {"a": b"1", "b": b"\0", "x/y": b"v"}


@pytest.mark.parametrize("source", [{"name": "gone"}, {"name": "m", "items": [{"key": "gone", "path": "x"}]}])
async def test_what_is_not_there_is_said_unless_it_is_optional(cluster: Cluster, source: dict[str, Any]) -> None:
    put(cluster, "configmaps", "m", data={"a": "1"})
    with pytest.raises(NotFound, match="gone"):
        await files(cluster, {"name": "v", "configMap": source})
    assert await files(cluster, {"name": "v", "configMap": source | {"optional": True}}) == {}


async def test_files_are_written_before_the_first_container_starts(cluster: Cluster) -> None:
    downward = {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}
    pod = api_pod(volumes=[{"name": "v", "downwardAPI": downward}])
    pod["metadata"]["labels"] = {"app": 'a"b'.replace('"', "")}
    cluster.server.put(PODS, pod)
    async with cluster.node():
        await cluster.until(lambda: cluster.status().get("phase") == "Running")
    calls = cluster.bench.machines.started[0].calls
    names = [name for name, _ in calls]
    assert names.index("volume.write") < names.index("container.start")
    (written,) = [args for name, args in calls if name == "volume.write"]
    assert base64.b64decode(written["files"][0]["data"]) == b'app="ab"'


async def test_a_missing_object_is_shown_and_waited_for(cluster: Cluster) -> None:
    cluster.server.put(PODS, api_pod(volumes=[{"name": "v", "configMap": {"name": "m"}}]))
    async with cluster.node():
        await cluster.until(lambda: cluster.status().get("reason") == "FailedMount")
        assert cluster.status()["phase"] == "Pending"
        cluster.delete()
        await cluster.until(lambda: cluster.pod() is None)


async def test_a_host_without_a_cluster_has_fields_only() -> None:
    pod = parse_pod(with_volumes({"name": "m", "configMap": {"name": "m"}}))
    with pytest.raises(NotFound, match="in no cluster"):
        await HostObjects().files(pod, "u", pod.volumes[0])
