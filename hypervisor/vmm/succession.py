"""A vmx that died is replaced, and its VM goes on.

Theory of operation
-------------------
What a vmx had of its QEMU, its successor gets anew. Nobody has to keep anything for that day: QEMU itself holds what
matters, so a daemon that was killed together with vmx finds it all again::

    guest RAM     QEMU's userfaultfd, by pidfd_getfd(2), and where it maps RAM, from /proc. The successor serves the
                  same template (its files are linked into the VM's folder), and wakes every toucher: whoever waited
                  for a page that the dead vmx had read of and not filled touches it again
    stderr        QEMU's pipe, opened for reading again
    console       a new socket pair; QEMU's end goes in by ``chardev-change``
    disks         QEMU listens for each, and takes the successor's connection as it took the first; what was in flight
                  is written in memory that QEMU keeps (csrc/vhost/inflight.h)
    vsock         a new socket pair; QEMU has no reconnect for this device, so it is unplugged and plugged in anew

In this order: `appoint` first, for until RAM is served QEMU's main loop may itself wait for a page and answer nothing;
then `reconnect` over QMP. The guest sees its vsock device leave and come back: open connections are reset, and what
listens goes on to listen. A successor that dies in turn is followed by another, whatever step it died at, since each
step first looks at what QEMU has.

A vmx that ended by itself, with a reason (a page that cannot be served, a QEMU that broke the protocol), is not
replaced: its successor would end likewise.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import itertools
import os
import re
import socket
import stat
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from hypervisor.errors import Conflict, HvError, NotFound, VmFailed
from hypervisor.vmm.argv import VSOCK_DEVICE
from hypervisor.vmm.capabilities import USERFAULTFD
from hypervisor.vmm.devices import DeviceProcesses, connect_disk, open_base, open_disk, vmx_config
from hypervisor.vmm.directory import Processes, boot_id
from hypervisor.vmm.plan import ClonePlan, LaunchPlan
from hypervisor.vmm.snapshots.snapshot import Snapshot
from hypervisor.vmm.templates.frames import HostFrames
from hypervisor.vmm.templates.template import Template
from hypervisor.vmm.watch import ProcessWatch
from hypervisor.vmx.config import RamConfig, RamFds, VmxConfig, VmxFds
from hypervisor.vmx.process import ProcessId

log = structlog.get_logger(__name__)

_SYS_PIDFD_GETFD = 438
_STDERR = 2
_RAM_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-s ([0-9a-f]+) \S+ \d+ +/memfd:memory-backend-memfd")
_VSOCK_ID = VSOCK_DEVICE["id"]
#: a guest takes 0.2 s to let go of a device; one that is asked too early, amid its boot, has to be asked again
_UNPLUG_S = 60.0
_ASK_AGAIN_S = 3.0
_LOOK_S = 0.02

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Succession:
    """What a dead vmx is replaced with, and how often.

    :param frames: for clones: the page-frame database of this daemon
    :param limit: replacements within `seconds` that a VM may have; one more, and it fails
    """

    zygote: DeviceProcesses
    frames: HostFrames
    limit: int = 40
    seconds: float = 30.0


class Budget:
    """How many replacements there may still be."""

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit, self._seconds = limit, seconds
        self._spent: deque[float] = deque()

    def spend(self, now: float) -> bool:
        """One more at `now` (seconds, monotonic); False when it is one too many."""
        while self._spent and now - self._spent[0] > self._seconds:
            self._spent.popleft()
        self._spent.append(now)
        return len(self._spent) <= self._limit


@dataclass(frozen=True, slots=True)
class Heir:
    """A successor that serves RAM, and QEMU's ends of its streams, which `reconnect` hands over. Its owner closes both.

    :param vsock: None: the kernel serves this VM's vsock
    """

    vmx: ProcessWatch
    console: int
    vsock: int | None

    def close_ends(self) -> None:
        """Without QEMU's end a successor has no front end, and ends by itself."""
        for fd in (self.console, self.vsock):
            if fd is not None:
                os.close(fd)


