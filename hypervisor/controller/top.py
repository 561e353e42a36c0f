"""What pods use, for ``hv top``: each VM as the host sees it, each container as the guest does."""

from __future__ import annotations

import asyncio
from typing import Any

from hypervisor.controller.diskfigures import open_disks
from hypervisor.controller.metrics import share_frames
from hypervisor.controller.pods import Pods
from hypervisor.controller.podvm import PodVm
from hypervisor.errors import HvError

PATIENCE_S = 2.0


async def usage(pods: Pods) -> dict[str, Any]:
    """The answer to ``GET /hv/v1/top``. A VM that does not answer is listed with what is known."""
    found = await asyncio.gather(*(_usage(pods, pod) for pod in pods if pod.machine is not None))
    share_frames(one["vm"] for one in found)
    return {"pods": found, "host": pods.host_usage(), "disks": await open_disks(pods.disks)}


async def _usage(pods: Pods, pod: PodVm) -> dict[str, Any]:
    found: dict[str, Any] = {"namespace": pod.pod.namespace, "name": pod.pod.name}
    found |= {"vm": {}, "containers": {}, "volumes": {}}
    machine = pod.machine
    if machine is None:
        return found
    try:
        async with asyncio.timeout(PATIENCE_S):
            found["vm"] = dict(await machine.stats())
    except (HvError, TimeoutError, OSError) as e:
        found["vm"] = {"error": str(e)}
    if pod.journal.record.vm_up:
        try:
            stats = await pods.agent(machine.address).call("container.stats", timeout=PATIENCE_S)
            found |= {part: stats.get(part) or {} for part in ("containers", "volumes", "guest")}
        except HvError as e:
            found["error"] = str(e)
    return found
