"""QEMU's command line: a pure function of a `Machine`. Golden files in tests/unit/vmm/golden show each variant.

QEMU gets every socket and disk as an inherited descriptor with a fixed number (`Fd`), never as a path: it needs no
right to any file or socket of the host beyond its own firmware and the guest's kernel, and no name can be misparsed.
A disk's path is repeated as its descriptor set's ``opaque`` text, for people and for `sweep`.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hypervisor.iofilter.spec import FilterSpec
from hypervisor.vmm.config import MIB, BlockPath

Accelerator = Literal["kvm", "tcg"]
VsockPath = Literal["kernel", "vhost-user"]
#: ``boot``: from the kernel on; ``template``: the same, to be made a template of; ``clone``: from a template
Origin = Literal["boot", "template", "clone"]

#: what QEMU 7.2 and later refuse to do once set up; ``spawn`` also keeps it from executing a shell
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
#: translated code cache. QEMU's own default is up to 1 GiB, which no cgroup of a small pod could hold; the size made no
#: difference to speed beyond noise
TCG_CACHE_MIB = 128

#: size of a disk that is none: the guest remembers it, so it is more than any disk that may take its place. What a
#: request beyond the real disk's end gets is an I/O error from QEMU.
EMPTY_BYTES = 1 << 50
#: the port that vhost-user's vsock device is plugged into; the root bus of machine ``q35`` takes no device later
_PORT = "vsock-port"
#: what a clone's vsock device is plugged as
VSOCK_DEVICE = {"driver": "vhost-user-vsock-pci", "id": "vsock0", "chardev": "vsock", "bus": _PORT}

KERNEL_ARGUMENTS = (
    "console=ttyS0", "quiet", "panic=-1", "rcupdate.rcu_expedited=1", "tsc=reliable", "no_timer_check",
    "random.trust_cpu=on", "audit=0", "cryptomgr.notests", "noreplace-smp",
)  # fmt: skip
#: TCG does not speculate in the guest, so there is nothing to mitigate; what each saves: docs/guest-image.md
TCG_ARGUMENTS = ("mitigations=off",)


class Fd(enum.IntEnum):
    """Numbers of the descriptors that QEMU inherits."""

    QMP = 10  # listening Unix socket
    CONSOLE = 11  # connected to vmx
    VSOCK = 12  # connected to vmx (vhost-user), or /dev/vhost-vsock
    RAM = 13  # where the preloaded library hands guest RAM over
    USERFAULTFD = 14  # /dev/userfaultfd
    NET = 15  # the VM's tap
    DISKS = 20  # the first disk's, or of a listening Unix socket that vmx connects to; the others follow


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk as QEMU sees it; `fd` is open on the raw image at `path`. Without a path: an empty one of `EMPTY_BYTES`,
    whose place a clone's own disk takes. `filters`: its chain in vmx; `base`: what that calls `BASE`.
    """

    serial: str
    path: Path | None
    read_only: bool
    fd: int
    filters: tuple[FilterSpec, ...] = ()
    base: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """All that the command line depends on.

    :param mac: None: no network device
    :param tap: its network is a tap, whose descriptor QEMU inherits
    """

    qemu: Path
    name: str
    accelerator: Accelerator
    memory_bytes: int
    vcpus: int
    kernel: Path
    initrd: Path
    cmdline: str
    disks: tuple[Disk, ...]
    vsock: VsockPath
    cid: int
    mac: str | None
    tap: bool = False
    origin: Origin = "boot"
    block: BlockPath = "qemu"

    @property
    def has_vsock(self) -> bool:
        """Whether it is given a vsock device; a template's only where the kernel serves it (see `_vsock`)."""
        return self.origin != "template" or self.vsock == "kernel"


def render_argv(machine: Machine) -> tuple[str, ...]:
    """The command line, program first."""
    return (
        str(machine.qemu), *_base(machine), *_cpu_and_memory(machine), *_boot(machine), *_monitor(), *_console(),
        *_incoming(machine), *_vsock(machine), *_net(machine),
        *(word for disk in machine.disks for word in (_vhost_disk if machine.block == "vmx" else _disk)(disk)),
    )  # fmt: skip


def kernel_command_line(accelerator: Accelerator, extra: tuple[str, ...]) -> str:
    """`KERNEL_ARGUMENTS`, the accelerator's and the caller's."""
    return " ".join((*KERNEL_ARGUMENTS, *(TCG_ARGUMENTS if accelerator == "tcg" else ()), *extra))


def mac_of(cid: int) -> str:
    """A locally administered address that is as unique on the host as the CID."""
    return "52:54:" + ":".join(f"{byte:02x}" for byte in (cid & 0xFFFFFFFF).to_bytes(4, "big"))


def _base(machine: Machine) -> tuple[str, ...]:
    return (
        "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX, "-msg", "timestamp=on",
        "-name", f"guest={machine.name},debug-threads=on",
        # a guest that panics or reboots ends; `RunningVm.reset` lifts this for as long as it needs
        "-no-reboot",
    )  # fmt: skip


