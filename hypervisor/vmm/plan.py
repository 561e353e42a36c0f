"""`plan_launch`: what a VM's start will do, as a value that can be printed, tested and kept.

``config.json`` in the VM's directory is the plan. Nothing on the host has changed when one was made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from hypervisor.vmm import argv as qemu_argv
from hypervisor.vmm.argv import Accelerator, Disk, Fd, Machine, Origin, VsockPath
from hypervisor.vmm.capabilities import RAM_LIBRARY, HostCapabilities
from hypervisor.vmm.cgroup import Cgroups, Layout, Limits
from hypervisor.vmm.config import DATA_SERIAL, MIB, ROOT_SERIAL, BlockPath, DataDisk, VmConfig
from hypervisor.vmm.confine import Confinement, confined_argv, qemu_view
from hypervisor.vmm.directory import VmDirectory
from hypervisor.vmm.identity import VmIdentity
from hypervisor.vsock.address import KernelVsock, UnixVsock, VsockAddress

#: what a VM's processes take beside the guest's RAM: QEMU's own memory and translated code, vmx, page tables
OVERHEAD = (qemu_argv.TCG_CACHE_MIB + 192) * MIB
#: QEMU's threads beside the CPUs' (its block layer has up to 64 workers), and vmx's
OVERHEAD_PIDS = 128
#: environment variable by which `sweep` knows a VM's QEMU
MARK = "PODVISOR_VM"
_QEMU_FILES = 1024
#: added to the CID of a guest that becomes a template; no clone has such a one, so a clone's always differs from it
TEMPLATE_CIDS = 1 << 30
#: image disks that a template has places for; a pod with more distinct images starts cold
IMAGE_SLOTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupPlan:
    """The VM's cgroup: where, and its limits (the guest's and `OVERHEAD`)."""

    layout: Layout
    scope: str
    name: str
    limits: Limits

    def cgroups(self) -> Cgroups:
        """The trees it is made in."""
        return Cgroups(self.layout, self.scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class VmxPlan:
    """What the VM's device process is told; see `hypervisor.vmx`.

    :param guest_cid: of the vhost-user vsock device that it serves; None: the kernel's is used
    """

    guest_cid: int | None
    log_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClonePlan:
    """What a clone starts from.

    :param template: folder of the template (see `hypervisor.vmm.templates`)
    :param ram_sha256: of the template's RAM: its working set must be of it
    :param mappings: pages of guest RAM as (first page, pages, VAD, first page of the VAD)
    :param working_set: whether the template's is there to be prefetched
    :param recording: this clone records it: its faults are served page by page
    :param snapshot: folder of the snapshot over the template that the guest goes on from (`hypervisor.vmm.snapshots`);
        it stands still when it has been started
    """

    template: Path
    ram_bytes: int
    ram_sha256: str
    mappings: tuple[tuple[int, int, int, int], ...]
    working_set: bool = False
    recording: bool = False
    snapshot: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """
    :param origin: how the guest comes to life; `clone` says from what
    :param argv: QEMU's command line before confinement
    :param disks: in the order of the guest's /dev/vd*
    :param mac: of its network device, where it has one
    :param tap: the name of the tap that this leads to; it is there as long as QEMU is
    """

    name: str
    directory: Path
    identity: VmIdentity
    accelerator: Accelerator
    vsock: VsockPath
    argv: tuple[str, ...]
    disks: tuple[Disk, ...]
    data_disk: DataDisk | None
    mke2fs: Path | None
    vmx: VmxPlan
    confinement: Confinement
    cgroup: CgroupPlan
    origin: Origin = "boot"
    clone: ClonePlan | None = None
    block: BlockPath = "qemu"
    mac: str | None = None
    tap: str | None = None

    @property
    def files(self) -> VmDirectory:
        """Names in the VM's directory."""
        return VmDirectory(self.directory)

    @property
    def address(self) -> VsockAddress:
        """Where the guest's virtual sockets are reached."""
        if self.vsock == "kernel":
            return KernelVsock(self.identity.cid)
        return UnixVsock(self.files.vsock_socket)

    def spawned_argv(self) -> list[str]:
        """What is executed: the confinement's launcher, which becomes QEMU."""
        return confined_argv(self.confinement, self.argv)


