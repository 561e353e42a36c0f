"""The chains of a VM's disks, which vmx serves: their filters' first state, and changes while the VM runs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from hypervisor.errors import Conflict, HvError, NotFound, Unavailable
from hypervisor.iofilter.spec import FilterSpec
from hypervisor.vmm import records
from hypervisor.vmm.argv import Disk
from hypervisor.vmm.directory import disk_error, write_atomically
from hypervisor.vmm.plan import LaunchPlan
from hypervisor.vmm.vm import RunningVm
from hypervisor.vmx import control
from hypervisor.vmx.chains import filters_as_json

Filters = tuple[FilterSpec, ...]

_PATIENCE_S = 10.0
"""For a vmx that is being replaced."""
_LOOK_S = 0.1


def make_states(plan: LaunchPlan) -> None:
    """The first state of those filters that keep one, in vmx's folder, as the VM's user. Blocks.

    :raises HvError: a filter refuses its settings, or the host's disk is full
    """
    from hypervisor.iofilter.loop import create_state  # loads native code, which few starts need

    folder = plan.files.vmx
    for disk in plan.disks:
        for spec in disk.filters:
            names = [value for _, value in spec.settings if value.startswith("./")]
            if not names or disk.path is None:
                continue
            create_state(spec.kind, spec.resolved(folder), disk.path.stat().st_size)
            for name in names:
                _give(folder / name, plan.identity.uid)


def _give(path: Path, uid: int | None) -> None:
    if uid is None or not path.exists():
        return
    try:
        os.chown(path, uid, uid, follow_symlinks=False)
    except OSError as e:
        raise disk_error(e, f"cannot give {path} to the VM's user") from e


async def change_chain(vm: RunningVm, serial: str, filters: Filters) -> float:
    """Gives a disk of a VM that runs another chain, which differs by one filter.

    The plan has the new chain before vmx does, so that a vmx that is killed meanwhile has a successor with it; what vmx
    refuses is taken back.

    :return: seconds for which requests waited
    :raises Conflict: QEMU serves this VM's disks
    :raises NotFound: there is no such disk
    :raises HvError: a filter refuses; the chain is as it was
    """
    before = _disk(vm.plan, serial)
    await _record(vm, before, filters)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            return await _ask(vm, serial, filters)
    except TimeoutError as e:
        raise Unavailable(f"VM {vm.name}: vmx did not change the chain of disk {serial}; look at it again") from e
    except Unavailable:
        raise
    except HvError:
        await _record(vm, _disk(vm.plan, serial), before.filters)
        raise


def _disk(plan: LaunchPlan, serial: str) -> Disk:
    if plan.block != "vmx":
        raise Conflict("the disks of this pod are served by QEMU, which has no filters; see docs/disks.md")
    for disk in plan.disks:
        if disk.serial == serial and disk.path is not None:
            return disk
    raise NotFound(f"there is no disk {serial}")


async def _record(vm: RunningVm, disk: Disk, filters: Filters) -> None:
    changed = dataclasses.replace(disk, filters=filters)
    plan = dataclasses.replace(vm.plan, disks=tuple(changed if d is disk else d for d in vm.plan.disks))
    await asyncio.to_thread(write_atomically, plan.files.config, records.dumps(plan))
    vm.plan = plan


async def _ask(vm: RunningVm, serial: str, filters: Filters) -> float:
    """Again, if vmx dies over it: a successor begins with the plan's chain, and has nothing to change then."""
    argument: dict[str, Any] = {"disk": serial, "filters": filters_as_json(filters)}
    while True:
        with contextlib.suppress(Unavailable):
            answer = await control.call(vm.plan.files.vmx_socket, "chain", argument=argument, timeout=_PATIENCE_S)
            return float(answer["pause_s"])
        await asyncio.sleep(_LOOK_S)
