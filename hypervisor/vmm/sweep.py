"""What is left of VMs: found and ended, whatever was or was not recorded before a crash.

A process belongs to the VM of a directory when ``processes.json`` names it with its start time, or it is in the VM's
cgroup, or its environment carries the directory (QEMU), or its root or working directory is the directory's ``vmx/``
(vmx).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hypervisor.errors import HvError, NotFound
from hypervisor.vmm.capabilities import HostCapabilities
from hypervisor.vmm.cgroup import Cgroups
from hypervisor.vmm.directory import VmDirectory
from hypervisor.vmm.plan import MARK, cgroup_name
from hypervisor.vmm.watch import ProcessWatch
from hypervisor.vmx.process import ProcessId


async def sweep(directory: Path, capabilities: HostCapabilities) -> list[int]:
    """End every process of the VM in `directory`, remove its cgroup and the directory; harmless when there is nothing.

    :returns: pids of the processes that had to be killed
    :raises Conflict: the directory cannot be deleted
    """
    cgroups = Cgroups(capabilities.cgroup_layout, capabilities.cgroup_scope)
    paths = cgroups.paths(cgroup_name(directory))
    found = await asyncio.to_thread(find_processes, directory, frozenset(cgroups.processes(paths)))
    for record in found:
        await kill(record)
    with suppress(HvError):
        await cgroups.remove(paths)
    await asyncio.to_thread(VmDirectory(directory).remove)
    return [record.pid for record in found]


def find_processes(directory: Path, in_cgroup: frozenset[int] = frozenset()) -> list[ProcessId]:
    """Running processes of the VM in `directory`. Blocks for some milliseconds: it looks through /proc."""
    recorded = VmDirectory(directory).read_processes()
    known = {r.pid: r for r in (recorded.qemu, recorded.vmx) if r is not None}
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with suppress(NotFound, OSError):
                pid = int(entry.name)
                if pid in in_cgroup or _is_recorded(known.get(pid)) or belongs(pid, directory):
                    found.append(ProcessId.of(pid))
    return found


def _is_recorded(record: ProcessId | None) -> bool:
    return record is not None and record.alive()


def belongs(pid: int, directory: Path) -> bool | None:
    """Whether the process shows itself to be QEMU or vmx of the VM in `directory`; False also when it has ended.

    None: the kernel does not let us see, as with the vmx of an ordinary user, which cannot be traced.
    """
    process = Path("/proc", str(pid))
    mark = f"{MARK}={directory}".encode()
    marks: tuple[Callable[[], bool], ...] = (
        lambda: mark in (process / "environ").read_bytes().split(b"\0"),
        lambda: (process / "root").readlink() == VmDirectory(directory).vmx,
        lambda: (process / "cwd").readlink() == VmDirectory(directory).vmx,
    )
    seen: list[bool] = []
    for shows in marks:
        try:
            seen.append(shows())
        except PermissionError:
            continue
        except (FileNotFoundError, ProcessLookupError):
            return False
    return any(seen) if seen else None


async def kill(record: ProcessId) -> None:
    """SIGKILL to the process that `record` names, and wait for its end; nothing when it has ended."""
    try:
        watch = ProcessWatch.open(record)
    except NotFound:
        return
    try:
        await watch.kill()
    finally:
        watch.close()
