"""Kinds and objects that the registry's tests share."""

from __future__ import annotations

from hypervisor.kube.resources import CONFIG_MAPS, NAMESPACES, NODES, PODS
from hypervisor.master.kinds.kind import Kind

POD = Kind(PODS, "pod", "io.k8s.api.core.v1.Pod", selectable=("spec.nodeName", "status.phase"))
NODE = Kind(NODES, "node", "io.k8s.api.core.v1.Node")
MAP = Kind(CONFIG_MAPS, "configmap", "io.k8s.api.core.v1.ConfigMap")
NAMESPACE = Kind(NAMESPACES, "namespace", "io.k8s.api.core.v1.Namespace")
KINDS = (POD, NODE, MAP, NAMESPACE)


def pod(name: str = "", **metadata: object) -> dict[str, object]:
    """A pod as a client sends it."""
    named = {"name": name} if name else {}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": named | metadata, "spec": {"containers": []}}
