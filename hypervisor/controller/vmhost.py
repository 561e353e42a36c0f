"""The VM manager as pod VM controllers see it: `Machines` over `hypervisor.vmm`."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from hypervisor.controller import warmvm
from hypervisor.controller.diskfigures import disk_names, vm_disks
from hypervisor.controller.machine import Machine, VmRequest
from hypervisor.controller.paths import HostPaths
from hypervisor.controller.poddisks import FILTERS_ANNOTATION, Filters, as_clone
from hypervisor.controller.sizing import MemoryLedger
from hypervisor.controller.templates import Templates, open_templates, size_class
from hypervisor.controller.warmpool import WarmPool
from hypervisor.controller.warmvm import WarmSource, WarmVm, kind_of
from hypervisor.controller.zygotes import KeptZygote
from hypervisor.errors import Conflict, HvError, NotFound, Unavailable
from hypervisor.vmm import launch
from hypervisor.vmm.bases import DiskBases
from hypervisor.vmm.capabilities import HostCapabilities, probe
from hypervisor.vmm.chains import change_chain
from hypervisor.vmm.config import ROOT_SERIAL, AcceleratorWish, DataDisk, ImageDisk, VmConfig, default_block
from hypervisor.vmm.guest import GuestImage
from hypervisor.vmm.identity import IdentityPool, VmIdentity
from hypervisor.vmm.plan import IMAGE_SLOTS, ClonePlan, LaunchPlan, plan_launch
from hypervisor.vmm.qmp import QmpEvent
from hypervisor.vmm.slots import insert_images
from hypervisor.vmm.snapshots.snapshot import Snapshot, disks_here, refuse_misfit
from hypervisor.vmm.snapshots.take import take, take_and_wake, wake
from hypervisor.vmm.succession import Succession
from hypervisor.vmm.sweep import sweep
from hypervisor.vmm.templates.template import Template
from hypervisor.vmm.vm import RunningVm
from hypervisor.vsock.address import VsockAddress

log = structlog.get_logger(__name__)

ROOM_LOOK_S = 2.0
ROOM_BYTES = 64 * 1024 * 1024
"""Free on the host's disk before a VM that it stopped goes on."""


