"""All pods of a host: accepted, found again after a restart, looked up, stopped, removed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

from hypervisor.controller import store
from hypervisor.controller.concurrency import Topic
from hypervisor.controller.manifest import parse_pod
from hypervisor.controller.paths import HostPaths, PodPaths
from hypervisor.controller.podfacts import check_network
from hypervisor.controller.podvm import PodVm
from hypervisor.controller.services import Services
from hypervisor.controller.sizing import vm_size
from hypervisor.controller.spec import PodSpec
from hypervisor.controller.store import StoredPod
from hypervisor.errors import Conflict, HvError, NotFound, Unavailable
from hypervisor.introspect.agent import AgentClient
from hypervisor.introspect.target import PodTarget
from hypervisor.vsock.address import VsockAddress

Key = tuple[str, str]


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """What tells two manifests apart; the order of keys does not."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


class Pods:
    """The pods of one host, by namespace and name. A pod that is being removed still holds its name."""

    def __init__(self, paths: HostPaths, services: Services) -> None:
        self._paths = paths
        self._services = services
        self._pods: dict[Key, PodVm] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._coming: set[Key] = set()
        self._closing = False
        self._log = structlog.get_logger()
        self.topic = Topic()  # a pod came or went

    def __iter__(self) -> Iterator[PodVm]:
        return iter(sorted(self._pods.values(), key=lambda p: p.pod.key))

    def get(self, namespace: str, name: str) -> PodVm:
        """:raises NotFound: there is no such pod"""
        pod = self._pods.get((namespace, name))
        if pod is None:
            known = ", ".join(sorted(n for ns, n in self._pods if ns == namespace)[:20]) or "none"
            elsewhere = "".join(f"; there is {ns}/{n}" for ns, n in sorted(self._pods) if n == name)
            raise NotFound(f"there is no pod {name} in namespace {namespace}; there are: {known}{elsewhere}")
        return pod

    def peek(self, namespace: str, name: str) -> PodVm | None:
        """The pod of that name, if there is one."""
        return self._pods.get((namespace, name))

    def find(self, namespace: str, name: str) -> PodTarget:
        """The pod as introspection needs it (`PodLookup`)."""
        return target_of(self.get(namespace, name))

    def agent(self, address: VsockAddress) -> AgentClient:
        """The agent of a VM of this host."""
        return self._services.connect(address)

    def images_in_use(self) -> set[str]:
        """Ids of the images that a pod which has not ended runs or waits to run."""
        records = [p.journal.record for p in self._pods.values() if not p.journal.record.closed]
        return {c.image_id for r in records for c in (*r.init_containers, *r.containers) if c.image_id}

    @property
    def disks(self) -> Path:
        """Where the host's own virtual disks are."""
        return self._paths.disks

    def host_usage(self) -> Mapping[str, Any]:
        """What the VM manager takes beside the pods' VMs."""
        return self._services.machines.usage()

    # ---- coming ------------------------------------------------------------------------------------------------------

    async def create(
        self, manifest: Any, *, source: str = "api", uid: str = "", prepare: Callable[[PodPaths], None] | None = None
    ) -> PodVm:
        """Accepts a pod: on return it is on stable storage, and will run whatever happens to this process.

        :param uid: that it has already; a new one where none is given
        :param prepare: see `store.create`
        :raises InvalidInput: something is wrong with the manifest
        :raises Conflict: there is a pod of that name
        :raises ResourceExhausted: the host cannot hold its VM
        On failure nothing is changed.
        """
        if self._closing:
            raise Unavailable("hostd is stopping; no pod is accepted any more")
        spec = await asyncio.to_thread(parse_pod, manifest)
        size = vm_size(spec)
        check_network(spec, self._services.network is not None)
        if spec.key in self._pods or spec.key in self._coming:
            raise Conflict(f"there is a pod {spec.name} in namespace {spec.namespace} already; remove it first")
        uid = uid or store.new_uid(self._paths)
        self._coming.add(spec.key)
        try:
            self._services.ledger.promise(uid, size)
            stored = StoredPod(uid, time.time(), source, manifest_digest(manifest), manifest)
            try:
                await asyncio.to_thread(store.create, self._paths.pod(uid), stored, prepare)
            except BaseException:
                self._services.ledger.release(uid)
                raise
            return self._add(stored, spec)
        finally:
            self._coming.discard(spec.key)

    def _add(self, stored: StoredPod, spec: PodSpec) -> PodVm:
        pod = PodVm(self._services, stored, spec, self._paths.pod(stored.uid))
        self._pods[spec.key] = pod
        self._tasks[spec.key] = asyncio.create_task(self._live(pod), name=f"pod {spec.namespace}/{spec.name}")
        self.topic.publish()
        return pod

    async def _live(self, pod: PodVm) -> None:
        try:
            await self._run(pod)
        except Exception:
            # Its files stay for the next daemon; the other pods go on.
            self._log.exception("pod VM controller failed again", pod=f"{pod.pod.namespace}/{pod.pod.name}")
            return
        self._services.ledger.release(pod.stored.uid)
        if self._pods.get(pod.pod.key) is pod:
            del self._pods[pod.pod.key]
            del self._tasks[pod.pod.key]
        self.topic.publish()

    async def _run(self, pod: PodVm) -> None:
        """Lives the pod's life; after a bug in it the pod has failed, its VM goes and it can be removed."""
        try:
            await pod.run()
        except Exception:
            self._log.exception("pod VM controller failed", pod=f"{pod.pod.namespace}/{pod.pod.name}")
            message = "its controller failed; hostd.log has the reason"
            pod.journal.update(phase="Failed", reason="InternalError", message=message)
            await pod.run()

    # ---- an earlier daemon's -----------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Takes over the pods of an earlier daemon and sweeps what it had begun and not acknowledged."""
        for directory in sorted(self._paths.pods.iterdir()):
            paths = PodPaths(directory)
            if not paths.pod.exists():
                await self._sweep(paths)
                continue
            try:
                stored = await asyncio.to_thread(store.load, paths)
                spec = await asyncio.to_thread(parse_pod, stored.manifest)
            except HvError as e:
                self._log.error(
                    "pod cannot be taken over; its folder is left as it is", path=str(directory), error=str(e)
                )
                continue
            self._add(stored, spec)

    async def _sweep(self, paths: PodPaths) -> None:
        self._log.info("leftover swept", path=str(paths.directory))
        try:
            await self._services.machines.sweep(paths.vm)
            await asyncio.to_thread(shutil.rmtree, paths.directory, ignore_errors=True)
        except HvError as e:
            self._log.warning("leftover cannot be swept", path=str(paths.directory), error=str(e))

    # ---- going -------------------------------------------------------------------------------------------------------

    async def remove_all(self) -> None:
        """Removes every pod, each within its grace period; returns when all have gone. None comes any more."""
        self._closing = True
        pods = list(self._pods.values())
        await asyncio.gather(*(pod.request_delete() for pod in pods))
        await asyncio.gather(*(pod.gone.wait() for pod in pods))

    async def close(self) -> None:
        """Lets go of all pods; their VMs run on."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def target_of(pod: PodVm) -> PodTarget:
    """A pod as a destination of introspection commands."""
    record = pod.journal.record
    alive = pod.machine is not None and record.vm_up
    return PodTarget(
        namespace=pod.pod.namespace,
        name=pod.pod.name,
        address=pod.machine.address if pod.machine is not None and alive else None,
        containers=tuple(c.name for c in (*pod.pod.containers, *pod.pod.init_containers)),
        archived_logs=pod.paths.logs if not alive and pod.paths.logs.is_dir() else None,
        detail=_detail(pod),
    )


def _detail(pod: PodVm) -> str:
    record = pod.journal.record
    if record.terminal:
        because = f": {record.message}" if record.message else ""
        return f"has {record.phase.lower()}{because}"
    if record.suspend:
        return f"is {record.suspend}; run: hv resume {pod.pod.name}"
    if record.message:
        return f"has no running VM: {record.message}"
    return "is still starting"
