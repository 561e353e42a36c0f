"""One VM of one pod: from the agent's first answer to the end of the last container.

Theory of operation
-------------------
::

    boot: agent answers --> setup --> (record: vm_up) --> containers: init ones in turn, then all others
                                                              |
          every main one has ended for good: sidecars end <---+--> a stop was asked for: preStop, SIGTERM, SIGKILL

A stop ends the main containers together, then the sidecars, the last first. Its grace period may be shortened while it
goes on: when it is over by what is wanted *now*, whatever still runs is killed.

All of it races against the VM's death: whatever waits for the agent is given up as soon as QEMU or vmx has ended, and
the reason is the VM's, not "the connection broke".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from hypervisor.controller.actions import LOOPBACK, Actions
from hypervisor.controller.concurrency import first, together
from hypervisor.controller.feed import AgentFeed, Instance
from hypervisor.controller.journal import Journal
from hypervisor.controller.keeper import Complete, ContainerKeeper, Vm, terminated
from hypervisor.controller.machine import Machine
from hypervisor.controller.record import Terminated
from hypervisor.controller.runtime_spec import setup_arguments
from hypervisor.controller.services import Services
from hypervisor.controller.sidecars import Sidecars
from hypervisor.controller.spec import ContainerSpec, PodSpec
from hypervisor.controller.stopping import EXTENSION_S, stop_container
from hypervisor.errors import Conflict, HvError, Timeout, Unavailable, VmFailed
from hypervisor.introspect.agent import AgentClient, AgentStream
from hypervisor.introspect.clock import align_clock

BOOT_POLL_S = 0.05
DISK_FULL = "HostDiskFull"
DEATH_NOTICE_S = 2.0
"""After the agent's connection broke: how long to wait for the news that the VM has died, which tells more."""


Stop = Callable[[], Coroutine[Any, Any, float]]
Arguments = Mapping[str, dict[str, Any]]
"""What ``container.start`` is to be given, by container."""
Completion = Callable[[ContainerSpec, dict[str, Any]], Awaitable[dict[str, Any]]]
"""Completes one container's arguments by what other objects say at its start."""


