"""StatefulSets: pods with names that stay, ``web-0`` to ``web-<n-1>``, made, ended and updated one after the other.

Theory of operation
-------------------
::

    revision noted -> ordinals from the first: missing or ended? made anew --- one that is not ready holds up the rest
                   -> too many: the last ends first --- one at a time
                   -> update: from the last to the partition, one whose revision is old ends --- one at a time
                   -> status

With ``podManagementPolicy: Parallel`` nobody waits for another, but in updates. A pod that is being deleted keeps its
name until its node has ended it: no identity is ever held twice. Source: Kubernetes, "StatefulSets".
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import PODS, STATEFUL_SETS
from hypervisor.master.controllers import pods as podctl
from hypervisor.master.controllers.base import Context, Unseen, is_gone, own_key, owner_key, unless_gone
from hypervisor.master.controllers.pods import Pod
from hypervisor.master.controllers.revisions import HASH_LABEL, Revisions

NAME_LABEL = "statefulset.kubernetes.io/pod-name"
INDEX_LABEL = "apps.kubernetes.io/pod-index"
Set = Mapping[str, Any]


class StatefulSetController:
    """See the module."""

    name = "statefulset"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._unseen = Unseen()
        self._revisions = Revisions(context, STATEFUL_SETS)
        self.watches = {STATEFUL_SETS: own_key, PODS: owner_key(STATEFUL_SETS)}
        context.caches[PODS].add_handler(self._unseen.handler)

    async def sync(self, key: Key) -> float | None:
        """One turn for one StatefulSet."""
        owner = self._context.cached(STATEFUL_SETS, *key)
        if owner is None or meta.is_deleting(owner):
            return None
        newest = f"{key[1]}-{await self._revisions.note(owner)}"
        current = str(meta.get(owner, "status", "currentRevision", default="") or newest)
        pods = self._unseen.overlay(meta.uid_of(owner), self._context.owned(PODS, owner))
        there = {i: p for p in pods if (i := ordinal_of(owner, p)) is not None}
        if await self._fill(owner, there, current, newest) and await self._shrink(owner, there):
            await self._update(owner, there, newest)
        await self._tell(owner, there, current, newest)
        min_ready_s = int(meta.get(owner, "spec", "minReadySeconds", default=0))
        return podctl.available_in_s(pods, min_ready_s, time.time()) if min_ready_s else None

    async def _fill(self, owner: Set, there: Mapping[int, Pod], current: str, newest: str) -> bool:
        """Makes what is missing, as far as it may; False: a pod is waited for."""
        for ordinal in wanted(owner):
            pod = there.get(ordinal)
            if pod is None:
                old = ordinal < wanted(owner).start + _partition(owner) and current != newest
                await self._make(owner, ordinal, current if old else newest)
            elif not meta.is_deleting(pod) and podctl.phase(pod) in ("Failed", "Succeeded"):
                await self._delete(owner, pod)
            elif not meta.is_deleting(pod) and _is_healthy(owner, pod):
                continue
            if _in_order(owner):
                return False
        return True

    async def _shrink(self, owner: Set, there: Mapping[int, Pod]) -> bool:
        """Ends what is too many, the last first; False: one is waited for."""
        surplus = sorted((i for i in there if i not in wanted(owner)), reverse=True)
        for ordinal in surplus:
            if not meta.is_deleting(there[ordinal]):
                await self._delete(owner, there[ordinal])
            if _in_order(owner):
                return False
        return not surplus

    async def _update(self, owner: Set, there: Mapping[int, Pod], newest: str) -> None:
        """Ends one pod of an old revision, if all behind it are healthy."""
        if meta.get(owner, "spec", "updateStrategy", "type") == "OnDelete":
            return
        first = wanted(owner).start + _partition(owner)
        for ordinal in sorted((i for i in wanted(owner) if i >= first), reverse=True):
            pod = there.get(ordinal)
            if pod is None or meta.is_deleting(pod):
                return
            if meta.labels_of(pod).get(HASH_LABEL) != newest:
                await self._delete(owner, pod)
                return
            if not _is_healthy(owner, pod):
                return

    async def _make(self, owner: Set, ordinal: int, revision: str) -> None:
        pod = pod_of(owner, self._revisions.template(owner, revision), ordinal, revision)
        name = pod["metadata"]["name"]
        try:
            made = await self._context.client.create(PODS, pod, meta.key_of(owner)[0])
        except ApiError as error:
            if is_gone(error):
                return  # the namespace is going
            why = f"create Pod {name} in StatefulSet {meta.key_of(owner)[1]} failed error: {error}"
            self._context.events.record(owner, "Warning", "FailedCreate", why)
            raise
        self._unseen.made(meta.uid_of(owner), made)
        told = f"create Pod {name} in StatefulSet {meta.key_of(owner)[1]} successful"
        self._context.events.record(owner, "Normal", "SuccessfulCreate", told)

    async def _delete(self, owner: Set, pod: Pod) -> None:
        namespace, name = meta.key_of(pod)
        await unless_gone(self._context.client.delete(PODS, name, namespace, uid=meta.uid_of(pod)))
        told = f"delete Pod {name} in StatefulSet {meta.key_of(owner)[1]} successful"
        self._context.events.record(owner, "Normal", "SuccessfulDelete", told)

    async def _tell(self, owner: Set, there: Mapping[int, Pod], current: str, newest: str) -> None:
        status = numbers(owner, list(there.values()), current, newest)
        old = owner.get("status") or {}
        if any(old.get(k, 0) != v for k, v in status.items()):
            namespace, name = meta.key_of(owner)
            patch = {"status": status}
            await unless_gone(self._context.client.patch(STATEFUL_SETS, name, namespace, patch, subresource="status"))


def wanted(owner: Set) -> range:
    """The ordinals that there shall be."""
    start = int(meta.get(owner, "spec", "ordinals", "start", default=0))
    return range(start, start + int(meta.get(owner, "spec", "replicas", default=1)))


def ordinal_of(owner: Set, pod: Pod) -> int | None:
    """The number in a pod's name; None: it has none that is the owner's."""
    base, _, number = meta.key_of(pod)[1].rpartition("-")
    return int(number) if base == meta.key_of(owner)[1] and number.isdigit() else None


def pod_of(owner: Set, template: Mapping[str, Any], ordinal: int, revision: str) -> Object:
    """The pod of an ordinal, as it is made."""
    made = podctl.from_template(STATEFUL_SETS, owner, template)
    metadata, spec = made["metadata"], made["spec"]
    name = f"{meta.key_of(owner)[1]}-{ordinal}"
    del metadata["generateName"]
    metadata["name"] = name
    labels = {NAME_LABEL: name, INDEX_LABEL: str(ordinal), HASH_LABEL: revision}
    metadata["labels"] = {**(metadata.get("labels") or {}), **labels}
    spec["hostname"] = name
    if meta.get(owner, "spec", "serviceName"):
        spec["subdomain"] = owner["spec"]["serviceName"]
    return made


def numbers(owner: Set, pods: Sequence[Pod], current: str, newest: str) -> dict[str, Any]:
    """The status. An update that is through makes the newest revision the current one."""
    min_ready_s, now = int(meta.get(owner, "spec", "minReadySeconds", default=0)), time.time()
    live = [p for p in pods if not meta.is_deleting(p)]
    updated = sum(meta.labels_of(p).get(HASH_LABEL) == newest for p in live)
    ready = sum(podctl.is_ready(p) for p in pods)
    through = updated == len(pods) == len(wanted(owner)) == ready
    current = newest if through else current
    return {
        "replicas": len(pods),
        "readyReplicas": ready,
        "availableReplicas": sum(podctl.is_available(p, min_ready_s, now) for p in pods),
        "currentReplicas": sum(meta.labels_of(p).get(HASH_LABEL) == current for p in live),
        "updatedReplicas": updated,
        "currentRevision": current,
        "updateRevision": newest,
        "observedGeneration": int(meta.get(owner, "metadata", "generation", default=0)),
        "collisionCount": 0,
    }


def _partition(owner: Set) -> int:
    return int(meta.get(owner, "spec", "updateStrategy", "rollingUpdate", "partition", default=0))


def _in_order(owner: Set) -> bool:
    return bool(meta.get(owner, "spec", "podManagementPolicy") != "Parallel")


def _is_healthy(owner: Set, pod: Pod) -> bool:
    min_ready_s = int(meta.get(owner, "spec", "minReadySeconds", default=0))
    return podctl.phase(pod) == "Running" and podctl.is_available(pod, min_ready_s, time.time())
