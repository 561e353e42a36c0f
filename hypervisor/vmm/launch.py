"""`start`: a launch plan becomes a running VM, or leaves nothing. `adopt`: finds a running VM again.

Theory of operation
-------------------
Phases, in this order; each makes something that the next needs, and whatever was made is undone in reverse when a
later one fails or is cancelled::

    directory   the folder, config.json
    sockets     qmp.sock listening; socket pairs for console and vsock; stderr's pipe; logs open
    cgroup      with its limits
    disk        the data disk; meanwhile vmx is being forked and confined
    qemu        spawned through hv-confine -> processes.json; it waits for vmx where it needs it
    vmx         serves                     -> processes.json
    qmp         QEMU answers
    restore     a clone: device state loaded, guest goes on (from a snapshot: not yet), vsock device plugged in
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

import structlog

from hypervisor.errors import HvError, InvalidInput, NotFound, Unavailable, VmFailed
from hypervisor.vmm import records
from hypervisor.vmm.argv import Fd
from hypervisor.vmm.bases import link_base
from hypervisor.vmm.capabilities import USERFAULTFD
from hypervisor.vmm.chains import make_states
from hypervisor.vmm.death import VmDied, read_tails, tail_text
from hypervisor.vmm.devices import DeviceProcesses, connect_disk, open_base, open_disk, vmx_config
from hypervisor.vmm.directory import Processes, VmDirectory, boot_id, disk_error, write_atomically
from hypervisor.vmm.disk import create_data_disk, format_data_disk
from hypervisor.vmm.identity import open_kernel_vsock
from hypervisor.vmm.plan import ClonePlan, LaunchPlan
from hypervisor.vmm.qmp import Qmp
from hypervisor.vmm.snapshots.snapshot import Snapshot, link_or_copy
from hypervisor.vmm.succession import Succession, appoint, open_layers
from hypervisor.vmm.sweep import belongs
from hypervisor.vmm.tap import open_tap
from hypervisor.vmm.templates.template import Template
from hypervisor.vmm.uncut import uncut
from hypervisor.vmm.vm import RunningVm, was_killed
from hypervisor.vmm.watch import ProcessWatch, describe_status
from hypervisor.vmx.config import RamFds, VmxFds
from hypervisor.vmx.process import ProcessId
from hypervisor.vsock.address import VsockAddress

log = structlog.get_logger(__name__)

QMP_TIMEOUT_S = 15.0
READY_TIMEOUT_S = 60.0
_DYING_S = 3.0
#: descriptors are moved up here before they are given their numbers, so that none is overwritten by another's number
_FD_BASE = 256

#: guest RAM is shared memory that stays where it is: only the devices' state moves
_MOVED = ("completed", "failed")
MIGRATION = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}

Ready = Callable[[VsockAddress], Awaitable[object]]


async def start(
    plan: LaunchPlan, zygote: DeviceProcesses, *, ready: Ready | None = None, ready_timeout_s: float = READY_TIMEOUT_S,
    succession: Succession | None = None,
) -> RunningVm:  # fmt: skip
    """Start the VM that `plan` describes.

    Failed or cancelled at any point, it leaves no process, file, cgroup or socket. A vmx that is killed before a
    successor could follow it has the whole start undone and tried once more.

    :param zygote: makes the device process
    :param succession: what a vmx that dies is replaced with; None: its VM dies with it. A clone needs one, for the
        page-frame database in it
    :param ready: awaited with the VM's address before the VM counts as started, at most `ready_timeout_s` seconds
    :raises VmDied: QEMU or vmx ended meanwhile; carries their last words
    :raises VmFailed: `ready` took too long; the message ends with the console's last lines
    :raises Conflict: the directory exists
    :raises ResourceExhausted: the host lacks disk space, or a CID is taken
    :raises HostUnfit: a program or device is missing
    """
    attempt = _Attempt()
    try:
        return await _start(plan, zygote, attempt, ready, ready_timeout_s, succession)
    except HvError as e:
        if not attempt.lost_vmx:
            raise
        log.warning("start is tried once more: its vmx was killed", vm=plan.name, reason=str(e).partition("\n")[0])
    return await _start(plan, zygote, _Attempt(), ready, ready_timeout_s, succession)


class _Attempt:
    """One attempt at a start, for who asks why it failed.

    :ivar lost_vmx: vmx was killed before a successor could follow it (QEMU had not handed its RAM over, or there is no
        `Succession`): nothing that the guest did is lost, and a second attempt may fare better
    """

    def __init__(self) -> None:
        self.forked = False
        self.vmx: ProcessWatch | None = None
        self.lost_vmx = False

    def failed(self, why: HvError) -> None:
        """Before anything is undone, for that kills a vmx that lives."""
        if self.vmx is None:
            self.lost_vmx = self.forked  # gone before it could be watched
        elif not isinstance(why, VmDied) or why.death.cause == "vmx":
            self.lost_vmx = not self.vmx.alive and was_killed(self.vmx)


async def _start(
    plan: LaunchPlan, zygote: DeviceProcesses, attempt: _Attempt, ready: Ready | None, ready_timeout_s: float,
    succession: Succession | None,
) -> RunningVm:  # fmt: skip
    phases = _Phases()
    async with AsyncExitStack() as undo:
        try:
            with phases("directory"):
                await _make_directory(plan, undo)
            vm = await _start_processes(plan, zygote, phases, undo, succession, attempt)
            if plan.clone is not None:
                with phases("restore"):
                    await _restore_or_say_why(vm, plan.clone)
        except HvError as e:
            attempt.failed(e)
            raise
        vm.settle()
        if ready is not None:
            with phases("ready"):
                await _until_ready(vm, ready, ready_timeout_s)
        undo.pop_all()
        vm.timings.update(phases.seconds)
        return vm


async def adopt(directory: Path, succession: Succession | None = None) -> RunningVm | None:
    """The VM that an earlier daemon started in `directory`; None when it does not run, or only parts of it do.

    The recorded processes must have their start times, and nothing to be seen of them may say that they are others.

    :param succession: a vmx that has died meanwhile is replaced with this; None: its VM counts as not running
    :raises HvError: QEMU lives and does not answer, or vmx cannot be replaced; `hypervisor.vmm.sweep` ends it
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
        except NotFound:
            return None
        if belongs(qemu.process.pid, directory) is False:
            return None
        heir = None
        vmx = _still_there(recorded.vmx, directory, undo)
        if vmx is None:
            if succession is None:
                return None
            heir = await appoint(plan, qemu.process, succession)  # before QMP, which may wait for a page
            undo.callback(heir.close_ends)
            vmx = heir.vmx
            undo.callback(vmx.close)
        qmp = await Qmp.connect(files.qmp_socket, name=plan.name)
        undo.pop_all()
        vm = RunningVm(plan, qemu=qemu, vmx=vmx, qmp=qmp, timings={}, succession=succession, heir=heir)
        vm.settle()
        return vm