@dataclass(frozen=True)
class VmHost:
    """Starts, adopts and sweeps VMs on this host. Made by `open_vm_host`."""

    guest: GuestImage
    capabilities: HostCapabilities
    accelerator: AcceleratorWish
    identities: IdentityPool
    zygote: KeptZygote
    templates: Templates
    pool: WarmPool[WarmVm] | None = None
    tap_prefix: str = ""
    bases: DiskBases | None = None

    async def start(self, request: VmRequest) -> Machine:
        """:raises HvError: it could not be started; nothing of it is left"""
        with self.pool.starting() if self.pool else nullcontext():
            # As it is now: it may have been made anew, and a template of the old one must not meet the new one's root.
            guest = await asyncio.to_thread(GuestImage.load, self.guest.directory)
            config = await self._on_base(size_class(self._config(request, guest)))
            return await self._warm(config, request) or await self._fresh(config, request)

    async def _on_base(self, config: VmConfig) -> VmConfig:
        """Where vmx serves the disks, the scratch disk is a linked clone of a formatted one."""
        disk = config.data_disk
        if config.block != "vmx" or disk is None or self.bases is None:
            return config
        disk = dataclasses.replace(disk, base=await self.bases.get(disk), filters=as_clone(disk.filters))
        return dataclasses.replace(config, data_disk=disk)

    async def _warm(self, config: VmConfig, request: VmRequest) -> Machine | None:
        """A VM out of the pool, with the pod's images in it; None where there is none that would do."""
        if (
            self.pool is None
            or request.cold
            or request.disks.served
            or request.size.quotas
            or len(config.image_disks) > IMAGE_SLOTS
        ):
            return None
        warm = self.pool.take(kind_of(config))
        if warm is None:
            return None
        try:
            await asyncio.to_thread(warmvm.link, request.directory, warm.vm.plan.directory)
            await insert_images(warm.vm, config.image_disks)
        except HvError as e:
            log.warning("warm VM is of no use; another is started", reason=str(e))
            await warm.end()
            warmvm.unlink(request.directory)
            return None
        except BaseException:
            await warm.end()
            warmvm.unlink(request.directory)
            raise
        return HostedVm(warm.vm, self, request.directory)

    async def _fresh(self, config: VmConfig, request: VmRequest) -> Machine:
        identity = await asyncio.to_thread(self.identities.take)
        clone: ClonePlan | None = None
        try:
            clone = None if request.cold else await self.templates.clone_plan(config)
            plan = plan_launch(config, self.capabilities, request.directory, identity, clone=clone)
            return HostedVm(await launch.start(plan, self.zygote, succession=self._succession), self)
        except BaseException:
            self.templates.recorded(clone)
            self.identities.release(identity)
            raise

    async def resume(self, request: VmRequest, folder: Path) -> Machine:
        """The VM of the snapshot `folder`, as it was; it stands still until it is woken.

        :raises SnapshotDamaged, Conflict: it cannot be used here; nothing was started
        """
        config, snapshot = await self._checked(request, folder)
        identity = await asyncio.to_thread(self.identities.take)
        try:
            plan = await asyncio.to_thread(self._plan_resumed, config, request.directory, identity, snapshot)
            return HostedVm(await launch.start(plan, self.zygote, succession=self._succession), self)
        except BaseException:
            self.identities.release(identity)
            raise

    async def check(self, request: VmRequest, folder: Path) -> None:
        """Whether `resume` would do. Raises as it."""
        await self._checked(request, folder)

    async def _checked(self, request: VmRequest, folder: Path) -> tuple[VmConfig, Snapshot]:
        guest = await asyncio.to_thread(GuestImage.load, self.guest.directory)
        config = size_class(self._config(request, guest))
        snapshot = await asyncio.to_thread(Snapshot.read, folder)
        refuse_misfit(await self.templates.key(config), snapshot)
        await asyncio.to_thread(snapshot.check)
        return config, snapshot

    def _plan_resumed(self, config: VmConfig, directory: Path, identity: VmIdentity, snapshot: Snapshot) -> LaunchPlan:
        template = Template.linked(Snapshot.template_of(snapshot.path))
        clone = self.templates.frames.snapshot_plan(template, snapshot)
        disks = disks_here(snapshot, config, directory)
        plan = plan_launch(config, self.capabilities, directory, identity, clone=clone, disks=disks)
        return dataclasses.replace(plan, data_disk=None)

    async def start_warm(self, config: VmConfig, directory: Path) -> RunningVm:
        """A clone that belongs to nobody yet.

        :raises HvError: it could not be started, or only cold; nothing of it is left
        """
        clone = await self.templates.clone_plan(config)
        self.templates.recorded(clone)  # what a rehearsal touches is no first run's working set
        if clone is None:
            raise Unavailable("there is no template; pods of this host start cold, and a warm pool is of no use")
        identity = await asyncio.to_thread(self.identities.take)
        try:
            plan = plan_launch(
                config, self.capabilities, directory, identity, clone=dataclasses.replace(clone, recording=False)
            )
            return await launch.start(plan, self.zygote, succession=self._succession)
        except BaseException:
            self.identities.release(identity)
            raise

    async def end_warm(self, vm: RunningVm) -> None:
        """Ends what `start_warm` started, and removes it."""
        try:
            await vm.end_now()
            await vm.remove()
        finally:
            self.identities.release(vm.plan.identity)

    @property
    def _succession(self) -> Succession:
        """A pod VM whose vmx is killed goes on with another."""
        return Succession(self.zygote, self.templates.frames)

    def _config(self, request: VmRequest, guest: GuestImage) -> VmConfig:
        size = request.size
        return VmConfig(
            name=request.label,
            guest=guest,
            memory_bytes=size.memory_bytes,
            vcpus=size.vcpus,
            net="tap" if self.tap_prefix and request.network == "user" else request.network,
            tap_prefix=self.tap_prefix if request.network == "user" else "",
            image_disks=tuple(
                ImageDisk(serial=serial, path=path, filters=request.disks.image) for serial, path in request.images
            ),
            data_disk=DataDisk(size_bytes=size.disk_bytes, quotas=size.quotas, filters=request.disks.scratch),
            accelerator=self.accelerator,
            block="vmx" if request.disks.served else default_block(),
        )

    async def adopt(self, directory: Path) -> Machine | None:
        """The VM that an earlier daemon started there; None when it does not run."""
        vm = await launch.adopt(warmvm.linked(directory), self._succession)
        if vm is None:
            return None
        self.identities.claim(vm.plan.identity)
        return HostedVm(vm, self, directory)

    def usage(self) -> dict[str, Any]:
        """The page-frame database, and the warm pool where there is one."""
        pool = {"pool": self.pool.usage()} if self.pool else {}
        return {"page_frames": asdict(self.templates.frames.usage())} | pool

    async def sweep(self, directory: Path) -> None:
        """Ends every process of the VM there and removes all that it left."""
        await sweep(warmvm.linked(directory), self.capabilities)
        warmvm.unlink(directory)


