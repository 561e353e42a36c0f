"""``hv top``: what pods use."""

from __future__ import annotations

from typing import Any

import click

from hypervisor.cli import output
from hypervisor.cli.app import Settings, pass_settings

HEADER = ("POD", "CONTAINER", "CPU TIME", "MEMORY", "PEAK", "PROCESSES", "DISK", "FAULTS", "FILLED")


@click.command("top")
@output.format_option("table", "json", "yaml")
@pass_settings
def top(settings: Settings, output: str) -> None:
    """Show what pods use: CPU, memory, processes, disk.

    One line for each pod's VM as the host sees it, one for each of its containers as the guest sees it.
    """
    with settings.connect_any() as connection:
        answer = connection.get("hv", "v1", "top")
    print_top(answer, output)


def print_top(answer: dict[str, Any], fmt: str) -> None:
    """Prints hostd's answer in a format."""
    rows = [row for pod in answer.get("pods") or () for row in _rows(pod)] + _pool_rows(answer.get("host") or {})
    output.show(answer, fmt, names=(), header=HEADER, rows=rows)


def _rows(pod: dict[str, Any]) -> list[list[str]]:
    namespace, name = pod.get("namespace") or "default", str(pod.get("name"))
    shown = name if namespace == "default" else f"{namespace}/{name}"
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