def _still_there(process: ProcessId, directory: Path, undo: AsyncExitStack) -> ProcessWatch | None:
    try:
        watch = _watched(process, undo)
    except NotFound:
        return None
    return None if belongs(process.pid, directory) is False else watch


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
    vsock: int | None
    vsock_out: int | None
    lazy: _LazyEnds | None
    console_log: int
    qemu_log: int


@dataclass(frozen=True, slots=True)
class _LazyEnds:
    """For RAM that a preloaded library hands over: to hostd (a template is being made), or to vmx (a clone)."""

    library: int
    library_out: int
    device: int
    template: int | None
    working_set: int | None
    layers: tuple[int, ...]


async def _make_directory(plan: LaunchPlan, undo: AsyncExitStack) -> None:
    def make() -> None:
        plan.files.create(uid=plan.identity.uid)
        try:
            write_atomically(plan.files.config, records.dumps(plan))
            plan.files.write_processes(Processes(boot_id()))
            if plan.clone is not None:
                Template.link(plan.clone.template, plan.files.template)
                if plan.clone.snapshot is not None:
                    Snapshot.read(plan.clone.snapshot).link(plan.files.snapshot)
                    link_or_copy(Snapshot.disk_of(plan.clone.snapshot), plan.files.disk)
        except OSError as e:
            plan.files.remove()
            raise disk_error(e, f"cannot link the template into {plan.files.path}") from e
        except BaseException:
            plan.files.remove()
            raise

    await uncut(make, plan.files.remove)
    undo.push_async_callback(asyncio.to_thread, plan.files.remove)