def plan_launch(
    config: VmConfig, capabilities: HostCapabilities, directory: Path, identity: VmIdentity, *,
    clone: ClonePlan | None = None, disks: tuple[Disk, ...] | None = None,
) -> LaunchPlan:  # fmt: skip
    """Decide everything about a start; a pure function but for looking at which of QEMU's own files exist.

    :param directory: the VM's state folder to be; absolute, must not exist when it is started
    :param identity: of `IdentityPool.take`
    :param clone: start from this template, which must be `template_plan`'s of the same config
    :param disks: of a guest that goes on from a snapshot: those that it has
    :raises InvalidInput: the path is too long for sockets
    :raises HostUnfit: KVM is wished for and does not work
    """
    if disks is None:
        disks = _disks(config, directory)
        if clone is not None:
            disks += _empty_slots(len(config.image_disks))
    return _plan(config, capabilities, directory, identity, "boot" if clone is None else "clone", disks, clone)


def plan_template(
    config: VmConfig, capabilities: HostCapabilities, directory: Path, identity: VmIdentity
) -> LaunchPlan | None:
    """The plan for making the template that VMs like `config` can be cloned from; None when they must start cold.

    It depends on nothing of `config` but what a clone cannot change: memory, CPUs, network, guest image, accelerator.
    """
    if capabilities.lazy_ram_unusable or config.kernel_arguments:
        return None
    if len(config.image_disks) > IMAGE_SLOTS or config.data_disk is None:
        return None
    identity = dataclasses.replace(identity, cid=identity.cid | TEMPLATE_CIDS)
    empty = dataclasses.replace(config, name="template", image_disks=(), data_disk=None)
    data = Disk(serial=DATA_SERIAL, path=None, read_only=False, fd=Fd.DISKS + 1)
    disks = (*_disks(empty, directory), data, *_empty_slots(0))
    return _plan(empty, capabilities, directory, identity, "template", disks, None)


def _empty_slots(used: int) -> tuple[Disk, ...]:
    """Image disks that are none, after root, data and `used` real ones."""
    return tuple(
        Disk(serial=f"empty-{i}", path=None, read_only=True, fd=Fd.DISKS + 2 + i) for i in range(used, IMAGE_SLOTS)
    )


def _plan(
    config: VmConfig, capabilities: HostCapabilities, directory: Path, identity: VmIdentity, origin: Origin,
    disks: tuple[Disk, ...], clone: ClonePlan | None,
) -> LaunchPlan:  # fmt: skip
    VmDirectory(directory).check_path()
    accelerator = capabilities.choose_accelerator(config.accelerator)
    # A clone has its template's: neither QEMU's user network nor a tap that is routed has another VM on its link.
    mac = qemu_argv.mac_of(identity.cid if origin == "boot" else 0) if config.net != "none" else None
    machine = Machine(
        qemu=capabilities.qemu, name=config.name, accelerator=accelerator, memory_bytes=config.memory_bytes,
        vcpus=config.vcpus, kernel=config.guest.kernel, initrd=config.guest.initrd,
        cmdline=qemu_argv.kernel_command_line(accelerator, _template_arguments(origin, config)), disks=disks,
        vsock=capabilities.vsock, cid=identity.cid, origin=origin,
        mac=mac, tap=config.net == "tap",
        block=config.block,
    )  # fmt: skip
    cgroup = _cgroup(config, capabilities, directory)
    serves_vsock = machine.has_vsock and machine.vsock == "vhost-user"
    return LaunchPlan(
        name=config.name, directory=directory, identity=identity, accelerator=accelerator, vsock=capabilities.vsock,
        argv=qemu_argv.render_argv(machine), disks=disks, data_disk=config.data_disk, mke2fs=capabilities.mke2fs,
        vmx=VmxPlan(guest_cid=identity.cid if serves_vsock else None, log_bytes=config.console_bytes),
        confinement=_confinement(config, capabilities, machine, directory, identity, cgroup), cgroup=cgroup,
        origin=origin, clone=clone, block=config.block, mac=mac,
        tap=f"{config.tap_prefix}{identity.cid:08x}" if config.net == "tap" and origin != "template" else None,
    )  # fmt: skip


