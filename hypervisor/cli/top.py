"""``hv top``: what pods use."""

from __future__ import annotations

from typing import Any

import click

from hypervisor.cli import output
from hypervisor.cli.app import Settings, pass_settings

HEADER = ("POD", "CONTAINER", "CPU TIME", "MEMORY", "PEAK", "PROCESSES", "DISK", "FAULTS", "FILLED")


DISK_HEADER = (
    "POD", "DISK", "SERVED BY", "REQUESTS", "READ", "WRITTEN", "REDIRECTS", "ERRORS", "LATENCY", "P99", "FILTERS",
)  # fmt: skip


@click.command("top")
@click.option("--disks", is_flag=True, help="Show virtual disks: requests, bytes, redirects, latency.")
@output.format_option("table", "json", "yaml")
@pass_settings
def top(settings: Settings, disks: bool, output: str) -> None:
    """Show what pods use: CPU, memory, processes, disk.

    One line for each pod's VM as the host sees it, one for each of its containers as the guest sees it. With --disks,
    one for each disk of a pod, and for each of the host's own that is open. -o json and -o yaml have all of it.
    """
    with settings.connect_any() as connection:
        answer = connection.get("hv", "v1", "top")
    (print_disks if disks else print_top)(answer, output)


def print_disks(answer: dict[str, Any], fmt: str) -> None:
    """Prints the disks of hostd's answer in a format."""
    rows = [
        _disk_row(_shown(pod), d) for pod in answer.get("pods") or () for d in (pod.get("vm") or {}).get("disks") or ()
    ]
    rows += [_disk_row("(host)", disk) for disk in answer.get("disks") or ()]
    output.show(answer, fmt, names=(), header=DISK_HEADER, rows=rows)


def _disk_row(pod: str, disk: dict[str, Any]) -> list[str]:
    counts = [str(disk.get(key, "-")) for key in ("redirects", "errors")]
    read, written = output.size(disk.get("read_bytes")), output.size(disk.get("written_bytes"))
    times = [_milliseconds(disk.get(key)) for key in ("latency_ns", "latency_p99_ns")]
    filters = ",".join(disk.get("filters") or ()) or "-"
    served = str(disk.get("served_by") or "itself")
    return [pod, str(disk.get("name")), served, str(disk.get("requests", "-")), read, written, *counts, *times, filters]


def _milliseconds(nanoseconds: int | None) -> str:
    return "-" if nanoseconds is None else f"{nanoseconds / 1e6:.2f}ms"


def _shown(pod: dict[str, Any]) -> str:
    namespace, name = pod.get("namespace") or "default", str(pod.get("name"))
    return name if namespace == "default" else f"{namespace}/{name}"


def print_top(answer: dict[str, Any], fmt: str) -> None:
    """Prints hostd's answer in a format."""
    rows = [row for pod in answer.get("pods") or () for row in _rows(pod)] + _pool_rows(answer.get("host") or {})
    output.show(answer, fmt, names=(), header=HEADER, rows=rows)


def _rows(pod: dict[str, Any]) -> list[list[str]]:
    shown = _shown(pod)
    rows = [_row(shown, "(VM)", pod.get("vm") or {})]
    return rows + [_row(shown, c, stats or {}) for c, stats in (pod.get("containers") or {}).items()]


def _pool_rows(host: dict[str, Any]) -> list[list[str]]:
    pool = host.get("pool")
    if not pool:
        return []
    what = f"{pool.get('ready')} of {pool.get('wanted')} VMs ready"
    return [_row("(warm pool)", what, {"memory_bytes": pool.get("memory_bytes")})]


def _row(pod: str, what: str, stats: dict[str, Any]) -> list[str]:
    cpu = stats.get("cpu_ns")
    pids = stats.get("pids")
    ram = (stats.get("vmx") or {}).get("ram") or {}
    return [
        pod,
        what,
        "-" if cpu is None else f"{cpu / 1e9:.2f}s",
        output.size(stats.get("memory_bytes")),
        output.size(stats.get("memory_peak")),
        "-" if pids is None else str(pids),
        output.size(stats.get("disk_bytes")),
        "-" if ram.get("faults") is None else str(ram["faults"]),
        output.size(ram.get("bytes")),
    ]