async def _start_processes(
    plan: LaunchPlan,
    zygote: DeviceProcesses,
    phases: _Phases,
    undo: AsyncExitStack,
    succession: Succession | None,
    attempt: _Attempt,
) -> RunningVm:
    """vmx and QEMU, supervised by a `RunningVm` whose end `undo` then owns."""
    async with AsyncExitStack() as ends_stack:  # our copies close when both processes have theirs
        ram: int | None = None
        with phases("sockets"):
            ends = _open_ends(plan, ends_stack)
        with phases("cgroup"):
            cgroups = plan.cgroup.cgroups()
            paths = cgroups.create(plan.cgroup.name, plan.cgroup.limits)
            undo.push_async_callback(cgroups.remove, paths)
        with phases("disk"):
            if plan.data_disk is not None:
                await create_data_disk(plan.files.disk, plan.data_disk)
                if plan.data_disk.base is not None:
                    link_base(plan.data_disk.base, plan.files.base)
            if any(disk.filters for disk in plan.disks):
                await asyncio.to_thread(make_states, plan)
            disks = _open_disks(plan, ends_stack)
        forking = asyncio.ensure_future(zygote.fork(vmx_config(plan), _vmx_fds(plan, ends, disks, succession)))
        undo.push_async_callback(_end_forked, forking)
        with phases("disk"):
            await asyncio.sleep(0)  # for the request to leave
            if plan.data_disk is not None and plan.data_disk.base is None:
                await format_data_disk(plan.files.disk, plan.data_disk, plan.mke2fs)
        with phases("qemu"):
            qemu_id = _spawn_qemu(plan, ends, disks)
            qemu = _watched_child(qemu_id, undo)
            plan.files.write_processes(Processes(boot_id(), qemu=qemu_id))
        with phases("vmx"):
            vmx_id = await asyncio.shield(forking)
            attempt.forked = True
            attempt.vmx = vmx = _watched(vmx_id, undo)
            plan.files.write_processes(Processes(boot_id(), vmx=vmx_id, qemu=qemu_id))
        if plan.origin == "template" and ends.lazy is not None:
            ram = await _borrow_ram(ends.lazy.library_out)
    try:
        with phases("qmp"):
            qmp = await _connect_qmp(plan, qemu, vmx)
    except BaseException:
        if ram is not None:
            os.close(ram)
        raise
    vm = RunningVm(plan, qemu=qemu, vmx=vmx, qmp=qmp, timings={}, ram=ram, succession=succession)
    undo.push_async_callback(vm.end_now)
    return vm


def _vmx_fds(plan: LaunchPlan, ends: _Ends, disks: _Disks, succession: Succession | None) -> VmxFds:
    streams = ((ends.console_out, ends.console_log), (ends.stderr_out, ends.qemu_log))
    lazy, ram = ends.lazy, None
    if lazy is not None and lazy.template is not None and succession is not None:
        ram = RamFds(
            qemu=lazy.library_out, database=succession.frames.reader_fd, template=lazy.template, device=lazy.device,
            working_set=lazy.working_set, layers=lazy.layers,
        )  # fmt: skip
    return VmxFds(frontend=ends.vsock_out, streams=streams, ram=ram, blocks=disks.vmx, bases=disks.bases)


