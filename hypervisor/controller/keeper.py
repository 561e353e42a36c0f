"""One container of a running VM: started, watched, started again, as its pod's restartPolicy has it.

Theory of operation
-------------------
::

    Waiting(ContainerCreating) --start--> Running --exit--> Terminated --policy says no--> (done)
             ^                    \\                            | policy says yes
             |                     refused: Terminated(StartError)
             +---------- Waiting(CrashLoopBackOff) <-----------+   (the first restart comes at once)

A daemon that takes over a running VM enters at whatever state the agent tells: a running instance is joined, one that
ended unseen is recorded, one whose end had been recorded waits out what is left of its back-off.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from hypervisor.controller.backoff import BackoffPolicy
from hypervisor.controller.feed import RETRY_S, AgentFeed, Instance
from hypervisor.controller.journal import Journal
from hypervisor.controller.podstatus import NS
from hypervisor.controller.record import ContainerRecord, Running, Terminated, Waiting
from hypervisor.controller.spec import RestartPolicy
from hypervisor.errors import Conflict, HvError, Timeout, Unavailable, VmFailed
from hypervisor.introspect.agent import AgentClient

START_ERROR_EXIT_CODE = 128


@dataclass(frozen=True, slots=True)
class Vm:
    """What keepers share: the VM's agent, and what it says."""

    agent: AgentClient
    feed: AgentFeed


class ContainerKeeper:
    """Runs one container; `arguments` are those of ``container.start``."""

    def __init__(
        self, vm: Vm, journal: Journal, arguments: dict[str, Any], policy: RestartPolicy, backoff: BackoffPolicy
    ) -> None:
        self._vm = vm
        self._journal = journal
        self._arguments = arguments
        self._policy = policy
        self._backoff = backoff
        self._dealt_with_ns = 0
        self.name: str = arguments["name"]

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
        return self._policy == "Always" or (self._policy == "OnFailure" and not ended.succeeded)

    async def _run_once(self) -> Terminated:
        known = self._vm.feed.latest(self.name)
        if known is None or self._recorded(known):
            try:
                started_ns = await self._start()
            except HvError as e:
                return self._end(await self._start_error(e))
        else:
            started_ns = known.started_ns
        self._note_running(started_ns)
        return self._end(terminated(await self._vm.feed.wait_exit(self.name, started_ns)))

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
        record = self._record
        if record.state == Running(started_ns):
            return
        previous = record.ended
        self._journal.container(
            self.name,
            state=Running(started_ns),
            last=previous,
            restarts=record.restarts + (1 if previous else 0),
        )

    def _end(self, ended: Terminated) -> Terminated:
        record = self._record
        self._dealt_with_ns = max(self._dealt_with_ns, ended.started_ns)
        ran_s = max(0, ended.finished_ns - ended.started_ns) / NS
        self._journal.container(
            self.name,
            state=ended,
            delay_s=self._backoff.next(record.delay_s, ran_s),
            exited_at=time.time(),
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
        message=instance.message,
        signal=instance.signal,
        started_ns=instance.started_ns,
        finished_ns=instance.finished_ns,
    )
