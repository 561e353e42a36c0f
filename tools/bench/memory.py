"""Memory of idle pod VMs: proportional set size of QEMU and vmx (both map guest RAM), clones beside cold VMs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from host import Host, fresh_host
from measure import Figure

COUNT = 20
SETTLE_S = 5.0
PAGE_MIB = 4096 / 2**20


def run(_rounds: int) -> list[Figure]:
    """`COUNT` clones, then as many cold VMs, each idle with one sleeping container; one kind at a time."""
    with fresh_host("busybox") as host:
        host.run("run", "--rm", "busybox", "--", "true")  # makes the template, and records the working set
        clones = _idle_vms(host)
        cold = _idle_vms(host, "--cold")
    touched = tuple(_touched_mib(vm) for vm in clones)
    clone_pss, cold_pss = (tuple(vm["pss_mib"] for vm in vms) for vms in (clones, cold))
    ratio = 100 * sum(clone_pss) / sum(cold_pss)
    return [
        Figure(f"PSS of a whole idle pod VM, one of {COUNT} clones", "MiB", clone_pss, bar=64.0),
        Figure(f"PSS of one of {COUNT} cold VMs", "MiB", cold_pss),
        Figure("clones' PSS over cold VMs'", "%", (ratio,), bar=40.0),
        Figure("guest RAM that an idle clone has, prefetch included", "MiB", touched, bar=32.0),
    ]


def _idle_vms(host: Host, *options: str) -> list[dict[str, Any]]:
    names = [f"idle-{i}" for i in range(COUNT)]
    for name in names:
        host.run("run", "-d", *options, "--name", name, "busybox", "--", "sleep", "100000")
    time.sleep(SETTLE_S)
    vms: list[dict[str, Any]] = [pod["vm"] for pod in json.loads(host.run("top", "-o", "json").stdout)["pods"]]
    for vm in vms:
        vm["pss_mib"] = sum(_pss_mib(pid) for pid in vm["pids_of"].values())
    for name in names:
        host.run("rm", "-f", name)
    return vms


def _touched_mib(vm: dict[str, Any]) -> float:
    ram = vm["vmx"]["ram"]
    return float((ram["pages_copied"] + ram["pages_zeroed"]) * PAGE_MIB)


def _pss_mib(pid: int) -> float:
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("Pss:")) / 1024
