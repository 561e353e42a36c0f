"""What a node and its pods use, in a kubelet's forms: ``/stats/summary`` and ``/metrics/resource``.

A pod's figures are the host's view of its VM (QEMU and vmx: what it costs), a container's the guest's (what runs in
it). Nothing is sampled in the background: a rate is taken between this look and the one before, and at the first
since the start.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hypervisor.controller.pods import Pods
from hypervisor.controller.top import usage

FRESH_S = 2.0
"""A look that is younger is given again: rates over less would be noise."""
NS = 1_000_000_000
Key = tuple[str, ...]


class Sample(NamedTuple):
    """A cumulative counter at a time, both in nanoseconds."""

    at: int
    cpu: int


class Look(NamedTuple):
    """Everything at one time.

    :ivar summary: the ``stats/summary`` document
    :ivar samples: by () for the node, (namespace, pod) and (namespace, pod, container)
    """

    at: float
    summary: dict[str, Any]
    samples: dict[Key, Sample]


class NodeStats:
    """The figures of one node. For one event loop; many may ask at once, one look is taken for all of them."""

    def __init__(self, pods: Pods, node: str, folder: Path) -> None:
        self._pods = pods
        self._node = node
        self._folder = folder
        self._last: Look | None = None
        self._looking = asyncio.Lock()

    async def summary(self) -> dict[str, Any]:
        """The ``stats/summary`` document."""
        async with self._looking:
            if self._last is None or time.monotonic() - self._last.at > FRESH_S:
                self._last = await self._look()
            return self._last.summary

    async def _look(self) -> Look:
        views = {(p.pod.namespace, p.pod.name): p.view() for p in self._pods}
        found = await usage(self._pods)
        taker = _Taker(self._last.samples if self._last else {}, time.time_ns())
        disk = _file_system(self._folder, rfc3339(taker.now))
        more = {"fs": disk, "runtime": {"imageFs": disk}}
        node = {"nodeName": self._node, **more, **taker.figures((), *await asyncio.to_thread(_machine), _boot_ns())}
        pods = [_pod(taker, views.get((p["namespace"], p["name"]), {}), p) for p in found["pods"]]
        taps = {(p.pod.namespace, p.pod.name): p.machine.tap[0] for p in self._pods if p.machine and p.machine.tap}
        for pod in pods:
            tap = taps.get((pod["podRef"]["namespace"], pod["podRef"]["name"]))
            if tap is not None and (counted := interface_counters(tap)):
                pod["network"] = {"time": rfc3339(taker.now), **counted, "interfaces": [counted]}
        return Look(time.monotonic(), {"node": node, "pods": pods}, taker.samples)


class _Taker:
    """Rates between the samples before and those of this look."""

    def __init__(self, before: Mapping[Key, Sample], now: int) -> None:
        self._before = before
        self.now = now
        self.samples: dict[Key, Sample] = {}

    def figures(self, key: Key, cpu_ns: int, memory: int, started_ns: int) -> dict[str, Any]:
        """``startTime``, ``cpu`` and ``memory`` of one thing, and how long the rate was taken over."""
        sample = self.samples[key] = Sample(self.now, cpu_ns)
        before = self._before.get(key)
        if before is None or before.cpu > cpu_ns:  # another one of that name has begun
            before = Sample(started_ns, 0)
        window = max(1, sample.at - before.at)
        at = rfc3339(self.now)
        return {
            "startTime": rfc3339(started_ns),
            "cpu": {
                "time": at,
                "usageNanoCores": (cpu_ns - before.cpu) * NS // window,
                "usageCoreNanoSeconds": cpu_ns,
            },
            "memory": {"time": at, "usageBytes": memory, "workingSetBytes": memory},
            "windowSeconds": round(window / NS, 3),
        }


def _pod(taker: _Taker, view: Mapping[str, Any], used: Mapping[str, Any]) -> dict[str, Any]:
    where = (str(used["namespace"]), str(used["name"]))
    status: Mapping[str, Any] = view.get("status") or {}
    metadata: Mapping[str, Any] = view.get("metadata") or {}
    began = _parsed(status.get("startTime"))
    starts = {
        str(c.get("name")): ((c.get("state") or {}).get("running") or {}).get("startedAt")
        for c in status.get("containerStatuses") or ()
    }
    vm, at = used["vm"], rfc3339(taker.now)
    return {
        "podRef": {"name": where[1], "namespace": where[0], "uid": metadata.get("uid", "")},
        **taker.figures(where, int(vm.get("cpu_ns") or 0), int(vm.get("memory_bytes") or 0), began),
        "containers": [
            {
                "name": name,
                **taker.figures((*where, name), c["cpu_ns"], c["memory_bytes"], _parsed(starts[name])),
                "rootfs": {"time": at, "usedBytes": int(c.get("disk_bytes") or 0)},
                "logs": {"time": at, "usedBytes": int(c.get("log_bytes") or 0)},
            }
            for name, c in used["containers"].items()
            if starts.get(name)
        ],
        "volume": [
            {
                "name": name,
                "time": at,
                "usedBytes": v["used_bytes"],
                "capacityBytes": v["capacity_bytes"],
                "availableBytes": max(0, v["capacity_bytes"] - v["used_bytes"]),
            }
            for name, v in used["volumes"].items()
        ],
        "ephemeral-storage": _pod_disk(used.get("guest") or {}, at),
    }


def interface_counters(tap: str, root: Path = Path("/sys/class/net")) -> dict[str, Any]:
    """What went through a pod's interface, as the pod sees it: the host receives what it sends. Empty: it is gone."""
    folder = root / tap / "statistics"
    names = {"rxBytes": "tx_bytes", "rxErrors": "tx_errors", "txBytes": "rx_bytes", "txErrors": "rx_errors"}
    try:
        return {"name": "eth0", **{name: int((folder / file).read_text()) for name, file in names.items()}}
    except (OSError, ValueError):
        return {}


