"""What a vmx is made from: a frozen value, sent to the zygote as JSON, with the descriptors beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from hypervisor.errors import InvalidInput
from hypervisor.iofilter.spec import FilterSpec
from hypervisor.vsock.address import FIRST_GUEST_CID, LAST_GUEST_CID, UnixVsock, check_path
from hypervisor.vsock.backend import VsockLimits

CONTROL_SOCKET = "vmx.sock"
FRONTEND_SOCKET = "vhost.sock"
HOST_SOCKET = "vsock.sock"
LOG = "vmx.log"
DEFAULT_CONNECTIONS = 2048
"""Of csrc/vsock/vsock.h, for the limit on descriptors."""


@dataclass(frozen=True, kw_only=True)
class RamConfig:
    """Guest RAM that is filled from a template as it is touched.

    :param ram_bytes: its size
    :param mappings: pages of RAM as (first page, pages, VAD, first page of the VAD), not overlapping; the VADs are in
        the page-frame database whose descriptor comes along (`VmxFds.ram`) and read from source `source`
    :param around_pages: fault-around window, a power of two; 1 while a working set is recorded, so that it has
        only what was touched
    :param inherited: of a successor: QEMU's mapping as (address, length, offset in RAM), whose userfaultfd is
        `RamFds.qemu`
    :param template: SHA-256 of the template's RAM, in hex: what a working set must be of
    """

    ram_bytes: int
    mappings: tuple[tuple[int, int, int, int], ...]
    source: int = 0
    around_pages: int = 16
    template: str = ""
    inherited: tuple[int, int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One vhost-user-blk device.

    :param serial: by which the guest finds it, at most 20 bytes
    :param read_only: for the life of the device
    :param announce_bytes: the capacity that the guest is told, whatever disk the device has; 0: its disk's own
    :param queues: 1 to 16
    :param has_disk: its disk's descriptor comes along (`VmxFds.blocks`); else it is empty until one is put in
    :param filters: of its disk, from the guest to the data; files of theirs lie in the VM's folder
    :param base: the name by which ``linkedclone`` among them redirects; that disk's descriptor comes along, too
        (`VmxFds.bases`)
    """

    serial: str
    read_only: bool
    announce_bytes: int = 0
    queues: int = 1
    has_disk: bool = True
    filters: tuple[FilterSpec, ...] = ()
    base: str = ""

    @classmethod
    def from_value(cls, value: dict[str, Any]) -> Self:
        """Out of what `VmxConfig.to_json` made of it."""
        specs = (FilterSpec(s["kind"], s["name"], tuple((k, v) for k, v in s["settings"])) for s in value["filters"])
        return cls(**value | {"filters": tuple(specs)})


