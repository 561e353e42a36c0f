"""``/metrics`` of a host: each pod VM's counters in Prometheus' format (docs/metrics.md).

A look asks every VM at the same time and gives each `PATIENCE_S`; one that does not answer has ``podvisor_vm_up`` 0 and
no counters, and costs the others nothing. What vmx tells is not trusted: it becomes numbers or is left out. The number
of series is bounded: a fixed set for each pod VM that is there, buckets included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from aiohttp import web
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from hypervisor.controller.diskfigures import open_disks
from hypervisor.controller.pods import Pods
from hypervisor.controller.podvm import PodVm
from hypervisor.errors import HvError

PATIENCE_S = 1.0
LABELS = ("namespace", "pod", "uid")
_DISK_LABELS = (*LABELS, "disk")
LATENCY_BITS = range(10, 31, 2)
"""Upper bounds of the latency's buckets, as powers of two of nanoseconds: 1 us to 1.1 s."""
_NS = 1e-9

_COUNTER, _GAUGE = CounterMetricFamily, GaugeMetricFamily
_ROWS: tuple[tuple[type[Metric], str, tuple[str, ...], float, str], ...] = (
    (_COUNTER, "cpu_seconds", ("cpu_ns",), _NS, "CPU time that the VM's processes took."),
    (_GAUGE, "memory_bytes", ("memory_bytes",), 1, "Host memory charged to the VM's cgroup."),
    (_GAUGE, "memory_peak_bytes", ("memory_peak",), 1, "The most that it has been."),
    (_GAUGE, "processes", ("pids",), 1, "Threads and processes of the VM on its host."),
    (_COUNTER, "vmx_replacements", ("vmx_replaced",), 1, "Times that a killed vmx was replaced."),
    (_COUNTER, "trims", ("trims",), 1, "Times that the VM gave back translated code, for it idled."),
    (_COUNTER, "faults", ("vmx", "ram", "faults"), 1, "Page faults that vmx served."),
    (_COUNTER, "filled_bytes", ("vmx", "ram", "bytes"), 1, "Guest RAM filled, by faults and prefetch."),
    (_COUNTER, "copied_pages", ("vmx", "ram", "pages_copied"), 1, "Pages filled with a template's data."),
    (_COUNTER, "zeroed_pages", ("vmx", "ram", "pages_zeroed"), 1, "Pages filled with zeroes."),
    (_COUNTER, "prefetched_pages", ("vmx", "ram", "prefetched"), 1, "Pages filled before they were touched."),
    (_COUNTER, "prefetch_hits", ("vmx", "ram", "prefetch_hits"), 1, "Faults whose page had been prefetched meanwhile."),
    (_GAUGE, "working_set_pages", ("vmx", "ram", "working_set_pages"), 1, "Pages in the recorded working set."),
    (_GAUGE, "mapped_pages", ("vmx", "ram", "mapped_pages"), 1, "Pages in the VM's page table."),
    (_GAUGE, "page_table_bytes", ("vmx", "ram", "table_bytes"), 1, "Memory of the VM's page table."),
    (_GAUGE, "vads", ("frames", "vads"), 1, "Virtual address descriptors that the VM's RAM is mapped by."),
    (_GAUGE, "page_frames", ("frames", "entries"), 1, "Page-frame entries that the VM's pages lead to."),
    (_GAUGE, "shared_page_frames", ("frames", "shared"), 1, "Of these, entries that other VMs use too."),
    (_GAUGE, "vsock_connections", ("vmx", "vsock", "connections"), 1, "vsock connections open now."),
    (_GAUGE, "vsock_buffered_bytes", ("vmx", "vsock", "buffered_bytes"), 1, "The guest's data held for slow readers."),
    (_COUNTER, "vsock_opened_by_host", ("vmx", "vsock", "opened_by_host"), 1, "Connections opened by the host."),
    (_COUNTER, "vsock_opened_by_guest", ("vmx", "vsock", "opened_by_guest"), 1, "Connections opened by the guest."),
    (_COUNTER, "vsock_refused", ("vmx", "vsock", "refused"), 1, "Connects that came to nothing."),
    (_COUNTER, "vsock_resets_sent", ("vmx", "vsock", "resets_sent"), 1, "Connections reset by the host's side."),
    (_COUNTER, "vsock_resets_received", ("vmx", "vsock", "resets_received"), 1, "Connections reset by the guest."),
    (_COUNTER, "vsock_to_guest_bytes", ("vmx", "vsock", "bytes_to_guest"), 1, "Data carried to the guest."),
    (_COUNTER, "vsock_to_host_bytes", ("vmx", "vsock", "bytes_to_host"), 1, "Data carried to the host."),
    (_COUNTER, "vsock_to_guest_packets", ("vmx", "vsock", "packets_to_guest"), 1, "Packets to the guest."),
    (_COUNTER, "vsock_from_guest_packets", ("vmx", "vsock", "packets_from_guest"), 1, "Packets from the guest."),
    (_COUNTER, "vsock_bad_packets", ("vmx", "vsock", "bad_packets"), 1, "Packets dropped as malformed."),
    (_COUNTER, "vsock_kicks", ("vmx", "vsock", "kicks"), 1, "Notifications from the guest."),
    (_COUNTER, "vsock_interrupts", ("vmx", "vsock", "interrupts"), 1, "Notifications to the guest."),
    (_COUNTER, "percpu_commits", ("vmx", "percpu", "commits"), 1, "Per-CPU sequences that vmx committed."),
    (_COUNTER, "percpu_restarts", ("vmx", "percpu", "restarts"), 1, "Per-CPU sequences that vmx began again."),
    (_GAUGE, "percpu_memory_bytes", ("vmx", "percpu", "memory_bytes"), 1, "Memory of vmx's per-CPU areas."),
)  # fmt: skip
_DISK_ROWS: tuple[tuple[str, str, str], ...] = (
    ("requests", "requests", "Requests of the guest to this disk."),
    ("read_bytes", "read_bytes", "Bytes read from it."),
    ("written_bytes", "written_bytes", "Bytes written to it."),
    ("redirects", "redirects", "Requests that its chain redirected to another disk's."),
    ("errors", "errors", "Requests that failed."),
)
_DISK_LATENCIES = (
    ("latency_seconds", "latency_ns", "Mean time that a request took, where somebody measures it."),
    (
        "latency_p99_seconds",
        "latency_p99_ns",
        "What 99 of 100 requests stayed below, where a stats filter measures it.",
    ),
)
_HOST_ROWS = (
    ("vads", ("page_frames", "vads"), "Virtual address descriptors in the host's page-frame database."),
    ("vad_bytes", ("page_frames", "vad_bytes"), "Their memory."),
    ("page_frames", ("page_frames", "pfes"), "Page-frame entries in the host's page-frame database."),
    ("page_frame_bytes", ("page_frames", "pfe_bytes"), "Their memory."),
    ("warm_vms_wanted", ("pool", "wanted"), "Clones that the warm pool is to hold."),
    ("warm_vms_ready", ("pool", "ready"), "Clones that a pod could take now."),
    ("warm_vms_memory_bytes", ("pool", "memory_bytes"), "Host memory that the pool's clones use."),
)
_POOL_COUNTERS = (
    ("warm_vms_taken", "taken", "Pods that took their VM from the warm pool."),
    ("warm_vms_missed", "missed", "Pods that would have fitted and found no clone ready."),
    ("warm_vms_given_up", "given_up", "Clones that were ended for want of memory, or because they had gone stale."),
)


