"""A pod that takes more of its disk than it may is evicted, as kubelets do it.

The guest's kernel stops whoever writes past a limit (hypervisor/agent/quota.py), a little above it: a container that
holds to its limit is left alone, one that does not shows here at the next look, and its pod ends within a second.
Source: Kubernetes documentation, "Local ephemeral storage" (messages as kubelets write them).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from hypervisor.controller.sizing import has_disk_limits, running_together
from hypervisor.controller.spec import PodSpec
from hypervisor.errors import HvError
from hypervisor.introspect.agent import AgentClient
from hypervisor.kube.quantity import format_bytes

EVICTED = "Evicted"
GRACE_S = 1.0
_ANSWER_S = 10.0

Stats = Mapping[str, Any]
"""The agent's ``container.stats``."""


async def wait_exceeded(agent: AgentClient, pod: PodSpec, look_s: float) -> str:
    """Waits until the pod takes more than one of its limits; which one. For ever where it has none.

    :param look_s: between two looks
    """
    if not has_disk_limits(pod):
        await asyncio.Event().wait()
    while True:
        await asyncio.sleep(look_s)
        try:
            why = exceeded(pod, await agent.call("container.stats", timeout=_ANSWER_S))
        except HvError:  # nobody there, or busy: whoever watches over the agent sees to that
            continue
        if why:
            return why


def exceeded(pod: PodSpec, stats: Stats) -> str:
    """Which limit is exceeded, in kubelets' words and order; empty for none."""
    volumes = {name: int(used.get("used_bytes") or 0) for name, used in (stats.get("volumes") or {}).items()}
    for volume in pod.volumes:
        if volume.source is None and volume.size_bytes and volumes.get(volume.name, 0) > volume.size_bytes:
            limit = format_bytes(volume.size_bytes)
            return f'Usage of EmptyDir volume "{volume.name}" exceeds the limit "{limit}". '
    used = {name: _taken_by(found) for name, found in (stats.get("containers") or {}).items()}
    limit_bytes = pod_limit(pod)
    taken = sum(used.values()) + sum(volumes.get(v.name, 0) for v in pod.volumes if v.medium == "disk")
    if limit_bytes and taken > limit_bytes:
        return f"Pod ephemeral local storage usage exceeds the total limit of containers {format_bytes(limit_bytes)}. "
    for container in (*pod.init_containers, *pod.containers):
        most = container.resources.disk_limit
        if most and used.get(container.name, 0) > most:
            return f'Container {container.name} exceeded its local ephemeral storage limit "{format_bytes(most)}". '
    return ""


def pod_limit(pod: PodSpec) -> int:
    """What all containers that run at the same time may take together; 0 where none has a limit."""
    return max(sum(c.resources.disk_limit or 0 for c in group) for group in running_together(pod))


def _taken_by(container: Stats) -> int:
    return int(container.get("disk_bytes") or 0) + int(container.get("log_bytes") or 0)
