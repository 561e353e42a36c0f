"""The guest's console: from the running VM's bounded log, or what was kept of it when the VM went."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from hypervisor.controller.paths import PodPaths
from hypervisor.controller.podvm import PodVm
from hypervisor.vmx.console import LogFollower, read_tail

LOOK_EVERY_S = 0.2


def console_text(paths: PodPaths, lines: int | None) -> bytes:
    """The console so far, or its last `lines`. Blocks on disk."""
    live = paths.vm / "console.log"
    return read_tail(live if live.exists() else paths.console, lines=lines)


async def follow_console(pod: PodVm, lines: int | None) -> AsyncIterator[bytes]:
    """The console so far, or its last `lines`, then what comes, until the pod has ended."""
    follower = LogFollower(pod.paths.vm / "console.log", lines=lines)
    while True:
        over = pod.journal.record.closed or pod.gone.is_set()
        data = await asyncio.to_thread(follower.read_new)
        if data:
            yield data
        elif over:
            return
        else:
            await asyncio.sleep(LOOK_EVERY_S)
