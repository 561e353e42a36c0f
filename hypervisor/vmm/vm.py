"""A VM that runs: its control, and the watch over its end.

Theory of operation
-------------------
A VM is two processes, QEMU and vmx, and is there while both are. States::

    LIVE ----- QEMU ends (by itself, by stop(), by a signal) ------------------+
     |  ^                                                                      v
     |  +----- vmx was killed: a successor takes over (`succession`)           |
     |                                                                         |
     +-------- vmx ends otherwise, or has no successor; QEMU is killed -----> ENDING -> DEAD
      |
      +------- detach(): this object lets go; the VM lives on, `adopt` finds it again

`_watch`, one task per object, is the only one that moves LIVE to DEAD. In ENDING it waits for vmx to have drained the
console (vmx ends by itself when QEMU is gone), removes the cgroup with whatever is still in it, and then sets the
death that `wait_dead` returns. So when `wait_dead` has returned, no process of the VM is left; only its directory is,
until `remove`.

When vmx's end is seen while QEMU still lives, QEMU may be dying itself: its descriptors close some time before its
pidfd fires, and vmx ends on that. QEMU gets `_QEMU_GRACE_S` to prove it, unless vmx was killed by a signal.

A successor serves guest RAM before `pids` names it; giving QEMU its new ends of console and vsock takes longer, for the
guest has a part in it, and goes on beside the watch (`_reconnect`). It waits for `settle`, that the start is through.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import structlog

from hypervisor.errors import Conflict, HvError, Unavailable
from hypervisor.vmm.argv import VSOCK_DEVICE
from hypervisor.vmm.death import VmDeath, explain, read_tails, read_vmx_tail
from hypervisor.vmm.devices import vmx_stats, vmx_working_set
from hypervisor.vmm.plan import LaunchPlan
from hypervisor.vmm.qmp import Qmp, QmpEvent
from hypervisor.vmm.succession import Budget, Heir, Succession, appoint, reconnect
from hypervisor.vmm.trim import trim_when_idle
from hypervisor.vmm.watch import ProcessWatch, describe_status
from hypervisor.vmx.console import read_tail
from hypervisor.vsock.address import VsockAddress

log = structlog.get_logger(__name__)

_QEMU_GRACE_S = 0.5
_VMX_DRAIN_S = 3.0
_RESET_S = 5.0
_QUIET_S = 1.0
_STATUS_S = 1.0
#: successors that die before they serve, one after the other, before a VM is given up; the pause grows with each
_ATTEMPTS = 5
_ATTEMPT_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class StopTimeouts:
    """Seconds that each step of `RunningVm.stop` gets before the next is tried."""

    agent_s: float = 15.0
    acpi_s: float = 3.0
    quit_s: float = 5.0


@dataclass(frozen=True, slots=True)
class StopReport:
    """
    :param step: what ended the VM: ``agent``, ``acpi``, ``quit``, ``kill``, or ``dead`` when it had ended before
    :param failed: steps that were tried in vain, with why
    """

    step: str
    seconds: float
    failed: tuple[tuple[str, str], ...]
    death: VmDeath


@dataclass(frozen=True, slots=True)
class VmStats:
    """Host's view of a VM. None where the host does not count it; `vmx` are vmx's own counters, empty if it is
    silent; they begin anew with each of the `vmx_replaced` successors that it had. `trims`: see `trim_when_idle`."""

    cpu_ns: int | None
    memory_bytes: int | None
    memory_peak: int | None
    pids: int | None
    vmx: Mapping[str, Any] = field(default_factory=dict)
    vmx_replaced: int = 0
    trims: int = 0


class RunningVm:
    """Made by `hypervisor.vmm.launch.start` and `adopt`; belongs to one event loop.

    End it with `stop`, or let go of it with `detach`.

    :ivar plan: how it was started
    :ivar timings: seconds of each phase of the start; empty when adopted
    """

    def __init__(
        self, plan: LaunchPlan, *, qemu: ProcessWatch, vmx: ProcessWatch, qmp: Qmp, timings: Mapping[str, float],
        ram: int | None = None, succession: Succession | None = None, heir: Heir | None = None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self._succession = succession
        self._budget = None if succession is None else Budget(succession.limit, succession.seconds)
        self._not_replaced = ""
        self._settled = asyncio.Event()
        self._reconnecting: asyncio.Task[None] | None = None
        #: how often vmx was replaced, as far as this object knows
        self.replacements = 0
        #: how often it gave back translated code, as far as this object knows
        self.trims = 0
        self._trimming: asyncio.Task[None] | None = None
        self._ram = ram
        self.timings = dict(timings)
        self._qemu = qemu
        self._vmx = vmx
        self._qmp = qmp
        self._stopping = False
        self._watcher = asyncio.create_task(self._watch(), name=f"watch VM {plan.name}")
        if heir is not None:
            self._succeeded(heir, "it had died before")

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """For people."""
        return self.plan.name

    @property
    def address(self) -> VsockAddress:
        """Where its guest's virtual sockets are reached."""
        return self.plan.address

    @property
    def pids(self) -> Mapping[str, int]:
        """Process ids of ``qemu`` and ``vmx``."""
        return {"qemu": self._qemu.process.pid, "vmx": self._vmx.process.pid}

    @property
    def borrowed_ram(self) -> int:
        """The memfd that is guest RAM, of a VM that is to become a template. Closed with the VM.

        :raises Conflict: another kind of VM
        """
        if self._ram is None:
            raise Conflict(f"VM {self.name} is not being made a template")
        return self._ram

    async def give_fd(self, name: str, fd: int, *, fdset: int | None = None) -> None:
        """Hands QEMU a duplicate of `fd`, for QMP commands; see `Qmp.give_fd`. Raises as `execute`."""
        await (await self._connected()).give_fd(name, fd, fdset=fdset)

    @property
    def dead(self) -> bool:
        """Whether `wait_dead` would return at once."""
        return self._watcher.done()

    async def wait_dead(self) -> VmDeath:
        """Until the VM has ended and none of its processes is left; how it ended. Several may wait."""
        return await asyncio.shield(self._watcher)

    async def status(self) -> str:
        """QEMU's RunState (``running``, ``paused``, ``io-error``: the host's disk is full, ...), or ``dead``."""
        if self.dead:
            return "dead"
        return await (await self._connected()).status()

    def events(self) -> AsyncIterator[QmpEvent]:
        """QEMU's events from now on; ends with the VM."""
        return self._qmp.events()

    def console_tail(self, max_bytes: int = 64 * 1024) -> bytes:
        """The last of the guest's console. Blocks on disk only."""
        return read_tail(self.plan.files.console_log, max_bytes)

    async def stats(self) -> VmStats:
        """Figures now.

        :raises NotFound: the VM has ended
        """
        cgroup = self.plan.cgroup
        paths = cgroup.cgroups().paths(cgroup.name)
        used = await asyncio.to_thread(cgroup.cgroups().stats, paths)
        vmx = await vmx_stats(self.plan.files.vmx_socket)
        return VmStats(used.cpu_ns, used.memory_bytes, used.memory_peak, used.pids, vmx, self.replacements, self.trims)

    async def writes_wait(self) -> bool:
        """Whether writes to its disks wait because the host's disk is full. Only where vmx serves them; QEMU stops the
        VM instead (`status`).
        """
        disks = (await vmx_stats(self.plan.files.vmx_socket)).get("disks") or {}
        return any(disk.get("waiting", 0) > 0 for disk in disks.values())

    async def working_set(self) -> list[int]:
        """Of a clone: pages of its RAM in the order of their first touch, as its vmx tells them.

        :raises HvError: vmx does not answer, or is a successor, which knows only the later part
        """
        if self.replacements:
            raise Conflict(f"the vmx of VM {self.name} was replaced")
        return await vmx_working_set(self.plan.files.vmx_socket)

    # ---- control ---------------------------------------------------------------------------------------------------

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run a QMP command; raises like `Qmp.execute`."""
        return await (await self._connected()).execute(command, arguments)

    async def pause(self) -> None:
        """Stop its CPUs; harmless when they are stopped."""
        await self.execute("stop")

    async def resume(self) -> None:
        """Let its CPUs go on, also after ``io-error``."""
        await self.execute("cont")

    async def reset(self) -> None:
        """Restart the guest from its kernel, as by the reset button: nothing is synced, the data disk stays.

        :raises Conflict: QEMU refused
        """
        qmp = await self._connected()
        resets: asyncio.Queue[QmpEvent] = asyncio.Queue()
        listening = asyncio.create_task(_collect_resets(qmp, resets))
        await asyncio.sleep(0)  # it listens
        try:
            # -no-reboot would end QEMU; its meaning is lifted until the guest runs.
            await qmp.execute("set-action", {"reboot": "reset"})
            await qmp.execute("system_reset")
            async with asyncio.timeout(_RESET_S):
                await resets.get()
            # SeaBIOS finds its own traces in RAM and resets once or twice more within some 30 ms, as if by the guest.
            while await _next_within(resets, _QUIET_S):
                pass
        except TimeoutError as e:
            raise Unavailable(f"VM {self.name} did not reset within {_RESET_S:g} s") from e
        finally:
            listening.cancel()
            if qmp.connected:
                await qmp.execute("set-action", {"reboot": "shutdown"})

    async def stop(
        self, agent_shutdown: Callable[[], Awaitable[object]] | None = None, timeouts: StopTimeouts | None = None
    ) -> StopReport:
        """End the VM, as gently as it lets us: agent, ACPI power button, QMP ``quit``, SIGKILL.

        When this returns no process of it is left. Cancelled, it leaves the VM as it is then; call it again.

        :param agent_shutdown: asks the agent to shut the guest down; None: that step is left out
        """
        limits = timeouts or StopTimeouts()
        started = asyncio.get_running_loop().time()
        failed: list[tuple[str, str]] = []
        ladder: list[tuple[str, Callable[[], Awaitable[object]], float]] = [
            ("acpi", lambda: self.execute("system_powerdown"), limits.acpi_s),
            ("quit", lambda: self.execute("quit"), limits.quit_s),
            ("kill", self._kill, _VMX_DRAIN_S + 15.0),
        ]
        if agent_shutdown is not None:
            ladder.insert(0, ("agent", agent_shutdown, limits.agent_s))
        step = "dead" if self.dead else await self._descend(ladder, failed)
        death = await self.wait_dead()
        return StopReport(step, asyncio.get_running_loop().time() - started, tuple(failed), death)

    async def end_now(self) -> VmDeath:
        """Kill it; when this returns no process of it is left."""
        self._stopping = True
        self._qemu.signal(signal.SIGKILL)
        return await self.wait_dead()

    async def remove(self) -> None:
        """Delete the VM's directory.

        :raises Conflict: the VM has not ended
        """
        if not self.dead:
            raise Conflict(f"VM {self.name} still runs; stop it first")
        await asyncio.to_thread(self.plan.files.remove)

    async def detach(self) -> None:
        """Let go of the VM without touching it; `adopt` finds it again. Nothing else may be called afterwards."""
        self._watcher.cancel()
        await asyncio.wait([self._watcher])
        await self._release()

    def trim_when_idle(self) -> None:
        """From now on a clone under TCG gives back translated code when it idles (`hypervisor.vmm.trim`); others do
        nothing. Ends with the VM, or when it is let go of.
        """
        if self._trimming is None and self.plan.clone is not None and self.plan.accelerator == "tcg":
            work = trim_when_idle(self._qemu.process, self.name, self._note_trim)
            self._trimming = asyncio.create_task(work, name=f"trim VM {self.name}")

    def _note_trim(self) -> None:
        self.trims += 1

    # ---- vmx and its successors ------------------------------------------------------------------------------------

    def settle(self) -> None:
        """The start is through: from now on a successor may unplug and plug in devices."""
        self._settled.set()

    async def plug_vsock(self) -> None:
        """Plugs a clone's vsock device in, or leaves that to the successor of a vmx that dies over it.

        Raises as `execute`.
        """
        vmx = self._vmx
        try:
            await self.execute("device_add", VSOCK_DEVICE)
        except Conflict:
            with suppress(TimeoutError):
                async with asyncio.timeout(_STATUS_S):
                    await vmx.wait()
            if vmx.alive or self._succession is None:
                raise

    async def _replaced(self) -> bool:
        """Whether a dead vmx has a successor now; `_not_replaced` says why not."""
        why = describe_status(self._vmx.status())
        if self._succession is None or self._budget is None or self._stopping or not was_killed(self._vmx):
            return False
        await self._end_reconnecting()
        for attempt in range(_ATTEMPTS):
            if not self._budget.spend(asyncio.get_running_loop().time()):
                limits = self._succession
                self._not_replaced = f"it was replaced {limits.limit} times within {limits.seconds:g} s"
                return False
            try:
                heir = await appoint(self.plan, self._qemu.process, self._succession)
            except HvError as e:
                self._not_replaced = f"it could not be replaced: {e}"
                if not self._qemu.alive:
                    return False
                await asyncio.sleep(_ATTEMPT_S * attempt)
            else:
                self._vmx.close()
                self._vmx = heir.vmx
                self._succeeded(heir, why)
                return True
        return False

    def _succeeded(self, heir: Heir, why: str) -> None:
        self.replacements += 1
        log.warning(
            "device process replaced", vm=self.name, reason=why, vmx=heir.vmx.process.pid, times=self.replacements
        )
        self._reconnecting = asyncio.create_task(self._reconnect(heir), name=f"reconnect VM {self.name}")
        self._reconnecting.add_done_callback(lambda _: heir.close_ends())

    async def _reconnect(self, heir: Heir) -> None:
        began = asyncio.get_running_loop().time()
        try:
            await self._settled.wait()
            await reconnect(self, heir)
            seconds = asyncio.get_running_loop().time() - began
            log.info("device process reconnected", vm=self.name, seconds=round(seconds, 3))
        except HvError as e:
            # A death of the successor brings another try; else the agent is missed, and the pod fails by that.
            log.warning("device process not reconnected", vm=self.name, reason=str(e))

    async def _end_reconnecting(self) -> None:
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.wait([self._reconnecting])
            self._reconnecting = None

    # ---- inside ----------------------------------------------------------------------------------------------------

    async def _descend(
        self, ladder: list[tuple[str, Callable[[], Awaitable[object]], float]], failed: list[tuple[str, str]]
    ) -> str:
        with suppress(HvError, TimeoutError):
            async with asyncio.timeout(_STATUS_S):
                status = await self.status()
            if status in ("paused", "io-error"):
                ladder = [rung for rung in ladder if rung[0] in ("quit", "kill")]  # no guest runs that could answer
        for step, act, seconds in ladder:
            self._stopping = True
            why = await self._try_step(act, seconds)
            if self.dead:
                return step
            failed.append((step, why))
        return "kill"

    async def _try_step(self, act: Callable[[], Awaitable[object]], seconds: float) -> str:
        """Do `act` and wait for the end that it should bring; why it did not, if it did not."""
        acting = asyncio.ensure_future(act())
        try:
            async with asyncio.timeout(seconds):
                await asyncio.wait([acting, self._watcher], return_when=asyncio.FIRST_COMPLETED)
                if acting.done() and not isinstance(acting.exception(), Unavailable):
                    acting.result()
                await self.wait_dead()
        except TimeoutError:
            return f"the VM had not ended after {seconds:g} s"
        except HvError as e:
            return str(e)
        except (OSError, EOFError) as e:  # the caller's connection to the agent
            return str(e) or type(e).__name__
        finally:
            acting.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await acting
        return ""

    async def _kill(self) -> None:
        await self._qemu.kill()

    async def _connected(self) -> Qmp:
        """The QMP connection, made anew if it was lost while QEMU lives."""
        if self.dead:
            raise Unavailable(f"VM {self.name} has ended")
        if not self._qmp.connected and self._qemu.alive:
            await self._qmp.close()
            self._qmp = await Qmp.connect(self.plan.files.qmp_socket, name=self.name)
        return self._qmp

    async def _watch(self) -> VmDeath:
        try:
            vmx_first = await self._until_lost()
        finally:
            await self._end_reconnecting()
        await self._end_processes()
        tails = await asyncio.to_thread(read_tails, self.plan.files)
        vmx_log = await asyncio.to_thread(read_vmx_tail, self.plan.files) if vmx_first else ""
        cause, reason = explain(
            wanted=self._stopping, vmx_died_first=vmx_first, vmx_status=self._vmx.status(),
            qemu_status=self._qemu.status(), events=self._qmp.recent, qemu_log=tails[0],
            vmx_log=vmx_log, not_replaced=self._not_replaced,
        )  # fmt: skip
        await self._release()
        return VmDeath(cause, reason, *tails)

    async def _until_lost(self) -> bool:
        """Until QEMU has ended, or vmx for good; whether it was vmx."""
        while True:
            ends = [asyncio.ensure_future(w.wait()) for w in (self._qemu, self._vmx)]
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in ends:
                    task.cancel()
            if not await self._vmx_died_first():
                return False
            if not await self._replaced():
                return self._qemu.alive

    async def _vmx_died_first(self) -> bool:
        if not self._qemu.alive:
            return False
        status = self._vmx.status()
        if status is not None and os.WIFSIGNALED(status):
            return True
        with suppress(TimeoutError):
            async with asyncio.timeout(_QEMU_GRACE_S):
                await self._qemu.wait()
        return self._qemu.alive

    async def _end_processes(self) -> None:
        await self._qemu.kill()
        with suppress(TimeoutError):
            async with asyncio.timeout(_VMX_DRAIN_S):
                await self._vmx.wait()
        await self._vmx.kill()
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._qmp.wait_closed()  # its last event says why QEMU ended
        cgroup = self.plan.cgroup
        with suppress(HvError):  # empty by now; what cannot be removed is swept at hostd's next start
            await cgroup.cgroups().remove(cgroup.cgroups().paths(cgroup.name))

    async def _release(self) -> None:
        if self._trimming is not None:
            self._trimming.cancel()
            await asyncio.wait([self._trimming])
        await self._qmp.close()
        self._qemu.close()
        self._vmx.close()
        if self._ram is not None:
            os.close(self._ram)
            self._ram = None


def was_killed(vmx: ProcessWatch) -> bool:
    """As against having ended by itself, for a reason that its successor would have too. Unknown counts as killed."""
    status = vmx.status()
    return status is None or os.WIFSIGNALED(status)


async def _next_within(resets: asyncio.Queue[QmpEvent], seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await resets.get()
    except TimeoutError:
        return False
    return True


async def _collect_resets(qmp: Qmp, resets: asyncio.Queue[QmpEvent]) -> None:
    async for event in qmp.events():
        if event.name == "RESET":
            resets.put_nowait(event)
