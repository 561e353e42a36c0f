"""`start`: a launch plan becomes a running VM, or leaves nothing. `adopt`: finds a running VM again.

Theory of operation
-------------------
Phases, in this order; each makes something that the next needs, and whatever was made is undone in reverse when a
later one fails or is cancelled::

    directory   the folder, config.json
    disk        the data disk
    sockets     qmp.sock listening; socket pairs for console and vsock; stderr's pipe; logs open
    cgroup      with its limits
    vmx         forked, confined          -> processes.json
    qemu        spawned through hv-confine -> processes.json
    qmp         QEMU answers
    ready       the caller's condition: the agent answers

Every socket exists before the process that uses it, so nothing is polled for. A hostd that is killed anywhere in
between leaves processes that `hypervisor.vmm.sweep` finds by cgroup, environment or root directory, recorded or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypervisor.errors import InvalidInput, NotFound, Unavailable, VmFailed
from hypervisor.vmm import records
from hypervisor.vmm.argv import Disk, Fd
from hypervisor.vmm.death import VmDied, read_tails, tail_text
from hypervisor.vmm.devices import DeviceProcesses, vmx_config
from hypervisor.vmm.directory import Processes, VmDirectory, boot_id, disk_error, write_atomically
from hypervisor.vmm.disk import make_data_disk
from hypervisor.vmm.identity import open_kernel_vsock
from hypervisor.vmm.plan import LaunchPlan
from hypervisor.vmm.qmp import Qmp
from hypervisor.vmm.sweep import belongs
from hypervisor.vmm.uncut import uncut
from hypervisor.vmm.vm import RunningVm
from hypervisor.vmm.watch import ProcessWatch, describe_status
from hypervisor.vmx.config import VmxFds
from hypervisor.vmx.process import ProcessId
from hypervisor.vsock.address import VsockAddress

QMP_TIMEOUT_S = 15.0
READY_TIMEOUT_S = 60.0
_DYING_S = 3.0
#: descriptors are moved up here before they are given their numbers, so that none is overwritten by another's number
_FD_BASE = 256

Ready = Callable[[VsockAddress], Awaitable[object]]


async def start(
    plan: LaunchPlan, zygote: DeviceProcesses, *, ready: Ready | None = None, ready_timeout_s: float = READY_TIMEOUT_S
) -> RunningVm:
    """Start the VM that `plan` describes.

    Failed or cancelled at any point, it leaves no process, file, cgroup or socket.

    :param zygote: makes the device process
    :param ready: awaited with the VM's address before the VM counts as started, at most `ready_timeout_s` seconds
    :raises VmDied: QEMU or vmx ended meanwhile; carries their last words
    :raises VmFailed: `ready` took too long; the message ends with the console's last lines
    :raises Conflict: the directory exists
    :raises ResourceExhausted: the host lacks disk space, or a CID is taken
    :raises HostUnfit: a program or device is missing
    """
    phases = _Phases()
    async with AsyncExitStack() as undo:
        with phases("directory"):
            await _make_directory(plan, undo)
        with phases("disk"):
            if plan.data_disk is not None:
                await make_data_disk(plan.files.disk, plan.data_disk, plan.mke2fs)
        vm = await _start_processes(plan, zygote, phases, undo)
        if ready is not None:
            with phases("ready"):
                await _until_ready(vm, ready, ready_timeout_s)
        undo.pop_all()
        vm.timings.update(phases.seconds)
        return vm


async def adopt(directory: Path) -> RunningVm | None:
    """The VM that an earlier daemon started in `directory`; None when it does not run, or only parts of it do.

    The recorded processes must have their start times, and nothing to be seen of them may say that they are others.

    :raises Unavailable: QEMU lives and does not answer; `hypervisor.vmm.sweep` ends it
    """
    files = VmDirectory(directory)
    try:
        plan = records.loads(LaunchPlan, files.config.read_bytes(), where=str(files.config))
    except (OSError, InvalidInput):
        return None
    recorded = files.read_processes()
    if plan.directory != directory or recorded.qemu is None or recorded.vmx is None:
        return None
    async with AsyncExitStack() as undo:
        try:
            qemu = _watched(recorded.qemu, undo)
            vmx = _watched(recorded.vmx, undo)
        except NotFound:
            return None
        if any(belongs(watch.process.pid, directory) is False for watch in (qemu, vmx)):
            return None
        qmp = await Qmp.connect(files.qmp_socket, name=plan.name)
        undo.pop_all()
        return RunningVm(plan, qemu=qemu, vmx=vmx, qmp=qmp, timings={})


class _Phases:
    """Seconds of each phase, by name, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - begun


