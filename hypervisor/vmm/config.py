"""What a caller wants of a VM: a frozen value, refused at construction when it makes no sense.

Nothing here looks at the host; what it can give is `hypervisor.vmm.capabilities`, and `plan_launch` brings both
together.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hypervisor.errors import InvalidInput
from hypervisor.iofilter.spec import FilterSpec
from hypervisor.vmm.guest import GuestImage

MIB = 1 << 20
GIB = 1 << 30

MIN_MEMORY = 64 * MIB
MAX_VCPUS = 64
MAX_TAP_PREFIX = 6
"""An interface's name has 15 characters, and a VM's number takes 8."""
#: machine ``q35`` has 32 PCI slots; host bridge, ISA bridge, NIC, vsock, two disks of our own and some to spare
MAX_IMAGE_DISKS = 22
MIN_DISK = 16 * MIB
MAX_DISK = 16 * 1024 * GIB
ROOT_SERIAL = "hv-root"
DATA_SERIAL = "hv-data"
BASE = "disk:base"
"""By which a filter in vmx names the base of a disk."""

AcceleratorWish = Literal["auto", "kvm", "tcg"]
#: who serves a VM's disks: ``vmx`` by vhost-user-blk devices on the I/O filter framework, or QEMU's own block layer
BlockPath = Literal["vmx", "qemu"]
Net = Literal["user", "tap", "none"]


def default_block() -> BlockPath:
    """``vmx``, unless the environment's ``HV_BLOCK`` says ``qemu``."""
    return "vmx" if os.environ.get("HV_BLOCK") == "vmx" else "qemu"


