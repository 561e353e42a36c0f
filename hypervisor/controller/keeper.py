"""One container of a running VM: started, watched, started again, as its pod's restartPolicy has it.

Theory of operation
-------------------
::

    Waiting(ContainerCreating) --start, postStart--> Running --exit--> Terminated --policy says no--> (done)
             ^                    \\                            | policy says yes
             |                     refused: Terminated(StartError)
             +---------- Waiting(CrashLoopBackOff) <-----------+   (the first restart comes at once)

While it runs its probes look at it (`probes`); when they say so, or its postStart hook fails, it is ended in order, and
started again unless the policy is Never.

A daemon that takes over a running VM enters at whatever state the agent tells: a running instance is joined, one that
ended unseen is recorded, one whose end had been recorded waits out what is left of its back-off.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from hypervisor.controller.actions import LOOPBACK, Actions
from hypervisor.controller.backoff import BackoffPolicy
from hypervisor.controller.concurrency import first
from hypervisor.controller.feed import RETRY_S, AgentFeed, Instance
from hypervisor.controller.journal import Journal
from hypervisor.controller.probes import ContainerProbes
from hypervisor.controller.record import NS, ContainerRecord, Running, Terminated, Waiting
from hypervisor.controller.spec import Care, RestartPolicy
from hypervisor.controller.stopping import run_hook, stop_container
from hypervisor.errors import Conflict, HvError, Timeout, Unavailable, VmFailed
from hypervisor.introspect.agent import AgentClient

START_ERROR_EXIT_CODE = 128
CONFIG_RETRY_S = (1.0, 60.0)
Complete = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
HOOK_S = 24 * 3600.0
"""A postStart hook has no time-out of its own; no wait here is for ever."""


@dataclass(frozen=True, slots=True)
class Vm:
    """What keepers share: the VM's agent, and what it says."""

    agent: AgentClient
    feed: AgentFeed
    address: str = LOOPBACK