async def _borrow_ram(library: int) -> int:
    """The memfd that is guest RAM, as the library in QEMU lends it; QEMU goes on once it is here."""
    with socket.socket(fileno=os.dup(library)) as channel:
        channel.settimeout(QMP_TIMEOUT_S)
        body, fds, _, _ = await asyncio.to_thread(socket.recv_fds, channel, 24, 1, socket.MSG_CMSG_CLOEXEC)
        if not body or not fds:
            raise VmFailed("QEMU ended before it lent its RAM; see qemu.log")
        channel.send(b"\0")
        return fds[0]


async def _restore_or_say_why(vm: RunningVm, clone: ClonePlan) -> None:
    """`_restore`; a VM that ends meanwhile is told as such, and not as the command that got no answer.

    :raises VmDied: QEMU or vmx ended; and what `_restore` raises
    """
    try:
        await _restore(vm, clone)
    except Unavailable as e:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DYING_S):
                raise VmDied(vm.name, await vm.wait_dead()) from e
        raise


async def _restore(vm: RunningVm, clone: ClonePlan) -> None:
    """Loads a template's device state into a QEMU that waits for it, gives the guest a vsock device and lets it go on.

    A guest that goes on from a snapshot is left standing still: it may run only once its snapshot counts no more.

    :raises Conflict: QEMU refuses the state; :raises VmFailed: it broke while loading
    """
    await vm.execute("migrate-set-capabilities", MIGRATION)
    held = clone.snapshot is not None
    state = Snapshot.state_of(vm.plan.files.snapshot) if held else Template.state_of(clone.template)
    fd = os.open(state, os.O_RDONLY | os.O_CLOEXEC)
    try:
        await vm.give_fd("state", fd)
    finally:
        os.close(fd)
    await vm.execute("migrate-incoming", {"uri": "fd:state"})
    await until_migrated(vm, QMP_TIMEOUT_S)
    if vm.plan.vmx.guest_cid is not None:
        await vm.plug_vsock()  # before: it is the first thing that the guest looks for (hypervisor/agent/template.py)
    if not held:
        await vm.execute("cont")


async def save_state(vm: RunningVm, fd: int, timeout_s: float) -> None:
    """Has QEMU write its device state, without RAM, to the open file `fd`, which stays the caller's.

    :raises VmFailed: as `until_migrated`
    """
    await vm.execute("migrate-set-capabilities", MIGRATION)
    await vm.give_fd("state", fd)
    await vm.execute("migrate", {"uri": "fd:state"})
    await until_migrated(vm, timeout_s)


async def until_migrated(vm: RunningVm, timeout_s: float) -> None:
    """Waits for QEMU to have saved or loaded device state.

    :raises VmFailed: it failed, or took longer
    """
    try:
        async with asyncio.timeout(timeout_s):
            # It takes some milliseconds, and the event for it may come before we listen.
            while (status := (await vm.execute("query-migrate")).get("status")) not in _MOVED:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    except TimeoutError as e:
        raise VmFailed(f"VM {vm.name}: QEMU did not move its device state within {timeout_s:g} s") from e
    if status == "failed":
        raise VmFailed(f"VM {vm.name}: QEMU could not move its device state; see qemu.log")


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
    vsock: int | None = None
    vsock_out: int | None = None
    if plan.vmx.guest_cid is not None:
        vsock, vsock_out = pair()
    elif plan.vsock == "kernel":
        vsock = keep(open_kernel_vsock(plan.identity.cid))
    return _Ends(
        qmp=keep(files.listen(files.qmp_socket).detach()), console=console, console_out=console_out, stderr=stderr,
        stderr_out=stderr_out, vsock=vsock, vsock_out=vsock_out, lazy=_open_lazy(plan, keep),
        console_log=keep(files.open_log(files.console_log)),
        qemu_log=keep(files.open_log(files.qemu_log)),
    )  # fmt: skip