class Look(Collector):
    """What one look found. A `Collector` because that is what writes each of Prometheus' formats."""

    def __init__(
        self,
        vms: list[tuple[tuple[str, ...], Mapping[str, Any]]],
        host: Mapping[str, Any],
        disks: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._vms = vms
        self._disks = disks
        self._host = host

    def collect(self) -> Iterable[Metric]:
        """Every family, also those without a sample."""
        up = GaugeMetricFamily("podvisor_vm_up", "Whether the VM's device process answered this look.", labels=LABELS)
        for labels, stats in self._vms:
            up.add_metric(labels, float(bool(stats.get("vmx"))))
        yield up
        for kind, name, path, unit, text in _ROWS:
            family: Any = kind(f"podvisor_vm_{name}", text, labels=LABELS)  # type: ignore[call-arg]
            for labels, stats in self._vms:
                if (value := number(stats, path)) is not None:
                    family.add_metric(labels, value * unit)
            yield family
        yield self._latency()
        yield from self._disk_families()
        yield from self._host_families()

    def _latency(self) -> Metric:
        text = "From reading a page fault to waking whoever touched the page."
        family = HistogramMetricFamily("podvisor_vm_fault_duration_seconds", text, labels=LABELS)
        for labels, stats in self._vms:
            ram = (stats.get("vmx") or {}).get("ram")
            if isinstance(ram, dict) and isinstance(ram.get("latency"), list):
                # A vmx of an earlier version does not tell the sum; then there is no count either.
                total = number(ram, ("latency_ns",))
                family.add_metric(labels, list(buckets(ram["latency"])), None if total is None else total * _NS)
        return family

    def _disk_families(self) -> Iterator[Metric]:
        """Of pods' disks; those of the host's own that are open have empty labels but ``disk``."""
        own: list[tuple[tuple[str, ...], Any]] = [(("", "", "", str(disk["name"])), disk) for disk in self._disks]
        of_vms = [((*labels, str(d["name"])), d) for labels, stats in self._vms for d in stats.get("disks") or ()]
        for name, key, text in _DISK_ROWS:
            yield _disk_family(
                CounterMetricFamily(f"podvisor_disk_{name}", text, labels=_DISK_LABELS), own + of_vms, key
            )
        for name, key, text in _DISK_LATENCIES:
            family = GaugeMetricFamily(f"podvisor_disk_{name}", text, labels=_DISK_LABELS)
            yield _disk_family(family, own + of_vms, key, _NS)

    def _host_families(self) -> Iterator[Metric]:
        for name, path, text in _HOST_ROWS:
            if (value := number(self._host, path)) is not None:
                yield GaugeMetricFamily(f"podvisor_host_{name}", text, value=value)
        for name, key, text in _POOL_COUNTERS:
            if (value := number(self._host, ("pool", key))) is not None:
                yield CounterMetricFamily(f"podvisor_host_{name}", text, value=value)


def _disk_family(family: Any, disks: Iterable[tuple[tuple[str, ...], Any]], key: str, unit: float = 1) -> Metric:
    for labels, disk in disks:
        if (value := number(disk, (key,))) is not None:
            family.add_metric(labels, value * unit)
    return cast(Metric, family)


def number(stats: Mapping[str, Any], path: Iterable[str]) -> float | None:
    """What stands at `path`, if it is a number."""
    found: Any = stats
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def buckets(latency: list[Any]) -> Iterator[tuple[str, float]]:
    """Counts by powers of two of nanoseconds, as Prometheus wants them: bounds in seconds, counts summed up."""
    counts = [n if isinstance(n, int) and n >= 0 else 0 for n in latency[:64]]
    for bits in LATENCY_BITS:
        yield f"{2**bits * _NS:.6g}", float(sum(counts[: bits + 1]))
    yield "+Inf", float(sum(counts))


async def look(pods: Pods) -> Look:
    """Asks every VM, at most `PATIENCE_S`."""
    alive = [pod for pod in pods if pod.machine is not None]
    found = await asyncio.gather(*(_stats(pod) for pod in alive))
    labels = [(pod.pod.namespace, pod.pod.name, pod.stored.uid) for pod in alive]
    share_frames(found)
    disks = await open_disks(pods.disks)
    return Look(list(zip(labels, found, strict=True)), pods.host_usage(), disks)


async def _stats(pod: PodVm) -> dict[str, Any]:
    machine = pod.machine
    if machine is None:
        return {}
    try:
        async with asyncio.timeout(PATIENCE_S):
            return dict(await machine.stats())
    except (HvError, TimeoutError, OSError):
        return {}


def share_frames(found: Iterable[dict[str, Any]]) -> None:
    """Sets ``frames.shared`` of each VM: the page-frame entries that it has in common with another of them."""
    frames = [vm["frames"] for vm in found if vm.get("frames")]
    users: dict[str, int] = {}
    for one in frames:
        users[one["template"]] = users.get(one["template"], 0) + 1
    for one in frames:
        one["shared"] = one["entries"] if users[one["template"]] > 1 else 0


def add_metrics_route(app: web.Application, pods: Pods) -> None:
    """``GET /metrics``, in the format that the scraper prefers."""

    async def metrics(request: web.Request) -> web.Response:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(await look(pods))
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    app.router.add_get("/metrics", metrics)
