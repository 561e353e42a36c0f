"""VMs of the warm pool over the VM manager: made, given to a pod, found again.

A VM keeps the folder that it was started in (``warm/<uid>``; its processes, cgroup and sockets are named by it). What
makes it a pod's is a link to it in the pod's folder, made in one step: a daemon that is killed before that leaves a
folder that no link leads to, which the next one sweeps (`sweep_warm`); after that it is the pod's, as any VM.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from hypervisor.controller.paths import HostPaths
from hypervisor.controller.sizing import VmSize, default_size
from hypervisor.controller.warmpool import Kind
from hypervisor.errors import HvError, Unavailable, VmFailed
from hypervisor.introspect.agent import AgentClient
from hypervisor.vmm.capabilities import HostCapabilities
from hypervisor.vmm.config import DATA_SERIAL, AcceleratorWish, DataDisk, Net, VmConfig
from hypervisor.vmm.guest import GuestImage
from hypervisor.vmm.sweep import sweep
from hypervisor.vmm.vm import RunningVm

NETWORK: Net = "user"
READY_S = 30.0
_POLL_S = 0.05
_REHEARSE_S = 20.0

log = structlog.get_logger(__name__)

StartVm = Callable[[VmConfig, Path], Awaitable[RunningVm]]
"""Starts a clone like the config in this folder; refuses what would start cold."""
EndVm = Callable[[RunningVm], Awaitable[None]]
"""Ends it, removes its folder and gives its identity back."""


def kind_of(config: VmConfig) -> Kind:
    """`config`'s, its memory rounded to a size class already."""
    disk = config.data_disk.size_bytes if config.data_disk is not None else 0
    return Kind(config.vcpus, config.memory_bytes, disk, config.net, config.guest.digest)


@dataclass
class WarmVm:
    """A clone that waits for a pod."""

    uid: str
    vm: RunningVm
    kind: Kind
    used: Callable[[RunningVm], int]
    end_vm: EndVm

    def memory_used(self) -> int:
        """Bytes of host memory."""
        return self.used(self.vm)

    async def wait_dead(self) -> str:
        """Why it ended."""
        return (await self.vm.wait_dead()).describe()

    async def end(self) -> None:
        """Ends and removes it; what cannot be removed is swept at the next start."""
        with suppress(HvError):
            await self.end_vm(self.vm)


@dataclass(frozen=True)
class WarmSource:
    """Makes them."""

    paths: HostPaths
    guest: Path
    accelerator: AcceleratorWish
    rounded: Callable[[VmConfig], VmConfig]
    start_vm: StartVm
    end_vm: EndVm
    used: Callable[[RunningVm], int]

    @property
    def size(self) -> VmSize:
        """Of a pod that asks for nothing: that is the kind that there is most use for."""
        return default_size()

    def new_uid(self) -> str:
        """Short: sockets lie below it."""
        return uuid.uuid4().hex[:8]

    async def current(self) -> Kind:
        """With the guest image as it is now."""
        return kind_of(await self._config("warm"))

    async def _config(self, name: str) -> VmConfig:
        guest = await asyncio.to_thread(GuestImage.load, self.guest)
        size = self.size
        return self.rounded(
            VmConfig(
                name=name, guest=guest, memory_bytes=size.memory_bytes, vcpus=size.vcpus, net=NETWORK,
                data_disk=DataDisk(size_bytes=size.disk_bytes), accelerator=self.accelerator,
            )
        )  # fmt: skip

    async def start(self, uid: str) -> WarmVm:
        """A clone whose agent has answered and rehearsed a container."""
        config = await self._config(f"warm-{uid}")
        vm = await self.start_vm(config, self.paths.warm / uid)
        try:
            await _rehearse(AgentClient(vm.address))
        except BaseException:
            with suppress(HvError):
                await self.end_vm(vm)
            raise
        return WarmVm(uid, vm, kind_of(config), self.used, self.end_vm)


async def _rehearse(agent: AgentClient) -> None:
    """Waits for the agent and has it run a container, so that the code on the way is translated in this QEMU.

    :raises VmFailed: it never answered
    """
    deadline = time.monotonic() + READY_S
    while True:
        try:
            await agent.call("rehearse", {"data_disk": DATA_SERIAL}, timeout=_REHEARSE_S)
            return
        except Unavailable as e:
            if time.monotonic() > deadline:
                raise VmFailed(f"the agent of a warm VM did not answer within {READY_S:g} s") from e
        await asyncio.sleep(_POLL_S)


def link(directory: Path, vm: Path) -> None:
    """From now on the VM in folder `vm` is the one of `directory`. All or nothing.

    :raises HvError: it cannot be made
    """
    try:
        directory.symlink_to(vm)
    except OSError as e:
        raise HvError(f"cannot link {directory} to {vm}: {e.strerror}") from e


def linked(directory: Path) -> Path:
    """The VM's own folder: where `directory` leads to, or itself."""
    with suppress(OSError):
        return directory.readlink()
    return directory


def unlink(directory: Path) -> None:
    """The link goes; harmless where there is none."""
    if directory.is_symlink():
        directory.unlink(missing_ok=True)


async def sweep_warm(paths: HostPaths, capabilities: HostCapabilities) -> None:
    """Ends a killed daemon's pool: every folder that no pod has a link to. Before pods are started only."""
    taken = {linked(pod / "vm") for pod in paths.pods.iterdir()}
    for folder in sorted(paths.warm.iterdir()):
        if folder in taken:
            continue
        log.info("warm VM of an earlier daemon swept", uid=folder.name)
        try:
            await sweep(folder, capabilities)
        except HvError as e:
            log.warning("warm VM cannot be swept", uid=folder.name, reason=str(e))