@dataclass(frozen=True, kw_only=True)
class VmxConfig:
    """One VM's device process.

    :param directory: the VM's state folder; must exist and belong to ``uid``. The process sees nothing else (chroot)
    when
        it is started as root. Its sockets and its log are made there.
    :param guest_cid: None: no vsock device, because the kernel's vhost-vsock serves this VM
    :param uid: user and group to become; None: stay (then nothing but what an unprivileged user can do is done)
    :param cgroups: cgroup folders to join, one a hierarchy
    :param stream_limits: for each stream whose descriptors are given (`VmxFds.streams`): its log's greatest size in
    bytes
    :param log_max_bytes: vmx.log never grows beyond this
    :param ram: guest RAM is filled lazily, by this process
    :param blocks: the disks that it serves
    """

    directory: Path
    guest_cid: int | None
    uid: int | None = None
    gid: int | None = None
    cgroups: tuple[Path, ...] = ()
    vsock: VsockLimits = field(default_factory=VsockLimits)
    stream_limits: tuple[int, ...] = ()
    log_max_bytes: int = 1024 * 1024
    ram: RamConfig | None = None
    blocks: tuple[BlockConfig, ...] = ()

    def validate(self) -> Self:
        """Itself. Raises `InvalidInput` naming the field."""
        check_path(self.directory / HOST_SOCKET)
        if not self.directory.is_dir():
            raise InvalidInput(f"{self.directory} is not a folder", where="directory")
        if self.guest_cid is not None and not FIRST_GUEST_CID <= self.guest_cid <= LAST_GUEST_CID:
            raise InvalidInput(f"{self.guest_cid} is not between 3 and {LAST_GUEST_CID}", where="guest_cid")
        if (self.uid is None) != (self.gid is None) or self.uid == 0 or self.gid == 0:
            raise InvalidInput("uid and gid must be given together, and not be root's", where="uid")
        return self

    @property
    def address(self) -> UnixVsock:
        """Where the guest's vsock is reached through this vmx."""
        return UnixVsock(self.directory / HOST_SOCKET)

    @property
    def frontend_path(self) -> Path:
        """Where QEMU's chardev connects, unless it was given a connected descriptor."""
        return self.directory / FRONTEND_SOCKET

    @property
    def control_path(self) -> Path:
        return self.directory / CONTROL_SOCKET

    def to_json(self) -> bytes:
        """The value as `from_json` reads it."""
        value = asdict(self) | {"directory": str(self.directory), "cgroups": [str(path) for path in self.cgroups]}
        return json.dumps(value).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """The inverse of `to_json`."""
        value: dict[str, Any] = json.loads(text)
        value["directory"] = Path(value["directory"])
        value["cgroups"] = tuple(Path(path) for path in value["cgroups"])
        value["vsock"] = VsockLimits(**value["vsock"])
        value["stream_limits"] = tuple(value["stream_limits"])
        value["blocks"] = tuple(BlockConfig.from_value(block) for block in value["blocks"])
        if value["ram"] is not None:
            value["ram"]["mappings"] = tuple(tuple(m) for m in value["ram"]["mappings"])
            if value["ram"]["inherited"] is not None:
                value["ram"]["inherited"] = tuple(value["ram"]["inherited"])
            value["ram"] = RamConfig(**value["ram"])
        return cls(**value)


@dataclass(frozen=True, kw_only=True)
class RamFds:
    """Descriptors for lazily filled RAM.

    :param qemu: a socket, connected to the library in QEMU that hands over the userfaultfd (csrc/memory/preload.c); or
        that userfaultfd itself, with `RamConfig.inherited`
    :param database: the host's page-frame database, which this process only reads
    :param template: the file that the VADs read from
    :param device: /dev/userfaultfd, open
    :param layers: files that VADs of sources 1, 2, ... read from
    :param working_set: what to prefetch (`hypervisor.vmx.working_set`); None: nothing
    """

    qemu: int
    database: int
    template: int
    device: int
    working_set: int | None = None
    layers: tuple[int, ...] = ()

    def flat(self) -> list[int]:
        """In the order in which they travel."""
        fds = (self.qemu, self.database, self.template, self.device, *self.layers, self.working_set)
        return [fd for fd in fds if fd is not None]


@dataclass(frozen=True, kw_only=True)
class VmxFds:
    """Descriptors for a vmx; it gets duplicates, the caller keeps and closes its own.

    :param frontend: a Unix socket connected to QEMU's vhost-user chardev; None: vmx listens on ``vhost.sock``
    :param streams: pairs of a stream to drain and the regular file that its bounded log is (see
    `hypervisor.vmx.console`)
    :param blocks: for each of `VmxConfig.blocks` a socket connected to QEMU's chardev, and its disk or None
    :param bases: the base disk of each of these that has one, in their order, opened for reading
    """

    frontend: int | None = None
    streams: tuple[tuple[int, int], ...] = ()
    ram: RamFds | None = None
    blocks: tuple[tuple[int, int | None], ...] = ()
    bases: tuple[int, ...] = ()

    def flat(self) -> list[int]:
        """In the order in which they travel."""
        frontend = [] if self.frontend is None else [self.frontend]
        ram = [] if self.ram is None else self.ram.flat()
        blocks = [fd for pair in self.blocks for fd in pair if fd is not None]
        return [*frontend, *(fd for pair in self.streams for fd in pair), *ram, *blocks, *self.bases]


NO_FDS = VmxFds()
