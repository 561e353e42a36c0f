"""What the hypervisor itself sees of a pod's VM, over QMP and from its vmx: for ``hv inspect``.

Nothing in the guest takes part, so it also answers for a guest that hangs. Only reading commands are sent; the VM is
not paused, so registers are those of a moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypervisor.controller.machine import Machine
from hypervisor.controller.podvm import PodVm
from hypervisor.errors import HvError, Unavailable

_MONITOR = {"registers": "info registers -a", "memory_map": "info mtree -f", "devices": "info qtree"}
"""What QMP has no command of its own for: the human monitor's text, line by line."""
_QUERIES = {
    "status": "query-status",
    "vcpus": "query-cpus-fast",
    "memory": "query-memory-size-summary",
    "block": "query-block",
    "block_counters": "query-blockstats",
    "virtio": "x-query-virtio",
}
MAX_LINES = 2000


async def inspect(pod: PodVm) -> dict[str, Any]:
    """The answer to ``GET /hv/v1/pods/NS/POD/inspect``; what cannot be had is named under ``errors``.

    :raises Unavailable: the pod has no VM now
    """
    machine = pod.machine
    if machine is None:
        raise Unavailable(f"pod {pod.pod.name} has no running VM")
    found: dict[str, Any] = {"errors": {}}
    try:
        found["vm"] = dict(await machine.stats())
    except (HvError, OSError) as e:
        found["errors"]["vm"] = str(e)
    for name, command in _QUERIES.items():
        await _ask(machine, found, name, command, None)
    for name, line in _MONITOR.items():
        await _ask(machine, found, name, "human-monitor-command", {"command-line": line})
        if isinstance(found.get(name), str):
            found[name] = found[name].replace("\r", "").split("\n")[:MAX_LINES]
    return found


async def _ask(
    machine: Machine, found: dict[str, Any], name: str, command: str, arguments: Mapping[str, object] | None
) -> None:
    try:
        found[name] = await machine.execute(command, arguments)
    except HvError as e:
        found["errors"][name] = str(e)
