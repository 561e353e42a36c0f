"""Memory of idle pod VMs: proportional set size of QEMU and vmx by what it is for, clones beside cold VMs."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

from host import Host, fresh_host
from measure import Figure
from residence import RAM, vm_parts_mib

COUNT = 20
SETTLE_S = 5.0
TRIM_PATIENCE_S = 180.0
"""Until all clones have given back what was translated for them: they do when they have idled for 20 s."""
PAGE_MIB = 4096 / 2**20


def run(_rounds: int) -> list[Figure]:
    """`COUNT` clones, then as many cold VMs, each idle with one sleeping container; one kind at a time."""
    with fresh_host("busybox") as host:
        host.run("run", "--rm", "busybox", "--", "true")  # makes the template, and records the working set
        names = _start(host)
        fresh = _look(host)
        _until_trimmed(host)
        clones = [vm | {"parts": vm_parts_mib(vm["pids_of"])} for vm in fresh]
        _remove(host, names)
        names = _start(host, "--cold")
        cold = _look(host)
        _remove(host, names)
    ratio = 100 * sum(_pss(clones)) / sum(_pss(cold))
    return [
        Figure(f"PSS of a whole idle pod VM, one of {COUNT} clones", "MiB", _pss(clones), bar=64.0),
        Figure("the same, 5 s after its start, before it gave back translated code", "MiB", _pss(fresh)),
        Figure(f"PSS of one of {COUNT} cold VMs", "MiB", _pss(cold)),
        Figure("clones' PSS over cold VMs'", "%", (ratio,), bar=40.0),
        Figure("guest RAM that an idle clone has, prefetch included", "MiB", _touched(clones), bar=32.0),
        *_part_figures("idle clone", clones),
        *_part_figures("clone 5 s after its start", fresh),
        *_part_figures("cold VM", cold),
    ]


def _start(host: Host, *options: str) -> list[str]:
    names = [f"idle-{i}" for i in range(COUNT)]
    for name in names:
        host.run("run", "-d", *options, "--name", name, "busybox", "--", "sleep", "100000")
    time.sleep(SETTLE_S)
    return names


def _remove(host: Host, names: list[str]) -> None:
    for name in names:
        host.run("rm", "-f", name)


def _vms(host: Host) -> list[dict[str, Any]]:
    return [pod["vm"] for pod in json.loads(host.run("top", "-o", "json").stdout)["pods"]]


def _look(host: Host) -> list[dict[str, Any]]:
    vms = _vms(host)
    for vm in vms:
        vm["parts"] = vm_parts_mib(vm["pids_of"])
    return vms


def _until_trimmed(host: Host) -> None:
    """By the daemon's log: `hv top` would ask the agents, and they would wake their guests."""
    deadline = time.monotonic() + TRIM_PATIENCE_S
    while len(_trimmed(host)) < COUNT:
        if time.monotonic() > deadline:
            print(f"memory: of {COUNT} clones that idle {len(_trimmed(host))} were trimmed; is the machine busy?")
            break
        time.sleep(1)
    time.sleep(SETTLE_S)


def _trimmed(host: Host) -> set[str]:
    """Names of the VMs that were trimmed once or more."""
    lines = (json.loads(x) for x in (host.state / "hostd.log").read_text().splitlines() if x.startswith("{"))
    return {line["vm"] for line in lines if line.get("event") == "idle guest trimmed"}


def _pss(vms: list[dict[str, Any]]) -> tuple[float, ...]:
    return tuple(float(vm["parts"].total()) for vm in vms)


def _part_figures(kind: str, vms: list[dict[str, Any]]) -> list[Figure]:
    rows: list[Counter[str]] = [vm["parts"] for vm in vms]
    names = sorted(set().union(*rows), key=lambda name: (name != RAM, name))
    return [Figure(f"{kind}: {name}", "MiB", tuple(float(row[name]) for row in rows)) for name in names]


def _touched(vms: list[dict[str, Any]]) -> tuple[float, ...]:
    rams = [vm["vmx"]["ram"] for vm in vms]
    return tuple(float((ram["pages_copied"] + ram["pages_zeroed"]) * PAGE_MIB) for ram in rams)