class ContainerKeeper:
    """Runs one container; `arguments` are those of ``container.start``."""

    def __init__(
        self,
        vm: Vm,
        journal: Journal,
        arguments: dict[str, Any],
        policy: RestartPolicy,
        backoff: BackoffPolicy,
        *,
        care: Care | None = None,
        grace_s: float = 30.0,
        complete: Complete | None = None,
    ) -> None:
        self._vm = vm
        self._journal = journal
        self._arguments = arguments
        self._policy = policy
        self._backoff = backoff
        self._dealt_with_ns = 0
        self._care = care or Care()
        self._grace_s = grace_s
        self._complete = complete
        self._condemned = False
        self.name: str = arguments["name"]
        self._actions = Actions(vm.agent, self.name, vm.address)

    @property
    def _record(self) -> ContainerRecord:
        return self._journal.record.container(self.name)

    async def run(self) -> Terminated:
        """Returns when the container has ended for good, with how.

        :raises VmFailed: the agent did not answer
        """
        ended = self._ended_before()
        if ended is None:
            ended = await self._run_once()
        while self._again(ended):
            await self._wait_backoff(ended)
            ended = await self._run_once()
        return ended

    def _ended_before(self) -> Terminated | None:
        """The end that this keeper need not see itself: it was recorded, and nothing has run since."""
        record, known = self._record, self._vm.feed.latest(self.name)
        if isinstance(record.state, Terminated) and (known is None or self._recorded(known)):
            return record.state
        in_backoff = isinstance(record.state, Waiting) and record.state.reason == "CrashLoopBackOff"
        return record.last if in_backoff and (known is None or self._recorded(known)) else None

    def _recorded(self, known: Instance) -> bool:
        record = self._record
        newest = max(record.ended.started_ns if record.ended else 0, record.last.started_ns if record.last else 0)
        return known.exited and known.started_ns <= max(newest, self._dealt_with_ns)

    def _again(self, ended: Terminated) -> bool:
        if self._policy == "OnFailure":
            return self._condemned or not ended.succeeded
        return self._policy == "Always"

    async def _run_once(self) -> Terminated:
        known = self._vm.feed.latest(self.name)
        if known is None or self._recorded(known):
            await self._prepare()
            try:
                started_ns = await self._start()
            except HvError as e:
                return self._end(await self._start_error(e))
        else:
            started_ns = known.started_ns
        self._condemned = False
        if self._care.post_start is None:
            self._note_running(started_ns)
        ended = await first(self._vm.feed.wait_exit(self.name, started_ns), self._look_after(started_ns))
        return self._end(terminated(ended))

    # ---- while it runs -----------------------------------------------------------------------------------------------

    async def _look_after(self, started_ns: int) -> NoReturn:
        """Its hook and probes; never returns, since its end is seen elsewhere."""
        hook = self._care.post_start
        if hook is not None and self._record.state != Running(started_ns):
            problem = await run_hook(self._actions, hook, HOOK_S)
            if problem:
                self._journal.note("Warning", "FailedPostStartHook", f"PostStartHook failed: {problem}", self.name)
                await self._condemn("failed its postStart hook", self._grace_s)
            self._note_running(started_ns)
        verdict = await ContainerProbes(self.name, self._care, self._actions, self._journal, started_ns).run()
        grace_s = self._grace_s if verdict.grace_s is None else verdict.grace_s
        await self._condemn(f"failed {verdict.kind.lower()} probe", grace_s)

    async def _condemn(self, why: str, grace_s: float) -> NoReturn:
        """It is ended in order; never returns."""
        self._condemned = True
        again = "" if self._policy == "Never" else ", will be restarted"
        self._journal.note("Normal", "Killing", f"Container {self.name} {why}{again}", self.name)
        while True:
            try:
                await stop_container(
                    self._vm.agent, self._actions, self._journal, self.name, self._care.pre_stop, grace_s
                )
                break
            except Unavailable:
                await asyncio.sleep(RETRY_S)
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    # ---- starting ----------------------------------------------------------------------------------------------------

    async def _prepare(self) -> None:
        """Completes the arguments by what other objects say now; one that is missing is waited for."""
        delay = CONFIG_RETRY_S[0]
        while self._complete is not None:
            try:
                self._arguments = await self._complete(self._arguments)
                return
            except HvError as e:
                waiting = Waiting("CreateContainerConfigError", str(e))
                self._journal.container(self.name, state=waiting, last=self._record.ended)
            await asyncio.sleep(delay)
            delay = min(delay * 2, CONFIG_RETRY_S[1])

    async def _start(self) -> int:
        """Starts it; when that was.

        A connection that breaks (the VM's device process may be replaced at any time) leaves open whether it was
        started: the agent is asked as soon as it can be reached again.
        """
        loop = asyncio.get_running_loop()
        broke_at: float | None = None
        while True:
            try:
                if broke_at is not None and (started_ns := await self._started_already()) is not None:
                    return started_ns
                result = await self._vm.agent.start(self._arguments)
                return int(result.get("started_ns") or 0)
            except Timeout:
                raise
            except Unavailable:
                broke_at = broke_at or loop.time()
                if loop.time() - broke_at > self._vm.feed.patience_s:
                    raise
            except Conflict:  # of a start that goes on in the guest
                if broke_at is None or loop.time() - broke_at > self._vm.feed.patience_s:
                    raise
            await asyncio.sleep(RETRY_S)

    async def _started_already(self) -> int | None:
        listed = [i for i in map(Instance.parse, await self._vm.agent.list()) if i.name == self.name]
        return next((i.started_ns for i in listed if not self._recorded(i)), None)

    async def _start_error(self, error: HvError) -> Terminated:
        """The agent lists the attempt as exited, with a shell's exit code for a program that is not there."""
        try:
            answer = await self._vm.agent.list()
        except Unavailable as e:
            raise VmFailed(f"the pod VM agent did not start container {self.name}: {error}") from e
        listed = [i for i in map(Instance.parse, answer) if i.name == self.name and i.exited]
        code = listed[0].exit_code if listed and listed[0].exit_code else START_ERROR_EXIT_CODE
        return Terminated(code, "StartError", str(error), finished_ns=time.time_ns())

    def _note_running(self, started_ns: int) -> None:
        record, care = self._record, self._care
        joined = record.state == Running(started_ns)
        started = care.startup is None or (joined and record.started)
        ready = (started and care.readiness is None) or (joined and record.ready)
        changes = {} if joined else self._counted(record)
        self._journal.container(self.name, state=Running(started_ns), started=started, ready=ready, **changes)

    @staticmethod
    def _counted(record: ContainerRecord) -> dict[str, Any]:
        """What a further attempt changes."""
        previous = record.ended
        return {"last": previous, "restarts": record.restarts + (1 if previous else 0)}

    def _end(self, ended: Terminated) -> Terminated:
        record = self._record
        self._dealt_with_ns = max(self._dealt_with_ns, ended.started_ns)
        ran_s = max(0, ended.finished_ns - ended.started_ns) / NS
        changes = {} if isinstance(record.state, Running) else self._counted(record)
        self._journal.container(
            self.name,
            state=ended,
            delay_s=self._backoff.next(record.delay_s, ran_s),
            exited_at=time.time(),
            **changes,
        )
        return ended

    async def _wait_backoff(self, ended: Terminated) -> None:
        record = self._record
        delay = record.delay_s or 0.0
        left = min(max(0.0, record.exited_at + delay - time.time()), delay)
        if left > 0:
            message = f"back-off {delay:g}s restarting failed container {self.name}"
            self._journal.container(self.name, state=Waiting("CrashLoopBackOff", message), last=ended)
            await asyncio.sleep(left)


def terminated(instance: Instance) -> Terminated:
    """How an instance that has ended did so, in Kubernetes' words."""
    ending = "Completed" if instance.exit_code == 0 else "Error"
    return Terminated(
        exit_code=instance.exit_code,
        reason="OOMKilled" if instance.oom_killed else ending,
        message=instance.message or instance.termination_message,
        signal=instance.signal,
        started_ns=instance.started_ns,
        finished_ns=instance.finished_ns,
    )
