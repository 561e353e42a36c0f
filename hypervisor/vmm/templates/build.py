"""Makes a template: boots a guest until its agent idles, stops it, and takes its RAM and device state.

The guest is one like any other, confined alike, but for having no vsock device (unless it is the kernel's:
vhost-user's cannot be migrated) and empty disks in the places of a pod's own. It says on its console when it is ready
to be taken.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from hypervisor.vmm import launch
from hypervisor.vmm.devices import DeviceProcesses
from hypervisor.vmm.plan import LaunchPlan
from hypervisor.vmm.templates.template import TemplateKey, copy_ram
from hypervisor.vmm.vm import RunningVm
from hypervisor.vsock.address import VsockAddress

#: what the agent writes to its console when it idles (hypervisor/agent/main.py)
READY_LINE = b"podvisor: ready to be a template"
BOOT_TIMEOUT_S = 120.0
_SAVE_TIMEOUT_S = 60.0
_LOOK_S = 0.02


def template_key(plan: LaunchPlan, qemu_version: tuple[int, int, int], guest_digest: str) -> TemplateKey:
    """The key of what `plan` (of `hypervisor.vmm.plan.plan_template`) makes.

    In its argv is only what matters, but for the CID of a kernel's vsock device, which no clone takes over.
    """
    argv = tuple(word.replace(f",guest-cid={plan.identity.cid},", ",guest-cid=any,") for word in plan.argv)
    return TemplateKey(qemu_version=".".join(map(str, qemu_version)), argv=argv, guest=guest_digest)


async def build_template(plan: LaunchPlan, zygote: DeviceProcesses, folder: Path) -> None:
    """Makes ``ram`` and ``state`` in `folder`. The guest and its directory are gone afterwards, however it ends.

    :raises VmFailed: the guest did not get ready, or QEMU could not save it
    :raises OSError: the disk is full
    """

    async def ready(_: VsockAddress) -> None:
        # The console is a file by design: whoever reads it has no event.
        while READY_LINE not in await asyncio.to_thread(plan.files.console_log.read_bytes):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)

    vm = await launch.start(plan, zygote, ready=ready, ready_timeout_s=BOOT_TIMEOUT_S)
    try:
        await _save(vm, folder)
    finally:
        await vm.end_now()
        await vm.remove()


async def _save(vm: RunningVm, folder: Path) -> None:
    await vm.pause()
    fd = os.open(folder / "state", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await launch.save_state(vm, fd, _SAVE_TIMEOUT_S)
    finally:
        os.close(fd)
    ram = os.open(folder / "ram", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await asyncio.to_thread(copy_ram, vm.borrowed_ram, ram, os.fstat(vm.borrowed_ram).st_size)
    finally:
        os.close(ram)
