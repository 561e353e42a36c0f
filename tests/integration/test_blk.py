"""Disks that vmx serves, under a guest that writes all the time and checks every byte."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
from typing import cast

import pytest
from blk_guest import blk_guest
from test_vmm import Bench, bench, until

from hypervisor.vmm.config import MIB, DataDisk
from hypervisor.vmm.succession import Succession
from hypervisor.vmm.templates.frames import HostFrames
from hypervisor.vmm.vm import RunningVm

pytestmark = pytest.mark.qemu

__all__ = ["bench"]

_PATIENCE = float(os.environ.get("HV_TEST_PATIENCE", "1"))
_BOOT_S = 120 * _PATIENCE
_TURN_S = 60 * _PATIENCE


def console(vm: RunningVm) -> bytes:
    return vm.console_tail(1 << 20)


def verified(vm: RunningVm) -> int:
    """Writes that were acknowledged and found again, by the latest look at all of them."""
    assert b"BAD" not in console(vm), console(vm)[-2000:]
    found = re.findall(rb"verified (\d+)", console(vm))
    return int(found[-1]) if found else 0


async def verifying_guest(bench: Bench) -> RunningVm:
    """A guest that writes to its data disk and verifies; vmx serves its disks and is replaced when it dies."""
    guest = await asyncio.to_thread(blk_guest, bench.state / "guest")
    plan = bench.plan(
        guest, block="vmx", memory_bytes=192 * MIB, data_disk=DataDisk(size_bytes=16 * MIB),
        kernel_arguments=("blk.verify=vdb",),
    )  # fmt: skip
    # only a clone asks for the page-frame database
    vm = await bench.start(plan, succession=Succession(bench.zygote, cast(HostFrames, None)))
    await until(lambda: b"writing" in console(vm), "the guest writes", _BOOT_S)
    return vm


@pytest.mark.parametrize("kills", [20, pytest.param(300, marks=pytest.mark.soak)])
async def test_vmx_is_killed_under_writes_and_nothing_acknowledged_is_lost(bench: Bench, kills: int) -> None:
    vm = await verifying_guest(bench)
    chance = random.Random(kills)
    for turn in range(kills):
        dead = vm.pids["vmx"]
        os.kill(dead, signal.SIGKILL)
        await until(lambda dead=dead: vm.pids["vmx"] != dead, f"vmx is replaced, kill {turn}", _TURN_S)
        if turn % 4 == 3:  # in the midst of its coming
            await asyncio.sleep(chance.uniform(0, 0.2))
            continue
        done = verified(vm)
        await until(lambda done=done: verified(vm) > done, f"the guest goes on, kill {turn}", _TURN_S)
        if kills > 40:
            await asyncio.sleep(0.75)  # below the rate at which a VM is given up
    done = verified(vm)
    await until(lambda: verified(vm) > done, "the guest goes on at the end", _TURN_S)
    assert vm.replacements == kills
    disks = (await vm.stats()).vmx["disks"]
    assert disks["hv-data"]["ring_faults"] == disks["hv-data"]["frontend_faults"] == disks["hv-data"]["failed"] == 0


async def test_a_pause_and_a_going_on_lose_nothing(bench: Bench) -> None:
    vm = await verifying_guest(bench)
    for _ in range(3):
        await vm.pause()
        done = verified(vm)
        await vm.resume()
        await until(lambda done=done: verified(vm) > done, "the guest goes on", _TURN_S)