def _open_lazy(plan: LaunchPlan, keep: Callable[[int], int]) -> _LazyEnds | None:
    if plan.origin == "boot":
        return None
    library, library_out = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    template = working_set = None
    layers = open_layers(plan, keep)
    if plan.clone is not None:
        template = keep(os.open(Template.ram_of(plan.files.template), os.O_RDONLY | os.O_CLOEXEC))
        if plan.clone.working_set:
            with contextlib.suppress(OSError):  # without it the clone is slower, and otherwise the same
                own = Snapshot.working_set_of(plan.files.snapshot)
                path = own if plan.clone.snapshot else Template.working_set_of(plan.clone.template)
                working_set = keep(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    return _LazyEnds(
        library=keep(library.detach()), library_out=keep(library_out.detach()),
        device=keep(os.open(USERFAULTFD, os.O_RDWR | os.O_CLOEXEC)), template=template, working_set=working_set,
        layers=layers,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Disks:
    """What QEMU gets for its disks, by the number that each is to have; and vmx (`VmxFds.blocks`, `bases`)."""

    qemu: dict[int, int]
    vmx: tuple[tuple[int, int | None], ...]
    bases: tuple[int, ...] = ()


def _open_disks(plan: LaunchPlan, stack: AsyncExitStack) -> _Disks:
    def keep(fd: int) -> int:
        stack.callback(os.close, fd)
        return fd

    files = {disk.fd: keep(open_disk(disk, disk.path)) for disk in plan.disks if disk.path is not None}
    if plan.block == "qemu":
        return _Disks(files, ())
    listeners = {disk.fd: keep(plan.files.listen(plan.files.disk_socket(disk.fd)).detach()) for disk in plan.disks}
    pairs = [(keep(connect_disk(plan, disk)), files.get(disk.fd)) for disk in plan.disks]
    bases = tuple(keep(open_base(disk)) for disk in plan.disks if disk.base is not None)
    return _Disks(listeners, tuple(pairs), bases)


def _spawn_qemu(plan: LaunchPlan, ends: _Ends, disks: _Disks) -> ProcessId:
    """QEMU in a session of its own, with the descriptors that its argv names and nothing else of ours."""
    argv = plan.spawned_argv()
    with contextlib.ExitStack() as stack:

        def keep(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        given: dict[int, int] = {2: ends.stderr, Fd.QMP: ends.qmp, Fd.CONSOLE: ends.console}
        if ends.vsock is not None:
            given[Fd.VSOCK] = ends.vsock
        if ends.lazy is not None:
            given |= {Fd.RAM: ends.lazy.library, Fd.USERFAULTFD: ends.lazy.device}
        given[0] = given[1] = keep(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
        if plan.tap is not None:
            given[Fd.NET] = keep(open_tap(plan.tap))
        given |= disks.qemu
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


def _watched(process: ProcessId, undo: AsyncExitStack) -> ProcessWatch:
    watch = ProcessWatch.open(process)
    undo.callback(watch.close)
    return watch


def _watched_child(process: ProcessId, undo: AsyncExitStack) -> ProcessWatch:
    """As `_watched`, and undone by killing it."""
    watch = _watched(process, undo)
    undo.push_async_callback(watch.kill)
    return watch


async def _end_forked(forking: asyncio.Future[ProcessId]) -> None:
    """Kills the vmx that is or will be there. A fork that was asked for cannot be called off, so its end is awaited."""
    (made,) = await asyncio.gather(forking, return_exceptions=True)
    if isinstance(made, ProcessId):
        with contextlib.suppress(NotFound), contextlib.closing(ProcessWatch.open(made)) as watch:
            await watch.kill()


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
