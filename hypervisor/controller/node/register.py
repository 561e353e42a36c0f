"""The Node object: what this machine has, how it is, and that it is alive.

Theory of operation
-------------------
::

    GET node --404--> POST it --+
        |                       v
        +--> PATCH labels, annotations --> every `status_s`: look; PATCH nodes/status when it differs,
                                                             PATCH the templates' annotation when it does
                                           every `lease_s`: renew the Lease

A node that somebody deleted is made again by the next report. Taints, and what others wrote into metadata, are left
alone; ``nodes/status`` is only ever patched, since a node may not read it.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from hypervisor.controller.node.config import Beats, NodeConfig
from hypervisor.controller.sizing import GUEST_OVERHEAD, HOST_RESERVE, MIB, PROCESS_OVERHEAD, available_memory
from hypervisor.errors import HvError
from hypervisor.kube.client import ApiClient, Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.meta import get, now
from hypervisor.kube.resources import LEASES, NODES
from hypervisor.version import __version__

LEASE_NAMESPACE = "kube-node-lease"
OVERHEAD_ANNOTATION = "podvisor.dev/pod-overhead-memory"
"""What a pod's VM takes beside its containers; schedulers that know it count it for each pod."""
TEMPLATES_ANNOTATION = "podvisor.dev/templates"
"""Memory sizes in MiB, separated by commas, of VMs for which there is a template; schedulers that know it prefer such a
node.
"""
ACCELERATOR_LABEL = "podvisor.dev/accelerator"
MAX_IMAGES = 50
LOW_DISK = 0.05
LOW_PIDS = 0.05
RETRY_S = 5.0
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while the daemon runs.

    :ivar accelerator: ``kvm`` or ``tcg``
    :ivar runtime: as ``podvisor://1.2``
    """

    accelerator: str
    runtime: str
    state_dir: Path


Images = Callable[[], Sequence[Mapping[str, Any]]]
"""``status.images``, as of now."""
Templates = Callable[[], Sequence[int]]
"""Memory sizes, in bytes, of VMs for which there is a template, as of now."""


class NodeObject:
    """Keeps the Node and its Lease. `run` is to be run as a task."""

    def __init__(
        self,
        client: ApiClient,
        config: NodeConfig,
        facts: Facts,
        images: Images,
        beats: Beats,
        templates: Templates = tuple,
    ) -> None:
        self._client = client
        self._config = config
        self._facts = facts
        self._images = images
        self._templates = templates
        self._told_templates: str | None = None
        self._beats = beats
        self._sent: Object = {}
        self._sent_at = 0.0
        self._uid = ""
        self._transitions: dict[str, tuple[str, str]] = {}
        self._known = asyncio.Event()
        self._log = structlog.get_logger()

    async def wait_registered(self) -> None:
        """Waits until the server has the Node."""
        await self._known.wait()

    async def run(self) -> None:
        """Registers the node and keeps it alive, for ever; whatever fails is tried again."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._every(self._beats.status_s, self._report, "node status"))
            group.create_task(self._every(self._beats.lease_s, self._renew, "lease"))

    async def _every(self, seconds: float, beat: Callable[[], Any], what: str) -> None:
        while True:
            pause = seconds
            try:
                await beat()
            except (HvError, OSError) as e:
                self._log.warning("not accepted; will be tried again", what=what, error=str(e))
                pause = min(seconds, RETRY_S)
            await asyncio.sleep(pause)

    # ---- the Node ----------------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        status = await asyncio.to_thread(self.status)
        if not self._known.is_set():
            await self._register(status)
        plain = _without_heartbeats(status)
        try:
            await self._tell_templates()
            fresh = plain == self._sent and time.monotonic() - self._sent_at < self._beats.report_s
            if fresh and await self._believed(plain):
                return
            change = {"status": status}
            await self._client.patch(NODES, self._config.name, None, change, how="strategic", subresource="status")
        except ApiError as e:
            if e.code == 404:
                self._known.clear()
            raise
        self._sent, self._sent_at = plain, time.monotonic()

    async def _tell_templates(self) -> None:
        sizes = await asyncio.to_thread(self._templates)
        text = ",".join(str(size // MIB) for size in sizes)
        if text != self._told_templates:
            change = {"metadata": {"annotations": {TEMPLATES_ANNOTATION: text or None}}}
            await self._client.patch(NODES, self._config.name, None, change, how="merge")
            self._told_templates = text

    async def _believed(self, status: Object) -> bool:
        """Whether the API server has this node's conditions: they become Unknown while it is cut off."""
        node = await self._client.get(NODES, self._config.name)
        there = {c.get("type"): c.get("status") for c in (node.get("status") or {}).get("conditions") or ()}
        return all(there.get(c["type"]) == c["status"] for c in status.get("conditions") or ())

    async def _register(self, status: Object) -> None:
        name, metadata = self._config.name, self._metadata()
        try:
            node = await self._client.get(NODES, name)
        except ApiError as e:
            if e.code != 404:
                raise
            node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name} | metadata, "spec": {}}
            node = await self._client.create(NODES, node | {"status": status})
            self._log.info("node registered", node=name)
        else:
            self._keep_transitions(node)
            if any(get(node, "metadata", part, key) != v for part, m in metadata.items() for key, v in m.items()):
                node = await self._client.patch(NODES, name, None, {"metadata": metadata}, how="strategic")
        self._uid = str(get(node, "metadata", "uid", default=""))
        self._told_templates = get(node, "metadata", "annotations", TEMPLATES_ANNOTATION, default="")
        self._known.set()

    def _keep_transitions(self, node: Mapping[str, Any]) -> None:
        for condition in get(node, "status", "conditions", default=()):
            since = condition.get("lastTransitionTime") or now()
            self._transitions.setdefault(condition["type"], (condition.get("status", ""), since))

    def _metadata(self) -> dict[str, dict[str, str]]:
        arch = _ARCHITECTURES.get(platform.machine(), platform.machine())
        labels = {
            "kubernetes.io/hostname": self._config.name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": arch,
            ACCELERATOR_LABEL: self._facts.accelerator,
        }
        overhead = f"{(GUEST_OVERHEAD + PROCESS_OVERHEAD) // MIB}Mi"
        return {"labels": labels | dict(self._config.labels), "annotations": {OVERHEAD_ANNOTATION: overhead}}

    # ---- its status --------------------------------------------------------------------------------------------------

    def status(self) -> Object:
        """As of now. Looks at the machine: a few ms."""
        capacity, allocatable = self._resources()
        addresses = [("InternalIP", self._config.address), ("Hostname", self._config.name)]
        return {
            "capacity": capacity,
            "allocatable": allocatable,
            "addresses": [{"type": kind, "address": address} for kind, address in addresses],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._config.port}},
            "nodeInfo": self._info(),
            "conditions": self._conditions(),
            "images": list(self._images())[:MAX_IMAGES],
        }

    def _resources(self) -> tuple[dict[str, str], dict[str, str]]:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = self._config.memory_bytes or total
        reserve = HOST_RESERVE if self._config.memory_bytes is None else 0
        disk = shutil.disk_usage(self._facts.state_dir).total
        capacity = {
            "cpu": str(self._config.cpus or os.cpu_count() or 1),
            "memory": f"{memory // 1024}Ki",
            "ephemeral-storage": f"{disk // 1024}Ki",
            "pods": str(self._config.max_pods),
        }
        usable = {"memory": f"{max(0, memory - reserve) // 1024}Ki", "ephemeral-storage": str(int(disk * 0.9))}
        return capacity, capacity | usable

    def _info(self) -> dict[str, str]:
        uname = os.uname()
        return {
            "machineID": _text("/etc/machine-id"),
            "systemUUID": _text("/etc/machine-id"),
            "bootID": _text("/proc/sys/kernel/random/boot_id"),
            "kernelVersion": uname.release,
            "osImage": _os_image(),
            "containerRuntimeVersion": self._facts.runtime,
            "kubeletVersion": f"v1.33.0+podvisor-{__version__}",
            "kubeProxyVersion": "",
            "operatingSystem": "linux",
            "architecture": _ARCHITECTURES.get(uname.machine, uname.machine),
        }

    def _conditions(self) -> list[Object]:
        disk = shutil.disk_usage(self._facts.state_dir)
        low_memory = available_memory() < HOST_RESERVE // 4
        low_disk = disk.free < disk.total * LOW_DISK
        low_pids = _free_pids() < LOW_PIDS
        pressure = {
            "MemoryPressure": (low_memory, "HasInsufficientMemory", "HasSufficientMemory", "memory"),
            "DiskPressure": (low_disk, "HasDiskPressure", "HasNoDiskPressure", "disk space"),
            "PIDPressure": (low_pids, "HasInsufficientPID", "HasSufficientPID", "process ids"),
        }
        conditions = [
            self._condition(kind, low, f"Kubelet{bad if low else good}", f"{'little' if low else 'enough'} {what} left")
            for kind, (low, bad, good, what) in pressure.items()
        ]
        return [*conditions, self._condition("Ready", True, "KubeletReady", "hostd takes pods")]

    def _condition(self, kind: str, met: bool, reason: str, message: str) -> Object:
        status = "True" if met else "False"
        moment = now()
        was, since = self._transitions.get(kind, ("", moment))
        if was != status:
            since = moment
        self._transitions[kind] = (status, since)
        return {
            "type": kind,
            "status": status,
            "reason": reason,
            "message": message,
            "lastHeartbeatTime": moment,
            "lastTransitionTime": since,
        }

    # ---- the Lease ---------------------------------------------------------------------------------------------------

    async def _renew(self) -> None:
        name = self._config.name
        spec = {"holderIdentity": name, "leaseDurationSeconds": self._beats.lease_duration_s}
        spec |= {"renewTime": now(micro=True)}
        try:
            await self._client.patch(LEASES, name, LEASE_NAMESPACE, {"spec": spec}, how="merge")
        except ApiError as e:
            if e.code != 404:
                raise
            await self.wait_registered()
            owner = {"apiVersion": "v1", "kind": "Node", "name": name, "uid": self._uid}
            metadata = {"name": name, "namespace": LEASE_NAMESPACE, "ownerReferences": [owner]}
            lease = {"apiVersion": LEASES.api_version, "kind": LEASES.kind, "metadata": metadata, "spec": spec}
            await self._client.create(LEASES, lease, LEASE_NAMESPACE)


def _without_heartbeats(status: Object) -> Object:
    conditions = [{k: v for k, v in c.items() if k != "lastHeartbeatTime"} for c in status["conditions"]]
    return status | {"conditions": conditions}


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _os_image() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


def _free_pids() -> float:
    """The free part of the machine's process ids."""
    try:
        limit = int(_text("/proc/sys/kernel/pid_max"))
        used = int(_text("/proc/loadavg").split()[3].partition("/")[2])
    except (ValueError, IndexError):
        return 1.0
    return 1 - used / limit
