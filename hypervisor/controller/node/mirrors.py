"""Mirror pods: static pods of this host, shown at the API server so that they can be looked at there, and only that.

A mirror bears the static pod's name and the node's, its uid in an annotation (by which kubectl finds its Events), and
is owned by the Node. Deleting one does nothing to the static pod: it is made again. Source: Kubernetes documentation,
"Create static Pods".

Theory of operation
-------------------
::

    static pod      mirror at the server     what is done
    ----------      --------------------     ------------
    there           none                     made
    there           of another uid, or       deleted; that makes it "none"
                    being deleted
    there           of its uid               its status is reported, as any pod's
    gone            any                      deleted
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypervisor.controller.node.translate import host_manifest
from hypervisor.controller.pods import Pods, target_of
from hypervisor.controller.podstatus import rfc3339
from hypervisor.controller.podvm import PodVm
from hypervisor.errors import NotFound
from hypervisor.introspect.target import PodTarget
from hypervisor.kube.client import ApiClient, Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.meta import Key, get, is_deleting, key_of, uid_of
from hypervisor.kube.resources import NODES, PODS

ANNOTATION = "kubernetes.io/config.mirror"
_PREFIX = "kubernetes.io/config."


def is_mirror(pod: Mapping[str, Any]) -> bool:
    """Whether an object of the server stands for a static pod."""
    return bool(mirrored_uid(pod))


def mirrored_uid(pod: Mapping[str, Any]) -> str:
    """The uid of the static pod that it stands for; empty for an ordinary pod."""
    return str((get(pod, "metadata", "annotations", default={}) or {}).get(ANNOTATION) or "")


class NodePods:
    """The pods of this host by the names that the API server has them under."""

    def __init__(self, pods: Pods, node: str) -> None:
        self._pods = pods
        self._suffix = f"-{node}"

    def static(self, key: Key) -> PodVm | None:
        """The static pod whose mirror has this key."""
        namespace, name = key
        pod = self._pods.peek(namespace or "default", name.removesuffix(self._suffix))
        return pod if pod is not None and pod.stored.static_file is not None and key == self.mirror_key(pod) else None

    def mirror_key(self, pod: PodVm) -> Key:
        """Of a static pod's mirror."""
        return pod.pod.namespace, f"{pod.pod.name}{self._suffix}"

    def get(self, namespace: str, name: str) -> PodVm:
        """:raises NotFound: there is no such pod"""
        try:
            return self._pods.get(namespace, name)
        except NotFound:
            if (pod := self.static((namespace, name))) is None:
                raise
            return pod

    def find(self, namespace: str, name: str) -> PodTarget:
        """As introspection needs it (`PodLookup`)."""
        return target_of(self.get(namespace, name))


class Mirrors:
    """Keeps one mirror in step at a time; `PodSync` says when."""

    def __init__(self, client: ApiClient, pods: NodePods, node: str) -> None:
        self._client = client
        self._pods = pods
        self._node = node

    async def keep(self, key: Key, found: Object | None) -> PodVm | None:
        """Brings a mirror one step nearer; the static pod whose status is to be reported to it, if that is next.

        :param found: what the server has
        """
        pod = self._pods.static(key)
        if found is None:
            if pod is not None and not pod.gone.is_set():
                await self._make(key, pod)
            return None
        if pod is None or pod.gone.is_set() or is_deleting(found) or mirrored_uid(found) != pod.stored.uid:
            await self._delete(found)
            return None
        return pod

    async def _make(self, key: Key, pod: PodVm) -> None:
        node = await self._client.get(NODES, self._node)
        await self._client.create(PODS, _mirror(key, pod, self._node, uid_of(node)), key[0])

    async def _delete(self, found: Object) -> None:
        namespace, name = key_of(found)
        try:
            await self._client.delete(PODS, name, namespace, grace_s=0, uid=uid_of(found))
        except ApiError as e:
            if e.code not in (404, 409):
                raise


def _mirror(key: Key, pod: PodVm, node: str, node_uid: str) -> Object:
    manifest = host_manifest(pod.stored.manifest)
    said = {"mirror": pod.stored.uid, "hash": pod.stored.digest, "source": "file", "seen": rfc3339(pod.stored.created)}
    kept = manifest["metadata"].get("annotations") or {}
    metadata = {
        "name": key[1],
        "namespace": key[0],
        "labels": manifest["metadata"].get("labels") or {},
        "annotations": {**kept, **{f"{_PREFIX}{name}": value for name, value in said.items()}},
        "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": node, "uid": node_uid, "controller": True}],
    }
    always = [{"operator": "Exists", "effect": "NoExecute"}]
    spec = manifest["spec"] | {"nodeName": node, "tolerations": always, "automountServiceAccountToken": False}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