class HostedVm:
    """A `Machine`: a running VM and its identity, which is given back when the VM has gone."""

    def __init__(self, vm: RunningVm, host: VmHost, directory: Path | None = None) -> None:
        self.vm = vm
        self._directory = directory or vm.plan.directory  # a link to the VM's, where it comes from the warm pool
        self._identities = host.identities
        self._templates = host.templates
        self._recording: asyncio.Task[None] | None = None
        self.changing = asyncio.Lock()  # of a chain, from the look at it on
        vm.trim_when_idle()

    @property
    def address(self) -> VsockAddress:
        """Where its agent listens."""
        return self.vm.address

    @property
    def plan(self) -> LaunchPlan:
        """How it was started."""
        return self.vm.plan

    @property
    def tap(self) -> tuple[str, str] | None:
        """The name of its tap and its MAC address."""
        plan = self.plan
        return (plan.tap, plan.mac) if plan.tap is not None and plan.mac is not None else None

    def disk_serial(self, image: Path) -> str:
        """As its plan has it: its own, or that of the empty place that it was put into."""
        for disk in self.plan.disks:
            if disk.path == image:
                return disk.serial
        raise NotFound(f"VM {self.plan.name} has no disk {image}")

    async def wait_dead(self) -> str:
        """Why it ended, with the last of its console."""
        return (await self.vm.wait_dead()).describe()

    async def disk_full(self) -> AsyncIterator[bool]:
        """True when the VM stops because the host's disk is full; False when there is room and it goes on.

        vmx tries writes that found no room again and again. Where QEMU serves the disks, it stops the VM, and tries the
        write again when the VM is resumed.
        """
        if self.plan.block == "vmx":
            async for full in self._writes_wait():
                yield full
            return
        events = self.vm.events()
        while True:
            while await self.vm.status() != "io-error":
                if not await _next_stop(events):
                    return
            yield True
            while await self.vm.status() == "io-error":
                await asyncio.sleep(ROOM_LOOK_S)
                if shutil.disk_usage(self.plan.directory).free >= ROOM_BYTES:
                    await self.vm.resume()
            yield False

    async def _writes_wait(self) -> AsyncIterator[bool]:
        full = False
        while not self.vm.dead:
            await asyncio.sleep(ROOM_LOOK_S)
            # vmx is asked only on a host that may be full: an idle VM's stays asleep
            if not full and shutil.disk_usage(self.plan.directory).free >= ROOM_BYTES:
                continue
            if await self.vm.writes_wait() != full:
                full = not full
                yield full

    def chains(self) -> Mapping[str, tuple[str, Filters]]:
        """By the name of a disk of the pod's own: its serial and its chain."""
        if self.plan.block != "vmx":
            raise Conflict(f"QEMU serves the disks of VM {self.plan.name}: a pod with {FILTERS_ANNOTATION} has filters")
        names = disk_names(self.plan.disks)
        own = (d for d in self.plan.disks if d.path is not None and d.serial != ROOT_SERIAL)
        return {names[disk.serial]: (disk.serial, disk.filters) for disk in own}

    async def change_chain(self, serial: str, filters: Filters) -> float:
        """From now on the disk has that chain; seconds for which requests waited."""
        return await change_chain(self.vm, serial, filters)

    def note_started(self) -> None:
        """A clone that records its template's working set has touched it."""
        if self._recording is None:
            self._recording = asyncio.create_task(self._templates.keep_working_set(self.vm))

    async def _end_recording(self) -> None:
        if self._recording is not None:
            await asyncio.wait([self._recording])  # it has a time-out of its own
        self._templates.recorded(self.plan.clone)

    def console_tail(self, limit: int) -> bytes:
        """The last of the guest's console."""
        return self.vm.console_tail(limit)

    def memory_used(self) -> int:
        """Resident memory of its QEMU: the guest's RAM, as far as it was touched, and QEMU's own."""
        return _used_by(self.vm)

    async def stats(self) -> Mapping[str, Any]:
        """Counters of its cgroup and its vmx; of a clone also the page-frame entries that its RAM leads to."""
        known = {"accelerator": self.plan.accelerator, "pids_of": dict(self.vm.pids)}
        if self.plan.clone is not None:
            known["frames"] = _frames(self.plan.clone)
        stats = asdict(await self.vm.stats())
        return stats | known | {"disks": await vm_disks(self.vm, stats["vmx"])}

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """A QMP command."""
        return await self.vm.execute(command, arguments)

    async def save(self, folder: Path, name: str, *, goes_on: bool = False) -> Mapping[str, Any]:
        """Makes the snapshot `folder` of it; afterwards it stands still, or goes on."""
        taken = await (take_and_wake if goes_on else take)(self.vm, folder, name=name)
        return {"paused_s": round(taken.paused_s, 4), "pages": taken.pages, "looked_at": taken.looked_at}

    async def wake(self) -> bool:
        """Lets a guest go on that stands still."""
        return await wake(self.vm)

    async def stop(self, shutdown: Callable[[], Awaitable[None]] | None) -> None:
        """Ends it, gracefully where `shutdown` is given."""
        if shutdown is None:
            await self.vm.end_now()
        else:
            await self.vm.stop(shutdown)

    async def remove(self) -> None:
        """Ends whatever still runs and removes its folder."""
        await self._end_recording()
        await self.vm.end_now()
        with suppress(HvError):
            await self.vm.remove()  # what cannot be removed is swept at the next start
        warmvm.unlink(self._directory)
        self._identities.release(self.plan.identity)

    async def detach(self) -> None:
        """Lets go of it without ending it."""
        await self._end_recording()
        await self.vm.detach()


