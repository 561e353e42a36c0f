"""What a pod's device process does while one looks: for ``hv trace --hypervisor``."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from hypervisor.controller.podvm import PodVm
from hypervisor.controller.vmhost import HostedVm
from hypervisor.errors import Unavailable
from hypervisor.vmx import control

MAX_SECONDS = 60
MAX_BYTES = 64 << 20
"""Of an answer: vmx is not trusted."""


async def trace(pod: PodVm, seconds: float) -> bytes:
    """Turns the vmx's trace points on for so long; what they wrote, as a Chrome trace (JSON). Off again when it is
    cancelled, too.

    :raises Unavailable: the pod has no VM now, or its vmx does not answer
    """
    machine = pod.machine
    if not isinstance(machine, HostedVm):
        raise Unavailable(f"pod {pod.pod.name} has no running VM")
    socket = machine.plan.files.vmx_socket
    await control.call(socket, "trace-start")
    try:
        await asyncio.sleep(seconds)
    finally:
        await asyncio.shield(control.call(socket, "trace-stop"))
    return await _take(socket)


async def _take(socket: Path) -> bytes:
    fd = os.memfd_create("trace")
    try:
        await control.give(socket, "trace", "", fd)
        return os.pread(fd, MAX_BYTES, 0)
    finally:
        os.close(fd)