def _cpu_and_memory(machine: Machine) -> tuple[str, ...]:
    memory = f"{machine.memory_bytes // MIB}M"
    accelerator = "kvm" if machine.accelerator == "kvm" else f"tcg,tb-size={TCG_CACHE_MIB}"
    return (
        # not pc: there the guest interprets a loop of AML for each PCI device, 0.1 s under TCG
        "-machine", "q35,memory-backend=ram,vmport=off,hpet=off,sata=off,smbus=off", "-accel", accelerator,
        "-cpu", "host" if machine.accelerator == "kvm" else "max", "-smp", f"{machine.vcpus},maxcpus={machine.vcpus}",
        # shared: vhost-user back ends map the same memory
        "-m", memory, "-object", f"memory-backend-memfd,id=ram,size={memory},share=on",
    )  # fmt: skip


def _boot(machine: Machine) -> tuple[str, ...]:
    return ("-kernel", str(machine.kernel), "-initrd", str(machine.initrd), "-append", machine.cmdline)


def _monitor() -> tuple[str, ...]:
    return ("-chardev", f"socket,id=qmp,fd={Fd.QMP:d},server=on,wait=off", "-mon", "chardev=qmp,mode=control")


def _console() -> tuple[str, ...]:
    return ("-chardev", f"socket,id=console,fd={Fd.CONSOLE:d}", "-serial", "chardev:console")


def _incoming(machine: Machine) -> tuple[str, ...]:
    return ("-incoming", "defer") if machine.origin == "clone" else ()


def _vsock(machine: Machine) -> tuple[str, ...]:
    """vhost-user's device cannot be migrated: a template has none, and a clone is given its own (`VSOCK_DEVICE`).

    The kernel's can: a clone's has another CID than its template's, and QEMU tells the guest's driver to read it anew.
    """
    if machine.vsock == "kernel":
        return ("-device", f"vhost-vsock-pci,id=vsock,guest-cid={machine.cid},vhostfd={Fd.VSOCK:d}")
    port = ("-device", f"pcie-root-port,id={_PORT},bus=pcie.0,addr=0x1c,chassis=1")
    if machine.origin == "template":
        return port
    chardev = ("-chardev", f"socket,id=vsock,fd={Fd.VSOCK:d}")
    if machine.origin == "clone":
        return (*port, *chardev)
    device = ",".join((VSOCK_DEVICE["driver"], *(f"{k}={v}" for k, v in VSOCK_DEVICE.items() if k != "driver")))
    return (*port, *chardev, "-device", device)


def _net(machine: Machine) -> tuple[str, ...]:
    if machine.mac is None:
        return ()
    # Without romfile= QEMU loads a network boot ROM and SeaBIOS runs it. A clone has no neighbours to tell where it is.
    netdev = f"tap,id=tap,fd={Fd.NET:d}" if machine.tap else "user,id=user,ipv6=off"
    if machine.tap and machine.origin == "template":
        netdev = "hubport,id=tap,hubid=0"  # leads nowhere and, unlike the user-mode network, has no state of its own
    kind = "tap" if machine.tap else "user"
    device = f"virtio-net-pci,id=net0,netdev={kind},mac={machine.mac},romfile=,guest_announce=off"
    return ("-netdev", netdev, "-device", device)


def _disk(disk: Disk) -> tuple[str, ...]:
    node = f"disk{disk.fd}"
    if disk.path is None:
        return _empty_disk(node, disk)
    file = {"driver": "file", "filename": f"/dev/fdset/{disk.fd}", "read-only": disk.read_only}
    if disk.read_only:
        file["locking"] = "off"  # many VMs read the same image
    else:
        file["discard"] = "unmap"  # what the guest deletes and trims, the host gets back
    node_options = {"driver": "raw", "node-name": node, "read-only": disk.read_only, "file": file}
    if not disk.read_only:
        node_options["discard"] = "unmap"
    return (
        "-add-fd", f"fd={disk.fd},set={disk.fd},opaque={_escape(str(disk.path))}",
        "-blockdev", json.dumps(node_options, separators=(",", ":")),
        "-device", f"virtio-blk-pci,drive={node},serial={disk.serial},{_policy(disk)}",
    )  # fmt: skip


def _vhost_disk(disk: Disk) -> tuple[str, ...]:
    """QEMU is the one that listens: after vmx has died it takes its successor's connection, and the device goes on.

    Serial, capacity and whether it can be written are the back end's to say.
    """
    chardev = f"disk{disk.fd}"
    return (
        "-chardev", f"socket,id={chardev},fd={disk.fd},server=on,wait=off",
        "-device", f"vhost-user-blk-pci,chardev={chardev},num-queues=1",
    )  # fmt: skip


def _empty_disk(node: str, disk: Disk) -> tuple[str, ...]:
    options = {"driver": "null-co", "node-name": node, "read-only": disk.read_only, "read-zeroes": True}
    return (
        "-blockdev", json.dumps(options | {"size": EMPTY_BYTES}, separators=(",", ":")),
        "-device", f"virtio-blk-pci,drive={node},serial={disk.serial},{_policy(disk)}",
    )  # fmt: skip


def _policy(disk: Disk) -> str:
    # A host disk that is full stops the VM instead of breaking the guest's file system: it goes on once there is space.
    return "rerror=report" if disk.read_only else "werror=enospc,rerror=report"


def _escape(text: str) -> str:
    """`text` as the value of a comma-separated option."""
    return text.replace(",", ",,")