_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,318}[A-Za-z0-9])?")
_SERIAL = re.compile(r"[A-Za-z0-9._-]{1,20}")  # 20 bytes is all that virtio-blk carries


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDisk:
    """A read-only disk that VMs may share.

    :param serial: how the guest finds it, at most 20 of ``[A-Za-z0-9._-]``
    :param path: absolute path of a raw image
    :param filters: its chain, from the guest to the data; only where vmx serves the disks
    """

    serial: str
    path: Path
    filters: tuple[FilterSpec, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DataDisk:
    """The VM's own writable disk: ext4, serial ``hv-data``, made at the start, gone with the VM's directory.

    :param size_bytes: a multiple of 4096; what a full one gives the guest is ENOSPC
    :param preallocate: reserve all of it now (a start fails where the host lacks it); else the file is sparse, and a
        host that runs out pauses the VM (event ``BLOCK_IO_ERROR``), which `RunningVm.resume` lets go on
    :param quotas: the guest may mount it with limits of directories (``prjquota``)
    :param filters: its chain, from the guest to the data; only where vmx serves the disks. Files that settings name
        as ``./NAME`` are made at the start, in the folder that vmx has as its root
    :param base: a formatted, empty disk of this size (`hypervisor.vmm.bases`), which this one is a linked clone of by
        a filter among these whose ``base`` is `BASE`; then no file system is made
    """

    size_bytes: int = GIB
    preallocate: bool = False
    quotas: bool = False
    filters: tuple[FilterSpec, ...] = ()
    base: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VmConfig:
    """One VM, as wanted.

    :param name: for people, logs and process lists
    :param memory_bytes: the guest's RAM, whole MiB
    :param vcpus: virtual CPUs
    :param cpu_limit: host CPUs that the VM's processes may use in all (1.5 is one and a half); None: as many as there
        are
    :param net: ``user``: QEMU's user-mode network; ``tap``: a tap of the host; ``none``: no network device
    :param tap_prefix: what the name of its tap begins with, at most 6 characters
    :param kernel_arguments: appended to the kernel command line
    :param console_bytes: how much of the guest's console and of QEMU's stderr is kept, each
    :raises InvalidInput: naming the field and what it may be
    """

    name: str
    guest: GuestImage
    memory_bytes: int = 256 * MIB
    vcpus: int = 1
    cpu_limit: float | None = None
    net: Net = "user"
    tap_prefix: str = ""
    image_disks: tuple[ImageDisk, ...] = ()
    data_disk: DataDisk | None = field(default_factory=DataDisk)
    accelerator: AcceleratorWish = "auto"
    block: BlockPath = field(default_factory=default_block)
    kernel_arguments: tuple[str, ...] = ()
    console_bytes: int = MIB

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_memory(self.memory_bytes)
        _check_range("vcpus", self.vcpus, 1, MAX_VCPUS)
        if self.cpu_limit is not None and not 0.01 <= self.cpu_limit <= 4096:
            raise InvalidInput(f"is {self.cpu_limit}; give CPUs between 0.01 and 4096, or none", where="cpu_limit")
        _check_choice("net", self.net, ("user", "tap", "none"))
        if (self.net == "tap") != bool(self.tap_prefix) or len(self.tap_prefix) > MAX_TAP_PREFIX:
            raise InvalidInput("is 1 to 6 characters for a tap, empty else", where="tap_prefix")
        _check_choice("accelerator", self.accelerator, ("auto", "kvm", "tcg"))
        _check_choice("block", self.block, ("vmx", "qemu"))
        _check_range("console_bytes", self.console_bytes, 4096, 64 * MIB)
        _check_image_disks(self.image_disks)
        if self.block != "vmx" and any(disk.filters for disk in (*self.image_disks, self.data_disk) if disk):
            raise InvalidInput("are served by QEMU, which has no filters; block must be vmx", where="disks")
        if self.data_disk is not None:
            _check_data_disk(self.data_disk)
        _check_kernel_arguments(self.kernel_arguments)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        mend = "use 1 to 320 letters, digits, '.', '_', '-' and '/', the first and last a letter or digit"
        raise InvalidInput(f"is {name!r}; {mend}", where="name")


def _check_memory(memory_bytes: int) -> None:
    if memory_bytes < MIN_MEMORY:
        raise InvalidInput(
            f"is {memory_bytes} bytes; a guest needs {MIN_MEMORY // MIB} MiB or more", where="memory_bytes"
        )
    if memory_bytes % MIB:
        raise InvalidInput(f"is {memory_bytes} bytes; give whole MiB (multiples of {MIB})", where="memory_bytes")


def _check_range(where: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidInput(f"is {value}; give {low} to {high}", where=where)


def _check_choice(where: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidInput(f"is {value!r}; allowed: {', '.join(allowed)}", where=where)


def _check_image_disks(disks: tuple[ImageDisk, ...]) -> None:
    if len(disks) > MAX_IMAGE_DISKS:
        raise InvalidInput(
            f"are {len(disks)}; a VM takes up to {MAX_IMAGE_DISKS} different images", where="image_disks"
        )
    seen = {ROOT_SERIAL, DATA_SERIAL}
    for i, disk in enumerate(disks):
        where = f"image_disks[{i}]"
        if not _SERIAL.fullmatch(disk.serial):
            raise InvalidInput(
                f"is {disk.serial!r}; use 1 to 20 letters, digits, '.', '_' and '-'", where=f"{where}.serial"
            )
        if disk.serial in seen:
            raise InvalidInput(
                f"{disk.serial!r} is taken; each disk needs a serial of its own", where=f"{where}.serial"
            )
        seen.add(disk.serial)
        if not disk.path.is_absolute():
            raise InvalidInput(f"{str(disk.path)!r} is relative; give an absolute path", where=f"{where}.path")


def _check_data_disk(disk: DataDisk) -> None:
    where = "data_disk.size_bytes"
    if not MIN_DISK <= disk.size_bytes <= MAX_DISK:
        raise InvalidInput(f"is {disk.size_bytes}; give {MIN_DISK // MIB} MiB to {MAX_DISK // GIB} GiB", where=where)
    if disk.size_bytes % 4096:
        raise InvalidInput(f"is {disk.size_bytes}; give a multiple of 4096", where=where)
    clones = [spec for spec in disk.filters if ("base", BASE) in spec.settings]
    if bool(clones) != (disk.base is not None) or (clones and disk.preallocate):
        raise InvalidInput("a base goes with a linkedclone filter of it, and not with preallocate", where="data_disk")


def _check_kernel_arguments(arguments: tuple[str, ...]) -> None:
    for i, argument in enumerate(arguments):
        if not argument or not argument.isascii() or not argument.isprintable():
            raise InvalidInput(f"is {argument!r}; give printable ASCII", where=f"kernel_arguments[{i}]")
    if len(" ".join(arguments)) > 1024:
        raise InvalidInput(
            "are longer than 1024 bytes together; the kernel takes 2048 in all", where="kernel_arguments"
        )