class Controls(Protocol):
    """QMP, as `hypervisor.vmm.vm.RunningVm` has it."""

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Runs a command."""

    async def give_fd(self, name: str, fd: int) -> None:
        """Hands over a duplicate of a descriptor."""


# ---- a successor ---------------------------------------------------------------------------------------------------


async def appoint(plan: LaunchPlan, qemu: ProcessId, succession: Succession) -> Heir:
    """A successor that serves the guest's RAM; recorded as the VM's vmx.

    :raises HvError: what it needs cannot be had, or it died at once; nothing of it is left
    """
    with ExitStack() as stack:
        config, ram = vmx_config(plan), None
        if plan.clone is not None:
            known = await asyncio.to_thread(_clone_now, plan, succession.frames)
            config, ram = await asyncio.to_thread(_inherit_ram, config, known, plan, qemu, succession, stack)
        console, console_out = _pair(stack)
        vsock, vsock_out = _pair(stack) if config.guest_cid is not None else (None, None)
        streams = (
            (console_out, _open_log(plan.files.console_log, stack)),
            (_open_stderr(qemu, stack), _open_log(plan.files.qemu_log, stack)),
        )
        fds = VmxFds(
            frontend=vsock_out, streams=streams, ram=ram, blocks=_blocks(plan, stack), bases=_bases(plan, stack)
        )
        process = await succession.zygote.fork(config, fds)
        plan.files.write_processes(Processes(boot_id(), vmx=process, qemu=qemu))
        try:
            watch = ProcessWatch.open(process)
        except NotFound as e:
            raise VmFailed("a successor of vmx died at once") from e
        return Heir(watch, os.dup(console), None if vsock is None else os.dup(vsock))


def _clone_now(plan: LaunchPlan, frames: HostFrames) -> ClonePlan:
    """Which pages come from where, in this daemon's database; the template is checked as for a start."""
    assert plan.clone is not None
    template = Template.linked(plan.files.template)
    if template.manifest.ram_sha256 != plan.clone.ram_sha256:
        raise NotFound(f"{template.path} is not the template that the VM was cloned from")
    if plan.clone.snapshot is None:
        return frames.clone_plan(template)
    return frames.snapshot_plan(template, Snapshot.read(plan.files.snapshot))


def _inherit_ram(
    config: VmxConfig, clone: ClonePlan, plan: LaunchPlan, qemu: ProcessId, succession: Succession, stack: ExitStack
) -> tuple[VmxConfig, RamFds]:
    assert config.ram is not None
    ram: RamConfig = dataclasses.replace(
        config.ram, mappings=clone.mappings, inherited=ram_mapping(qemu.pid, clone.ram_bytes)
    )
    path = plan.files.template
    fds = RamFds(
        qemu=_keep(borrow(qemu, _userfaultfd_of(qemu.pid)), stack), database=succession.frames.reader_fd,
        template=_keep(os.open(Template.ram_of(path), os.O_RDONLY | os.O_CLOEXEC), stack),
        device=_keep(os.open(USERFAULTFD, os.O_RDWR | os.O_CLOEXEC), stack),
        layers=open_layers(plan, lambda fd: _keep(fd, stack)),
    )  # fmt: skip
    return dataclasses.replace(config, ram=ram), fds


def open_layers(plan: LaunchPlan, keep: Callable[[int], int]) -> tuple[int, ...]:
    """Of a VM that went on from a snapshot, its layers; `keep` sees to it that each is closed."""
    if plan.clone is None or plan.clone.snapshot is None:
        return ()
    paths = Snapshot.read(plan.files.snapshot).layers
    return tuple(keep(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) for path in paths)


def _blocks(plan: LaunchPlan, stack: ExitStack) -> tuple[tuple[int, int | None], ...]:
    """QEMU takes the connections once it has noticed that the dead vmx hung up; what that had not ended comes again."""
    if plan.block != "vmx":
        return ()
    files = [None if d.path is None else _keep(open_disk(d, d.path), stack) for d in plan.disks]
    return tuple((_keep(connect_disk(plan, d), stack), file) for d, file in zip(plan.disks, files, strict=True))


def _bases(plan: LaunchPlan, stack: ExitStack) -> tuple[int, ...]:
    return tuple(_keep(open_base(disk), stack) for disk in plan.disks if disk.base is not None)


def _pair(stack: ExitStack) -> tuple[int, int]:
    a, b = socket.socketpair()
    return _keep(a.detach(), stack), _keep(b.detach(), stack)


def _keep(fd: int, stack: ExitStack) -> int:
    stack.callback(os.close, fd)
    return fd


def _open_log(path: Path, stack: ExitStack) -> int:
    try:
        return _keep(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), stack)
    except OSError as e:
        raise HvError(f"cannot open {path}: {e.strerror}") from e


def _open_stderr(qemu: ProcessId, stack: ExitStack) -> int:
    """The reading end of the pipe that is QEMU's stderr.

    QEMU may be hostile: what it has there is taken as it is, looked at, and only a pipe is opened.
    """
    with ExitStack() as borrowed:
        fd = _keep(borrow(qemu, _STDERR), borrowed)
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            raise HvError("QEMU's stderr is no pipe any more")
        return _keep(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), stack)


