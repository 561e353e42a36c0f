"""``container.stats``: what each container and the guest use."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from .cgroup import read_text
from .container import Container
from .storage import DATA, disk_usage
from .volumes import Volumes


def parse_meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) >= 2 and row[1].isdigit()}


def guest() -> dict[str, Any]:
    """Memory, load and the data disk."""
    memory = parse_meminfo(read_text("/proc/meminfo"))
    disk = os.statvfs(DATA)
    return {
        "mem_total": memory.get("MemTotal", 0),
        "mem_available": memory.get("MemAvailable", 0),
        "load1": os.getloadavg()[0],
        "disk_total": disk.f_blocks * disk.f_frsize,
        "disk_used": (disk.f_blocks - disk.f_bfree) * disk.f_frsize,
    }


async def collect(containers: dict[str, Container], volumes: Volumes) -> dict[str, Any]:
    """The call's result; what the kernel does not count is walked through in a thread."""
    names = dict(containers)
    disks, used = await asyncio.to_thread(lambda: ({n: _on_disk(c) for n, c in names.items()}, volumes.usage()))
    found = {n: {**containers[n].cgroup.stats(), **disks[n]} for n in names if n in containers}
    return {"containers": found, "volumes": used, "guest": guest()}


def _on_disk(container: Container) -> dict[str, int]:
    return {"disk_bytes": container.root.disk_usage(), "log_bytes": disk_usage(container.log_directory)}