def _template_arguments(origin: Origin, config: VmConfig) -> tuple[str, ...]:
    """A guest that becomes a template says so on its console; its clones have the same command line in their RAM."""
    return config.kernel_arguments if origin == "boot" else ("podvisor.template",)


def _disks(config: VmConfig, directory: Path) -> tuple[Disk, ...]:
    disks = [Disk(serial=ROOT_SERIAL, path=config.guest.root, read_only=True, fd=0)]
    if (data := config.data_disk) is not None:
        files = VmDirectory(directory)
        base = None if data.base is None else files.base
        disks.append(Disk(serial=DATA_SERIAL, path=files.disk, read_only=False, fd=0, filters=data.filters, base=base))
    disks += [Disk(serial=d.serial, path=d.path, read_only=True, fd=0, filters=d.filters) for d in config.image_disks]
    return tuple(dataclasses.replace(disk, fd=Fd.DISKS + i) for i, disk in enumerate(disks))


def cgroup_name(directory: Path) -> str:
    """The VM's cgroup, by its directory alone: found again without any file."""
    return f"vm-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]}"


def _cgroup(config: VmConfig, capabilities: HostCapabilities, directory: Path) -> CgroupPlan:
    quota = None if config.cpu_limit is None else max(1000, round(config.cpu_limit * 100_000))
    limits = Limits(memory_bytes=config.memory_bytes + OVERHEAD, cpu_quota_us=quota, pids=config.vcpus + OVERHEAD_PIDS)
    return CgroupPlan(
        layout=capabilities.cgroup_layout, scope=capabilities.cgroup_scope, name=cgroup_name(directory), limits=limits
    )


def _confinement(
    config: VmConfig, capabilities: HostCapabilities, machine: Machine, directory: Path, identity: VmIdentity,
    cgroup: CgroupPlan,
) -> Confinement:  # fmt: skip
    support = capabilities.confinement
    private = support.private_root
    lazy = machine.origin != "boot"
    view = (*qemu_view(machine.qemu), machine.kernel, machine.initrd) if private else ()
    disks = [d.fd for d in machine.disks if d.path is not None or machine.block == "vmx"]
    fds = [Fd.QMP, Fd.CONSOLE, *disks]
    fds += [Fd.VSOCK] if machine.has_vsock else []
    fds += [Fd.RAM, Fd.USERFAULTFD] if lazy else []
    fds += [Fd.NET] if machine.tap and machine.origin != "template" else []
    return Confinement(
        uid=identity.uid, gid=identity.uid, cgroups=cgroup.cgroups().paths(cgroup.name).directories,
        private_root=private, user_namespace=support.user_namespace,
        ro_binds=(*view, RAM_LIBRARY) if private and lazy else view,
        devices=("kvm",) if private and machine.accelerator == "kvm" else (),
        new_network=private and config.net != "user", rlimits=(("core", 0), ("nofile", _QEMU_FILES)),
        keep_fds=tuple(sorted(int(fd) for fd in fds)),
        environment=(*environment(directory), *(_ram_environment(machine) if lazy else ())),
    )  # fmt: skip


def environment(directory: Path) -> tuple[tuple[str, str], ...]:
    """All of QEMU's environment."""
    return (("PATH", "/usr/bin:/bin"), ("LANG", "C.UTF-8"), (MARK, str(directory)))


def _ram_environment(machine: Machine) -> tuple[tuple[str, str], ...]:
    """What the preloaded library is told; see csrc/memory/preload.c."""
    mode = "serve" if machine.origin == "clone" else "lend"
    ram = f"{machine.memory_bytes}:{Fd.RAM:d}:{mode}:{Fd.USERFAULTFD:d}"
    return (("LD_PRELOAD", str(RAM_LIBRARY)), ("HV_RAM", ram))
