"""The pods that the API server bound to this node, and the pods that this host runs: one made to follow the other.

Theory of operation
-------------------
A pod's key (namespace, name) is worked on whenever the server's object, the host's record or the set of pods changes,
and every `resync_s`; one key never by two workers, so its reports are in order. Each time, from what both sides have
*now*::

    server has it      host has it     what is done
    -------------      -----------     ------------
    no, or another uid cluster's pod   stop it, remove it                     (deleted while nobody listened, too)
    yes, ended         no              nothing: it ran here, or was refused
    yes                no              accept it; what is refused has Failed with the reason
    yes                yes             report its status, where that differs
    being deleted      yes             stop it within its grace period; once its VM is gone report, then remove it
    being deleted      no              DELETE with grace period 0 and its uid: the name is free

Static pods have mirrors at the server (`mirrors`); what bears their annotation is worked on there.

Nothing is decided before the informer has synced: a node that is cut off, or starts while the server is away, leaves
its pods running. Killed at any point, the next daemon finds the pods by their uids on disk and goes on from this table.
A pod's entry on the host goes before the server's, so that no pod of the same name runs twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import structlog

from hypervisor.controller.journal import new_record
from hypervisor.controller.node.config import Beats, NodeConfig
from hypervisor.controller.node.mirrors import Mirrors, NodePods, is_mirror
from hypervisor.controller.node.podreport import PodEvent, events_between, rejected, status_of, status_patch
from hypervisor.controller.node.translate import host_manifest
from hypervisor.controller.pods import Pods
from hypervisor.controller.podvm import PodVm
from hypervisor.controller.store import CLUSTER
from hypervisor.errors import Conflict, InvalidInput, ResourceExhausted
from hypervisor.kube.client import ApiClient, Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.events import EventRecorder, reference
from hypervisor.kube.informer import Handler, Informer, WorkQueue
from hypervisor.kube.meta import Key, get, is_deleting, key_of, uid_of, version_of
from hypervisor.kube.resources import PODS

WORKERS = 8
BACKOFF_S = (0.1, 15.0)
_ENDED = ("Succeeded", "Failed")


class PodSync:
    """Keeps them in step. `run` is to be run as a task; cancelling it leaves the pods running."""

    def __init__(
        self, client: ApiClient, pods: Pods, config: NodeConfig, events: EventRecorder, beats: Beats | None = None
    ) -> None:
        self._client = client
        self._pods = pods
        self._config = config
        self._events = events
        self._queue: WorkQueue[Key] = WorkQueue(backoff_s=BACKOFF_S)
        self._answers: dict[str, Object] = {}  # what the server said to the last report, by uid
        self._watched: dict[str, Key] = {}
        self._fresh: set[str] = set()  # uids of pods that this daemon accepted: their Events begin at the beginning
        self._named = NodePods(pods, config.name)
        self._mirrors = Mirrors(client, self._named, config.name)
        self._log = structlog.get_logger()
        self.informer = Informer(
            client,
            PODS,
            field_selector=f"spec.nodeName={config.name}",
            resync_s=(beats or Beats()).resync_s,
        )
        self.informer.add_handler(Handler(self._add, lambda _, new: self._add(new), self._add))

    def _add(self, obj: Object) -> None:
        self._queue.add(key_of(obj))

    async def run(self) -> None:
        """Follows the server, for ever."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.informer.run())
                await self.informer.wait_synced()
                group.create_task(self._queue.run(self._sync, workers=WORKERS))
                group.create_task(self._watch_pods(group))
        finally:
            self._queue.close()

    # ---- what the host's pods do -------------------------------------------------------------------------------------

    async def _watch_pods(self, group: asyncio.TaskGroup) -> None:
        """Every pod of the cluster gets somebody who hears of its changes."""
        while True:
            version = self._pods.topic.version
            mine = {p.stored.uid: p for p in self._pods if p.stored.source == CLUSTER or p.stored.static_file}
            for uid in [u for u in self._watched if u not in mine]:
                self._answers.pop(uid, None)  # a mirror's has another uid, and is small
                self._queue.add(self._watched.pop(uid))
            for uid, pod in mine.items():
                if uid not in self._watched:
                    self._watched[uid] = self._key(pod)
                    group.create_task(self._watch_pod(pod), name=f"watch {uid}")
            await self._pods.topic.wait_newer(version)

    def _key(self, pod: PodVm) -> Key:
        """Under which the server has it."""
        return self._named.mirror_key(pod) if pod.stored.static_file is not None else pod.pod.key

    async def _watch_pod(self, pod: PodVm) -> None:
        key, topic = self._key(pod), pod.journal.topic
        told = 0
        seen = new_record(pod.pod) if pod.stored.uid in self._fresh else pod.journal.record
        self._fresh.discard(pod.stored.uid)
        self._queue.add(key)
        while not pod.gone.is_set():
            version = topic.version
            record = pod.journal.record
            told = self._tell_notices(pod, told)
            if record != seen:
                self._tell(pod, events_between(seen, record, pod.pod))
                seen = record
                self._queue.add(key)
            if not pod.gone.is_set():
                await topic.wait_newer(version)

    def _tell_notices(self, pod: PodVm, told: int) -> int:
        """Tells those with a number above `told`; the highest number."""
        init = {c.name for c in pod.pod.init_containers}
        for notice in [n for n in pod.journal.notices if n.number > told]:
            of_init = notice.container in init
            self._tell(pod, [PodEvent(notice.kind, notice.reason, notice.message, notice.container, of_init)])
            told = notice.number
        return told

    def _tell(self, pod: PodVm, events: Any) -> None:
        namespace, name = self._key(pod)
        shown = {"metadata": {"name": name, "namespace": namespace, "uid": pod.stored.uid}}
        for event in events:
            self._events.record(reference(PODS, shown, event.field_path), event.kind, event.reason, event.message)

    # ---- one key -----------------------------------------------------------------------------------------------------

    async def _sync(self, key: Key) -> None:
        wanted = self.informer.store.get(key)
        if is_mirror(wanted or {}) or (wanted is None and self._named.static(key) is not None):
            static = await self._mirrors.keep(key, wanted)
            if static is not None and wanted is not None:
                await self._report(wanted, static)
            return
        pod = self._pods.peek(*key)
        if pod is not None and pod.stored.source == CLUSTER and (wanted is None or uid_of(wanted) != pod.stored.uid):
            await self._end(pod, None)
        elif wanted is None:
            return
        elif pod is not None and pod.stored.uid == uid_of(wanted):
            await self._keep(wanted, pod)
        elif is_deleting(wanted):
            await self._forget(wanted)
        elif get(wanted, "status", "phase") not in _ENDED:
            await self._accept(wanted)

    async def _keep(self, wanted: Object, pod: PodVm) -> None:
        """Both have it."""
        if is_deleting(wanted):
            await self._end(pod, wanted)
        if not pod.gone.is_set():
            await self._report(wanted, pod)

    async def _accept(self, wanted: Object) -> None:
        self._fresh.add(uid_of(wanted))
        try:
            pod = await self._pods.create(
                host_manifest(wanted, self._config.address), source=CLUSTER, uid=uid_of(wanted)
            )
        except InvalidInput as e:
            enough = "CPU; this host has" not in str(e)
            await self._reject(wanted, "InvalidSpec" if enough else "OutOfcpu", str(e))
        except ResourceExhausted as e:
            await self._reject(wanted, "OutOfmemory", str(e))
        except Conflict as e:
            await self._reject(wanted, "NameTaken", str(e))
        else:
            self._log.info("pod accepted", pod=f"{pod.pod.namespace}/{pod.pod.name}", uid=pod.stored.uid)

    async def _reject(self, wanted: Object, reason: str, message: str) -> None:
        self._fresh.discard(uid_of(wanted))
        self._events.record(reference(PODS, wanted), "Warning", reason, message)
        status = rejected(reason, message, wanted.get("status") or {})
        await self._send(wanted, {"metadata": {"uid": uid_of(wanted)}, "status": status})

    async def _end(self, pod: PodVm, wanted: Object | None) -> None:
        """Its containers end, then its VM, then its entry; the key comes again at each of these steps."""
        grace = None if wanted is None else get(wanted, "metadata", "deletionGracePeriodSeconds")
        intent = pod.journal.record.intent
        if pod.journal.record.closed:
            if wanted is None or await self._report(wanted, pod):
                await pod.request_delete(0)
                await pod.gone.wait()
        elif grace == 0 and not (intent.kind == "delete" and intent.grace_s <= 0):
            await pod.request_delete(0)
        elif intent.kind == "run" or (grace is not None and grace < intent.grace_s):
            await pod.request_stop(grace)

    async def _forget(self, wanted: Object) -> None:
        """Nothing of it is left here: the server may forget it too."""
        namespace, name = key_of(wanted)
        try:
            await self._client.delete(PODS, name, namespace, grace_s=0, uid=uid_of(wanted))
        except ApiError as e:
            if e.code not in (404, 409):
                raise

    # ---- status ------------------------------------------------------------------------------------------------------

    async def _report(self, wanted: Object, pod: PodVm) -> bool:
        """Brings the server's status up to date; False when the server has no such pod any more."""
        uid = uid_of(wanted)
        known = _newer(wanted, self._answers.get(uid))
        server = get(known, "status", default={})
        gates = [g["conditionType"] for g in get(wanted, "spec", "readinessGates", default=())]
        patch = status_patch(status_of(pod.view(), uid, self._config.address, server, gates), server, uid)
        if patch is None:
            return True
        answer = await self._send(wanted, patch)
        if answer is None:
            return False
        self._answers[uid] = answer
        return True

    async def _send(self, wanted: Mapping[str, Any], patch: Object) -> Object | None:
        """The answer; None when the pod has gone from the server, or is another one there."""
        namespace, name = key_of(wanted)
        try:
            return await self._client.patch(PODS, name, namespace, patch, how="strategic", subresource="status")
        except ApiError as e:
            if e.code in (404, 409):
                return None
            raise


def _newer(one: Object, other: Object | None) -> Object:
    """Of two states of an object the later one: the informer may lag behind an answer, or be ahead of it."""
    if other is None or uid_of(one) != uid_of(other):
        return one
    versions = version_of(one), version_of(other)
    return other if all(v.isdigit() for v in versions) and int(versions[1]) > int(versions[0]) else one