@dataclass(frozen=True, slots=True)
class _Ends:
    """hostd's side of what QEMU and vmx are given; each closed by the stack that made it."""

    qmp: int
    console: int
    console_out: int
    stderr: int
    stderr_out: int
    vsock: int
    vsock_out: int | None
    console_log: int
    qemu_log: int


async def _make_directory(plan: LaunchPlan, undo: AsyncExitStack) -> None:
    def make() -> None:
        plan.files.create(uid=plan.identity.uid)
        try:
            write_atomically(plan.files.config, records.dumps(plan))
            plan.files.write_processes(Processes(boot_id()))
        except BaseException:
            plan.files.remove()
            raise

    await uncut(make, plan.files.remove)
    undo.push_async_callback(asyncio.to_thread, plan.files.remove)


async def _start_processes(
    plan: LaunchPlan, zygote: DeviceProcesses, phases: _Phases, undo: AsyncExitStack
) -> RunningVm:
    """vmx and QEMU, supervised by a `RunningVm` whose end `undo` then owns."""
    async with AsyncExitStack() as ends_stack:  # our copies close when both processes have theirs
        with phases("sockets"):
            ends = _open_ends(plan, ends_stack)
        with phases("cgroup"):
            cgroups = plan.cgroup.cgroups()
            paths = cgroups.create(plan.cgroup.name, plan.cgroup.limits)
            undo.push_async_callback(cgroups.remove, paths)
        with phases("vmx"):
            streams = ((ends.console_out, ends.console_log), (ends.stderr_out, ends.qemu_log))
            vmx_id = await zygote.fork(vmx_config(plan), VmxFds(frontend=ends.vsock_out, streams=streams))
            vmx = _watched_child(vmx_id, undo)
            plan.files.write_processes(Processes(boot_id(), vmx=vmx_id))
        with phases("qemu"):
            qemu_id = _spawn_qemu(plan, ends)
            qemu = _watched_child(qemu_id, undo)
            plan.files.write_processes(Processes(boot_id(), vmx=vmx_id, qemu=qemu_id))
    with phases("qmp"):
        qmp = await _connect_qmp(plan, qemu, vmx)
    vm = RunningVm(plan, qemu=qemu, vmx=vmx, qmp=qmp, timings={})
    undo.push_async_callback(vm.end_now)
    return vm


def _open_ends(plan: LaunchPlan, stack: AsyncExitStack) -> _Ends:
    def keep(fd: int) -> int:
        stack.callback(os.close, fd)
        return fd

    def pair() -> tuple[int, int]:
        a, b = socket.socketpair()
        return keep(a.detach()), keep(b.detach())

    files = plan.files
    console, console_out = pair()
    stderr_out, stderr = (keep(fd) for fd in os.pipe())
    vsock, vsock_out = pair() if plan.vsock == "vhost-user" else (keep(open_kernel_vsock(plan.identity.cid)), None)
    return _Ends(
        qmp=keep(files.listen(files.qmp_socket).detach()), console=console, console_out=console_out, stderr=stderr,
        stderr_out=stderr_out, vsock=vsock, vsock_out=vsock_out, console_log=keep(files.open_log(files.console_log)),
        qemu_log=keep(files.open_log(files.qemu_log)),
    )  # fmt: skip