async def _next_stop(events: AsyncIterator[QmpEvent]) -> bool:
    """Waits until QEMU says that the VM has stopped; False when there are no more events."""
    async for event in events:
        if event.name in ("STOP", "BLOCK_IO_ERROR"):
            return True
    return False


def _frames(clone: ClonePlan) -> dict[str, Any]:
    vads = {vad for _, _, vad, _ in clone.mappings}
    return {"template": clone.ram_sha256, "vads": len(vads), "entries": sum(pages for _, pages, _, _ in clone.mappings)}


def _resident(pid: int) -> int:
    """Its own memory and what it shares with its kind; not the pages of files, which the kernel can drop."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
    return sum(int(value.split()[0]) * 1024 for value in fields.values())


@asynccontextmanager
async def open_vm_host(
    paths: HostPaths, accelerator: AcceleratorWish, ledger: MemoryLedger, *, warm: int = 0, tap_prefix: str = ""
) -> AsyncIterator[VmHost]:
    """The VM manager of a state directory, with its zygote; both end with the context, the VMs do not.

    :param warm: VMs that are kept ready; these end with the context, too
    :param tap_prefix: what its taps' names begin with, where it has the pod network

    :raises HostUnfit: no guest image, no QEMU, or a demanded accelerator that does not work
    """
    guest = await asyncio.to_thread(GuestImage.load)
    capabilities = await probe(paths.root, guest_kernel=guest.kernel, accelerator=accelerator)
    capabilities.choose_accelerator(accelerator)
    async with KeptZygote() as zygote:
        identities = IdentityPool(capabilities)
        with open_templates(paths.templates, capabilities, identities, zygote) as templates:
            await templates.sweep(guest.digest)
            await warmvm.sweep_warm(paths, capabilities)
            host = VmHost(
                guest, capabilities, accelerator, identities, zygote, templates, tap_prefix=tap_prefix,
                bases=DiskBases(paths.bases, capabilities.mke2fs),
            )  # fmt: skip
            if not warm:
                yield host
                return
            source = WarmSource(
                paths, guest.directory, accelerator, size_class, host.start_warm, host.end_warm, _used_by
            )
            pool = WarmPool[WarmVm](warm, source, ledger)
            async with _kept(pool):
                yield dataclasses.replace(host, pool=pool)


@asynccontextmanager
async def _kept(pool: WarmPool[WarmVm]) -> AsyncIterator[None]:
    keeping = asyncio.create_task(pool.run(), name="warm pool")
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await pool.close()


def _used_by(vm: RunningVm) -> int:
    return _resident(vm.pids["qemu"])