def borrow(process: ProcessId, number: int) -> int:
    """A duplicate of another process's descriptor; the caller's to close. Source: pidfd_getfd(2).

    :raises NotFound: the process has ended, or has no such descriptor
    :raises HvError: this user may not
    """
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError as e:
        raise NotFound(f"there is no process {process.pid}") from e
    try:
        if not process.alive():  # looked at after the descriptor pinned its number
            raise NotFound(f"process {process.pid} has ended")
        fd: int = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            why = os.strerror(ctypes.get_errno())
            raise HvError(f"cannot borrow descriptor {number} of process {process.pid}: {why}")
        return fd
    finally:
        os.close(pidfd)


def _userfaultfd_of(pid: int) -> int:
    """:raises NotFound: it has none"""
    return _descriptor_of(pid, "anon_inode:[userfaultfd]", "userfaultfd")


def ram_descriptor(pid: int) -> int:
    """The number of the descriptor of a QEMU that is the memfd of its guest's RAM. Raises `NotFound`."""
    return _descriptor_of(pid, "/memfd:memory-backend-memfd (deleted)", "guest RAM")


def _descriptor_of(pid: int, target: str, what: str) -> int:
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if str(entry.readlink()) == target:
                    return int(entry.name)
    except OSError as e:
        raise NotFound(f"cannot look at process {pid}: {e.strerror}") from e
    raise NotFound(f"process {pid} has no {what}")


def ram_mapping(pid: int, ram_bytes: int) -> tuple[int, int, int]:
    """Where a QEMU maps its guest's RAM: (address, length, offset in RAM).

    :raises NotFound: it does not, or not in one piece
    """
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError as e:
        raise NotFound(f"cannot look at process {pid}: {e.strerror}") from e
    pieces = [tuple(int(x, 16) for x in m.groups()) for m in map(_RAM_MAPPING.match, lines) if m]
    if pieces:
        start, end = pieces[0][0], pieces[-1][1]
        # the kernel may show one mapping in several lines
        joined = all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
        if joined and end - start == ram_bytes and pieces[0][2] == 0:
            return start, ram_bytes, 0
    raise NotFound(f"process {pid} does not map {ram_bytes} bytes of guest RAM in one piece")


# ---- its connections to QEMU ---------------------------------------------------------------------------------------


async def reconnect(vm: Controls, heir: Heir) -> None:
    """Gives QEMU its ends of console and vsock.

    :raises HvError: QEMU refuses, does not answer, or the guest does not let go of its vsock device
    """
    await _change_console(vm, heir.console)
    if heir.vsock is not None:
        await unplug(vm)
        chardev = await _add_chardev(vm, heir.vsock)
        await vm.execute("device_add", VSOCK_DEVICE | {"chardev": chardev})


async def _change_console(vm: Controls, fd: int) -> None:
    await vm.give_fd("console-end", fd)
    try:
        await vm.execute("chardev-change", {"id": "console", "backend": _backend("console-end")})
    except Conflict as e:  # a VM without its console goes on
        log.warning("the console is lost", reason=str(e))


def _backend(name: str) -> dict[str, object]:
    address = {"type": "fd", "data": {"str": name}}
    return {"type": "socket", "data": {"addr": address, "server": False}}


async def unplug(vm: Controls) -> None:
    """Has the guest let go of its vsock device, and waits until it is gone.

    :raises VmFailed: it does not let go
    """
    try:
        async with asyncio.timeout(_UNPLUG_S):
            asked = -_ASK_AGAIN_S
            while _VSOCK_ID in await devices(vm):
                now = asyncio.get_running_loop().time()
                if now - asked >= _ASK_AGAIN_S:
                    asked = now
                    with contextlib.suppress(Conflict):  # it has been asked before
                        await vm.execute("device_del", {"id": _VSOCK_ID})
                await asyncio.sleep(_LOOK_S)
    except TimeoutError as e:
        raise VmFailed(f"the guest did not let go of its vsock device within {_UNPLUG_S:g} s") from e


async def devices(vm: Controls) -> set[str]:
    """Ids of the devices that are plugged in."""
    return {str(entry["name"]) for entry in await vm.execute("qom-list", {"path": "/machine/peripheral"})}


async def _add_chardev(vm: Controls, fd: int) -> str:
    """A chardev for the device to come; those of its predecessors go."""
    names = {str(entry["label"]) for entry in await vm.execute("query-chardev")}
    for name in sorted(n for n in names if n.startswith("vsock")):
        with contextlib.suppress(Conflict):
            await vm.execute("chardev-remove", {"id": name})
            names.discard(name)
    new = next(n for n in (f"vsock-{i}" for i in range(len(names) + 1)) if n not in names)
    await vm.give_fd("vsock-end", fd)
    await vm.execute("chardev-add", {"id": new, "backend": _backend("vsock-end")})
    return new