def _spawn_qemu(plan: LaunchPlan, ends: _Ends) -> ProcessId:
    """QEMU in a session of its own, with the descriptors that its argv names and nothing else of ours."""
    argv = plan.spawned_argv()
    with contextlib.ExitStack() as stack:

        def keep(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        given = {2: ends.stderr, Fd.QMP: ends.qmp, Fd.CONSOLE: ends.console, Fd.VSOCK: ends.vsock}
        given[0] = given[1] = keep(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
        given |= {disk.fd: keep(_open_disk(disk)) for disk in plan.disks}
        high = {number: keep(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FD_BASE)) for number, fd in given.items()}
        actions = [(os.POSIX_SPAWN_DUP2, fd, int(number)) for number, fd in high.items()]
        try:
            pid = os.posix_spawn(
                argv[0], argv, dict(plan.confinement.environment), file_actions=actions, setsid=True,
                setsigmask=(), setsigdef=range(1, 32),
            )  # fmt: skip
        except OSError as e:
            raise VmFailed(f"cannot start {argv[0]}: {e.strerror}") from e
    return ProcessId.of(pid)


def _open_disk(disk: Disk) -> int:
    try:
        return os.open(disk.path, (os.O_RDONLY if disk.read_only else os.O_RDWR) | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise NotFound(f"disk {disk.serial}: there is no {disk.path}") from e
    except OSError as e:
        raise disk_error(e, f"disk {disk.serial}: cannot open {disk.path}") from e


def _watched(process: ProcessId, undo: AsyncExitStack) -> ProcessWatch:
    watch = ProcessWatch.open(process)
    undo.callback(watch.close)
    return watch


def _watched_child(process: ProcessId, undo: AsyncExitStack) -> ProcessWatch:
    """As `_watched`, and undone by killing it."""
    watch = _watched(process, undo)
    undo.push_async_callback(watch.kill)
    return watch


async def _connect_qmp(plan: LaunchPlan, qemu: ProcessWatch, vmx: ProcessWatch) -> Qmp:
    """QEMU's greeting, or why it ended instead."""
    connecting = asyncio.ensure_future(Qmp.connect(plan.files.qmp_socket, name=plan.name, timeout=QMP_TIMEOUT_S))
    dying = asyncio.ensure_future(qemu.wait())
    try:
        await asyncio.wait([connecting, dying], return_when=asyncio.FIRST_COMPLETED)
        if not connecting.done():
            raise await _early_death(plan, qemu, vmx)
        try:
            return await connecting
        except Unavailable:
            # It hung up, so it is ending; its status and stderr say better why than the socket does.
            await asyncio.wait([dying], timeout=_DYING_S)
            if not qemu.alive:
                raise await _early_death(plan, qemu, vmx) from None
            raise
    finally:
        await _end_tasks(connecting, dying)


async def _early_death(plan: LaunchPlan, qemu: ProcessWatch, vmx: ProcessWatch) -> VmFailed:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DYING_S):
            await vmx.wait()  # by then it has written what QEMU said
    said, console = await asyncio.to_thread(read_tails, plan.files)
    what = f"QEMU {describe_status(qemu.status())} before it was set up"
    return VmFailed(f"VM {plan.name}: {what}{tail_text(said, console)}")


async def _until_ready(vm: RunningVm, ready: Ready, timeout_s: float) -> None:
    answering = asyncio.ensure_future(ready(vm.address))
    dying = asyncio.ensure_future(vm.wait_dead())
    try:
        await asyncio.wait([answering, dying], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            raise VmDied(vm.name, dying.result())
        if answering.done():
            await answering
            return
        said, console = await asyncio.to_thread(read_tails, vm.plan.files)
        raise VmFailed(f"VM {vm.name}: the guest was not ready within {timeout_s:g} s{tail_text(said, console)}")
    finally:
        await _end_tasks(answering, dying)


async def _end_tasks(*tasks: asyncio.Future[Any]) -> None:
    """Cancel them, and wait until they have ended, however."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
