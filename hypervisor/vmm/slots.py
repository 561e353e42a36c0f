"""Image disks put into the empty places of a clone that runs already (`plan.IMAGE_SLOTS`).

The device is there since the template, with a disk that is none behind it; only what is behind it changes, so the guest
has nothing to plug in. It still finds the disk by the serial of the empty place, for that is the device's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from hypervisor.errors import Conflict, NotFound, ResourceExhausted
from hypervisor.vmm import records
from hypervisor.vmm.argv import Disk
from hypervisor.vmm.config import ImageDisk
from hypervisor.vmm.devices import open_disk
from hypervisor.vmm.directory import write_atomically
from hypervisor.vmm.vm import RunningVm
from hypervisor.vmx import control


async def insert_images(vm: RunningVm, images: Sequence[ImageDisk]) -> None:
    """Puts `images` into the VM's empty places; its plan and ``config.json`` tell of them before QEMU has them.

    :raises ResourceExhausted: it has fewer places; nothing was changed
    :raises NotFound: an image's file is missing; Conflict: QEMU refused. What was inserted before stays: end the VM
    """
    filled = _filled(vm, images)
    swapped = {disk.fd: disk for disk in filled}
    plan = dataclasses.replace(vm.plan, disks=tuple(swapped.get(disk.fd, disk) for disk in vm.plan.disks))
    await asyncio.to_thread(write_atomically, plan.files.config, records.dumps(plan))
    vm.plan = plan
    if plan.block == "vmx":
        for disk in filled:
            await _give(vm, disk)
        return
    devices = await _devices(vm) if filled else {}
    for disk in filled:
        await _insert(vm, disk, devices[f"disk{disk.fd}"])


def _filled(vm: RunningVm, images: Sequence[ImageDisk]) -> list[Disk]:
    empty = [disk for disk in vm.plan.disks if disk.path is None and disk.read_only]
    if len(empty) < len(images):
        raise ResourceExhausted(f"VM {vm.name} has {len(empty)} places for image disks, not {len(images)}")
    return [dataclasses.replace(disk, path=image.path) for disk, image in zip(empty, images, strict=False)]


async def _devices(vm: RunningVm) -> dict[str, str]:
    """QOM path of the device by the block node behind it."""
    blocks: list[dict[str, Any]] = await vm.execute("query-block")
    return {b["inserted"]["node-name"]: b["qdev"] for b in blocks if b.get("inserted") and b.get("qdev")}


async def _give(vm: RunningVm, disk: Disk) -> None:
    """vmx serves the disk from now on; one that dies meanwhile has a successor that finds it in the plan."""
    assert disk.path is not None
    fd = open_disk(disk, disk.path)
    try:
        await control.give(vm.plan.files.vmx_socket, "insert", disk.serial, fd)
    finally:
        os.close(fd)


async def _insert(vm: RunningVm, disk: Disk, device: str) -> None:
    assert disk.path is not None
    try:
        fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise NotFound(f"{disk.path} is missing; pull the image again") from e
    except OSError as e:
        raise Conflict(f"{disk.path} cannot be opened: {e.strerror}") from e
    try:
        await vm.give_fd(str(disk.path), fd, fdset=disk.fd)
    finally:
        os.close(fd)
    node = f"image{disk.fd}"
    file = {"driver": "file", "filename": f"/dev/fdset/{disk.fd}", "read-only": True, "locking": "off"}
    await vm.execute("blockdev-add", {"driver": "raw", "node-name": node, "read-only": True, "file": file})
    await vm.execute("qom-set", {"path": device, "property": "drive", "value": node})