class VmSession:
    """Drives the containers of one running VM."""

    def __init__(
        self,
        services: Services,
        pod: PodSpec,
        journal: Journal,
        machine: Machine,
        arguments: Arguments,
        complete: Completion | None = None,
    ) -> None:
        self._services = services
        self._pod = pod
        self._journal = journal
        self._machine = machine
        self._arguments = arguments
        self._complete = complete
        self._fresh = False  # set up by this session
        self.agent: AgentClient = services.connect(machine.address)
        address = next(iter(pod.network.addresses), LOOPBACK)
        self._vm = Vm(self.agent, AgentFeed(self.agent, patience_s=services.times.agent_s), address)

    @property
    def machine(self) -> Machine:
        """The VM."""
        return self._machine

    async def boot(self) -> None:
        """Waits for the agent and sets the guest up.

        :raises VmFailed: the VM died, or its agent never answered; with the last of the console
        """
        await self._while_alive(self._boot())
        self._fresh = True

    async def run(self, stop: Stop) -> None:
        """Runs the containers until all have ended for good, or `stop` returns and has been obeyed.

        :param stop: waits until a stop is asked for, and gives its grace period in seconds
        :raises VmFailed: the VM died or its agent does not answer
        """
        await self._while_alive(self._run(stop))

    async def _while_alive(self, work: Coroutine[Any, Any, None]) -> None:
        death = asyncio.create_task(self._raise_death())
        try:
            await first(self._shielded(death), work)
        except (Unavailable, VmFailed) as e:
            with suppress(TimeoutError):
                await asyncio.wait_for(death, DEATH_NOTICE_S)
            raise e if isinstance(e, VmFailed) else VmFailed(str(e)) from e
        finally:
            death.cancel()
            await asyncio.gather(death, return_exceptions=True)

    @staticmethod
    async def _shielded(task: asyncio.Task[NoReturn]) -> None:
        await asyncio.wait({task})
        task.result()

    async def _raise_death(self) -> NoReturn:
        raise VmFailed(await self._machine.wait_dead())

    async def _boot(self) -> None:
        began = time.monotonic()
        reached = await self._set_up(began + self._services.times.boot_s)
        timing = {"boot": reached - began, "setup": time.monotonic() - reached}
        record = self._journal.record
        self._journal.update(vm_up=True, vm_up_at=time.time(), timing=rounded({**record.timing, **timing}))

    async def _set_up(self, deadline: float) -> float:
        """Sets the guest up as soon as its agent can be reached; when that was.

        ``setup`` is the first call: asking before whether somebody answers would cost 40 ms under TCG.
        """
        reached: float | None = None
        while True:
            try:
                async with self.agent.open() as stream:
                    reached, again = time.monotonic(), reached is not None
                    await self._call_setup(stream, max(1.0, deadline - reached), again=again)
                    return reached
            except Unavailable as e:
                if time.monotonic() > deadline:
                    seconds = self._services.times.boot_s
                    raise VmFailed(
                        f"the guest did not reach its agent within {seconds:g} s{console_excerpt(self._machine)}"
                    ) from e
            await asyncio.sleep(BOOT_POLL_S)

    async def _call_setup(self, stream: AgentStream, timeout_s: float, *, again: bool) -> None:
        """:param again: an earlier connection broke, perhaps after the guest had been set up"""
        try:
            async with asyncio.timeout(timeout_s):
                answer = await stream.request("setup", setup_arguments(self._pod))
                await align_clock(stream, answer)
        except TimeoutError as e:
            raise Timeout(f"the pod VM agent did not answer setup within {timeout_s:g} s") from e
        except Conflict:
            if not again:
                raise

    async def _run(self, stop: Stop) -> None:
        await first(self._vm.feed.run(), self._run_fed(stop), self._show_full_disk())

    async def _show_full_disk(self) -> None:
        async for full in self._machine.disk_full():
            if full:
                message = "the host's disk is full: the VM stands still until there is room"
                self._journal.update(reason=DISK_FULL, message=message)
            elif self._journal.record.reason == DISK_FULL:
                self._journal.update(reason="", message="")
        await asyncio.Event().wait()

    async def _run_fed(self, stop: Stop) -> None:
        if not self._fresh:  # what was set up here has no containers yet: they start while the stream of events opens
            await self._vm.feed.wait_ready()
        intent = self._journal.record.intent
        if intent.kind != "run":  # a daemon before this one was stopping it
            await self._stop(max(0.0, intent.at + intent.grace_s - time.time()))
            return
        grace_s = await first(self._containers(), stop())
        if grace_s is not None:
            await self._vm.feed.wait_ready()
            await self._stop(grace_s)

    async def _containers(self) -> None:
        sidecars = Sidecars(self._journal, self._keep)
        try:
            await first(self._in_order(sidecars), sidecars.raise_failure())
        finally:
            await sidecars.close()

    async def _in_order(self, sidecars: Sidecars) -> None:
        if await self._initialize(sidecars):
            began = time.monotonic()
            await first(together(*(self._keep(c) for c in self._pod.containers)), self._note_started(began))
        deadline = time.monotonic() + self._pod.grace_s
        await sidecars.end(lambda name: self._stop_one(name, max(0.0, deadline - time.monotonic())))

    async def _initialize(self, sidecars: Sidecars) -> bool:
        """Runs the init containers, in order; whether the main ones may run."""
        if self._main_containers_began():
            for container in self._pod.sidecars:
                sidecars.start(container)
            return True
        for container in self._pod.init_containers:
            if container.sidecar:
                sidecars.start(container)
                await sidecars.wait_started(container)
            elif not (await self._keep(container, init=True)).succeeded:
                return False
        return True

    def _main_containers_began(self) -> bool:
        return any(self._vm.feed.latest(c.name) for c in self._pod.containers)

    async def _keep(self, container: ContainerSpec, *, init: bool = False) -> Terminated:
        policy = self._pod.restart_policy
        if container.sidecar:
            policy = "Always"
        elif init and policy == "Always":
            policy = "OnFailure"  # an init container that has succeeded is done
        arguments = self._arguments[container.name]
        keeper = ContainerKeeper(
            self._vm,
            self._journal,
            arguments,
            policy,
            self._services.times.backoff,
            care=container.care,
            grace_s=self._pod.grace_s,
            complete=self._completion(container),
        )
        return await keeper.run()

    def _completion(self, container: ContainerSpec) -> Complete | None:
        complete = self._complete
        if complete is None:
            return None
        return lambda given: complete(container, given)

    async def _note_started(self, began: float) -> NoReturn:
        version = 0
        while not self._journal.record.started_at:
            version = await self._journal.topic.wait_newer(version)
        timing = {**self._journal.record.timing, "containers": time.monotonic() - began}
        self._journal.update(timing=rounded(timing))
        self._machine.note_started()
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def _stop(self, grace_s: float) -> None:
        await first(self._stop_in_order(grace_s), self._kill_late())

    async def _stop_in_order(self, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        sidecars = [c.name for c in self._pod.sidecars]
        names = [c.name for c in (*self._pod.init_containers, *self._pod.containers) if c.name not in sidecars]
        await together(*(self._stop_one(name, grace_s) for name in names))
        for name in reversed(sidecars):
            await self._stop_one(name, max(0.0, deadline - time.monotonic()))

    async def _kill_late(self) -> NoReturn:
        """Kills what still runs when the grace period that is wanted now, and what hooks may add to it, is over."""
        version = 0
        while True:
            intent = self._journal.record.intent
            left = intent.at + intent.grace_s + EXTENSION_S - time.time()
            if left <= 0:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    version = await self._journal.topic.wait_newer(version)
        for container in (*self._pod.init_containers, *self._pod.containers):
            known = self._vm.feed.latest(container.name)
            if known is not None and not known.exited:
                with suppress(HvError):  # it has ended, or the feed will tell that the agent has gone
                    await self.agent.call("container.signal", {"name": container.name, "signal": 9, "all": True})
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def _stop_one(self, name: str, grace_s: float) -> None:
        known = self._vm.feed.latest(name)
        if known is not None and not known.exited:
            actions = Actions(self.agent, name, self._vm.address)
            hook = self._pod.container(name).care.pre_stop
            await stop_container(self.agent, actions, self._journal, name, hook, grace_s)
            known = await self._vm.feed.wait_exit(name, known.started_ns)
        self._record_stopped(name, known)

    def _record_stopped(self, name: str, known: Instance | None) -> None:
        record = self._journal.record.container(name)
        if isinstance(record.state, Terminated):
            return
        ended = terminated(known) if known is not None else record.last
        if ended is not None:
            self._journal.container(name, state=ended, exited_at=time.time())


def rounded(timing: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds are enough."""
    return {phase: round(seconds, 3) for phase, seconds in timing.items()}


def console_excerpt(machine: Machine, limit: int = 600) -> str:
    """The last lines of the guest's console, for an error's message; empty when there are none."""
    lines = machine.console_tail(limit).decode("utf-8", "replace").split("\n")
    text = " | ".join(line.strip() for line in lines if line.strip())
    return f"; last of the console: {text}" if text else "; its console is empty"
