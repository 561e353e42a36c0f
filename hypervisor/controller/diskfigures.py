"""What disks count, in one form whoever serves them: a pod's, by vmx or by QEMU, and the host's own that some process
has open.

What a VM's device process tells is not trusted: numbers are passed on, anything else counts as 0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hypervisor.errors import HvError
from hypervisor.vmm.argv import Disk
from hypervisor.vmm.config import DATA_SERIAL, ROOT_SERIAL
from hypervisor.vmm.vm import RunningVm

_REQUESTS = ("reads", "writes", "flushes", "discards", "write_zeroes")
_TYPES = ("read", "write", "flush", "discard", "zeroes")
_QEMU_REQUESTS = ("rd_operations", "wr_operations", "flush_operations", "unmap_operations")
_QEMU_ERRORS = tuple(f"{sort}_{kind}_operations" for sort in ("failed", "invalid") for kind in ("rd", "wr", "flush"))
_QEMU_TIMES = ("rd_total_time_ns", "wr_total_time_ns", "flush_total_time_ns")
_ASK_S = 2.0
_QEMU_S = 0.5
"""Less than a look at a VM may take: one whose QEMU is busy still has its other counters."""


def disk_names(disks: Iterable[Disk]) -> dict[str, str]:
    """By serial, what people call a VM's disks: ``root``, ``scratch``, ``image`` (or ``image-2``, ...)."""
    names = {ROOT_SERIAL: "root", DATA_SERIAL: "scratch"}
    images = [disk.serial for disk in disks if disk.path is not None and disk.serial not in names]
    return names | {serial: f"image-{i}" if i > 1 else "image" for i, serial in enumerate(images, 1)}


async def vm_disks(vm: RunningVm, vmx: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A VM's disks with what they count; empty where nobody answers.

    :param vmx: its vmx's counters
    """
    real = [disk for disk in vm.plan.disks if disk.path is not None]
    names = disk_names(vm.plan.disks)
    if vm.plan.block == "vmx":
        told = vmx.get("disks")
        told = told if isinstance(told, Mapping) else {}
        return [_named(names, disk, "vmx", _of_vmx(told[disk.serial])) for disk in real if disk.serial in told]
    try:
        async with asyncio.timeout(_QEMU_S):
            asked = await vm.execute("query-blockstats")
        by_node = {block.get("node-name"): block.get("stats") or {} for block in asked}
    except (HvError, TimeoutError, AttributeError, TypeError):
        return []
    found = ((disk, by_node.get(f"disk{disk.fd}", by_node.get(f"image{disk.fd}"))) for disk in real)
    return [_named(names, disk, "qemu", _of_qemu(stats)) for disk, stats in found if stats is not None]


def _named(names: Mapping[str, str], disk: Disk, server: str, counted: dict[str, Any]) -> dict[str, Any]:
    return {"name": names[disk.serial], "serial": disk.serial, "served_by": server, **counted}


def _of_vmx(told: Any) -> dict[str, Any]:
    filters = [f for f in _list(_get(told, "filters")) if isinstance(f, Mapping)]
    return counted(told, ((f.get("name"), f.get("figures")) for f in filters))


def counted(figures: Any, filters: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """A disk's figures and its filters' (name and figures, from the guest to the data) in the form of this module.

    Latencies are those of the first filter that measures them (``stats``); None where there is none.
    """
    known = {str(name): told for name, told in filters if isinstance(told, Mapping)}
    measured = next((told for told in known.values() if any(f"{t}_latency_sum_ns" in told for t in _TYPES)), None)
    return {
        "requests": _sum(figures, _REQUESTS),
        "read_bytes": _number(figures, "read_bytes"),
        "written_bytes": _number(figures, "written_bytes"),
        "redirects": _number(figures, "redirects_out"),
        "errors": _number(figures, "errors"),
        "latency_ns": None if measured is None else _mean(measured),
        "latency_p99_ns": None if measured is None else max(_number(measured, f"{t}_latency_p99_ns") for t in _TYPES),
        "filters": list(known),
    }


def _mean(measured: Mapping[str, Any]) -> int:
    requests = _sum(measured, (f"{t}_requests" for t in _TYPES))
    return _sum(measured, (f"{t}_latency_sum_ns" for t in _TYPES)) // max(1, requests)


def _of_qemu(stats: Any) -> dict[str, Any]:
    requests = _sum(stats, _QEMU_REQUESTS)
    return {
        "requests": requests,
        "read_bytes": _number(stats, "rd_bytes"),
        "written_bytes": _number(stats, "wr_bytes"),
        "redirects": 0,
        "errors": _sum(stats, _QEMU_ERRORS),
        "latency_ns": _sum(stats, _QEMU_TIMES) // max(1, requests),
        "latency_p99_ns": None,
        "filters": [],
    }


async def open_disks(root: Path) -> list[dict[str, Any]]:
    """The host's own disks (``hv disk``) that a process has open, with what they count."""
    sockets = await asyncio.to_thread(lambda: sorted(root.glob("*/control.sock")))
    found = await asyncio.gather(*(asyncio.to_thread(_open_disk, path.parent) for path in sockets))
    return [disk for disk in found if disk is not None]


def _open_disk(folder: Path) -> dict[str, Any] | None:
    from hypervisor.iofilter.control import ask  # only where there is such a disk

    try:
        told = ask(folder, {"op": "info"}, timeout=_ASK_S)
        filters = told["filters"].items()
        return {"name": folder.name, **counted(told["figures"], filters)}
    except (HvError, KeyError, TypeError, AttributeError):
        return None


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any, key: str) -> int:
    found = _get(value, key)
    return found if type(found) is int and found >= 0 else 0


def _sum(value: Any, keys: Iterable[str]) -> int:
    return sum(_number(value, key) for key in keys)