def _pod_disk(guest: Mapping[str, Any], at: str) -> dict[str, Any]:
    """The pod's disk, which is its VM's own: all that its containers write lies on it."""
    whole, used = int(guest.get("disk_total") or 0), int(guest.get("disk_used") or 0)
    return {"time": at, "usedBytes": used, "capacityBytes": whole, "availableBytes": whole - used}


def _file_system(folder: Path, at: str) -> dict[str, Any]:
    """The host's, that pods' disks and images lie on."""
    space = os.statvfs(folder)
    sizes = {
        "capacityBytes": space.f_blocks,
        "availableBytes": space.f_bavail,
        "usedBytes": space.f_blocks - space.f_bfree,
    }
    inodes = {"inodes": space.f_files, "inodesFree": space.f_ffree, "inodesUsed": space.f_files - space.f_ffree}
    return {"time": at, **{name: blocks * space.f_frsize for name, blocks in sizes.items()}, **inodes}


def _machine() -> tuple[int, int]:
    """CPU time (ns) since boot and memory in use (bytes) of this machine."""
    ticks = [int(t) for t in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]  # less idle and iowait
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(memory[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return busy * (NS // 100), total - available


def _boot_ns() -> int:
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def rfc3339(ns: int) -> str:
    """A time in whole seconds."""
    return datetime.fromtimestamp(ns // NS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _parsed(text: str | None) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * NS if text else time.time_ns()


def resource_metrics(summary: Mapping[str, Any]) -> bytes:
    """The same as ``/metrics/resource``, in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Families(list(_families(summary))))
    return generate_latest(registry)


_Rows = list[tuple[tuple[str, ...], Mapping[str, Any]]]


class _Families:
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _families(summary: Mapping[str, Any]) -> Iterator[Metric]:
    node: _Rows = [((), summary["node"])]
    pods: _Rows = [((p["podRef"]["namespace"], p["podRef"]["name"]), p) for p in summary["pods"]]
    containers: _Rows = [((c["name"], *where), c) for where, p in pods for c in p["containers"]]
    rows: dict[str, tuple[tuple[str, ...], _Rows]] = {
        "node": ((), node),
        "pod": (("namespace", "pod"), pods),
        "container": (("container", "namespace", "pod"), containers),
    }
    for name, (labels, found) in rows.items():
        cpu = CounterMetricFamily(f"{name}_cpu_usage_seconds", f"CPU time that the {name} has taken", labels=labels)
        memory = GaugeMetricFamily(f"{name}_memory_working_set_bytes", f"Memory of the {name}", labels=labels)
        for values, figures in found:
            cpu.add_metric(values, figures["cpu"]["usageCoreNanoSeconds"] / NS)
            memory.add_metric(values, figures["memory"]["workingSetBytes"])
        yield cpu
        yield memory
    yield GaugeMetricFamily("resource_scrape_error", "1 if there was an error while figures were taken", value=0)
