"""Suspending a pod and resuming it: its VM goes into files, and comes back out of them.

Theory of operation
-------------------
``PodRecord.suspend`` says how far it is, and is on disk before the step that it names begins::

    ""  (VM runs) --request--> suspending --[1]--> suspended --request--> resuming --[2]--> ""  (VM runs)
                                   |                   ^                      |
                  cannot be saved: |                   +----- cannot be used -+
                  the guest goes on+--> ""

[1] The snapshot ``suspended/`` is made under another name and renamed when it is complete; from then on the guest must
never run again, for its disk is the snapshot's. So ``suspending`` and ``suspended/`` there: the VM is ended, whoever
finds that; ``suspending`` without it: the guest goes on.

[2] The VM is started from the files and stands still; it has a link to the same disk. Only when ``""`` is on disk may
it run, and then ``suspended/`` goes. So ``resuming`` and a VM there: it has never run, is ended, and started anew.
``""`` and ``suspended/`` there: the guest is woken if it stands still, and the files go.

A daemon that was killed at any point is followed by one whose `recover` does just that: the pod is running or
suspended, and nothing is left over.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from hypervisor.controller.journal import Journal
from hypervisor.controller.machine import Machine, Machines, VmRequest
from hypervisor.controller.paths import PodPaths
from hypervisor.controller.record import Suspend
from hypervisor.errors import Conflict, HvError, Timeout, Unavailable
from hypervisor.introspect.agent import AgentClient
from hypervisor.introspect.clock import align_clock
from hypervisor.vmm.snapshots.snapshot import Snapshot

SUSPENDED = "Suspended"
RENEW_S = 30.0
LOOK_S = 0.02


class Suspension:
    """Of one pod. `suspend` and `resume` are called by the pod's own task, `request` by anybody."""

    def __init__(self, paths: PodPaths, journal: Journal, machines: Machines, name: str) -> None:
        self._paths = paths
        self._journal = journal
        self._machines = machines
        self._log = structlog.get_logger().bind(pod=name)
        self._name = name
        self._refused: HvError | None = None
        self._waking = False  # it counts as running, and its guest is being let go on
        self.saving = asyncio.Lock()
        """Held while a snapshot is taken."""
        self.prepared = False
        """``suspended.new/`` is complete already: another snapshot takes the place of what runs."""
        self.took: Mapping[str, Any] = {}
        """Of the last suspending or resuming that was asked of this object."""

    @property
    def state(self) -> Suspend:
        return self._journal.record.suspend

    @property
    def in_files(self) -> bool:
        """There is no VM."""
        return self.state in ("suspended", "resuming")

    # ---- asked for -------------------------------------------------------------------------------------------------

    async def request(self, wanted: Suspend) -> None:
        """Has the pod suspended (``suspended``) or go on (``""``); returns when it is so.

        :raises Conflict: it is no pod that this can be done to now
        :raises HvError: it could not be done; the pod is as it was
        """
        if self.state == wanted:
            raise Conflict(f"pod {self._name} {'is suspended already' if wanted else 'is not suspended'}")
        self._refuse_other(wanted)
        self._refused = None
        await self._journal.settle(suspend="suspending" if wanted else "resuming")
        version = -1
        while (self._waking or self.state in ("suspending", "resuming")) and not self._journal.record.closed:
            version = await self._journal.topic.wait_newer(version)
        if self._refused is not None:
            raise self._refused
        if self.state != wanted or self._journal.record.terminal:
            raise Conflict(f"pod {self._name} was stopped meanwhile")

    def _refuse_other(self, wanted: Suspend) -> None:
        record = self._journal.record
        if self.state in ("suspending", "resuming"):
            raise Conflict(f"pod {self._name} is {self.state}; wait until that is done")
        if record.terminal or record.intent.kind != "run":
            raise Conflict(f"pod {self._name} has ended, or is about to")
        if wanted == "suspended" and not record.vm_up:
            raise Conflict(f"pod {self._name} is still starting; wait until it runs")

    async def wait_requested(self, wanted: Suspend) -> None:
        """Returns when `state` is `wanted`."""
        version = -1
        while self.state != wanted:
            version = await self._journal.topic.wait_newer(version)

    # ---- done --------------------------------------------------------------------------------------------------------

    async def suspend(self, machine: Machine) -> bool:
        """[1]; whether the VM is in files now, and has ended: `settle` follows. Else its guest goes on, and whoever
        asked hears why.
        """
        began = time.monotonic()
        try:
            await self._machine_saved(machine)
        except HvError as e:
            self._log.warning("pod cannot be suspended", error=str(e))
            await self._refuse(e, "")
            return False
        await machine.remove()
        self.took = dict(self.took) | {"seconds": round(time.monotonic() - began, 3)}
        self._log.info("pod is suspended", **self.took)
        return True

    async def _machine_saved(self, machine: Machine) -> None:
        new = self._paths.suspended.with_suffix(".new")
        async with self.saving:
            if not self.prepared:
                await asyncio.to_thread(remove_folder, new)
                self.took = await machine.save(new, self._name)
            self.prepared = False
            await asyncio.to_thread(new.rename, self._paths.suspended)

    async def settle(self) -> None:
        """It has no VM any more, and counts as suspended from now on."""
        record = self._journal.record
        for container in (*record.init_containers, *record.containers):
            self._journal.container(container.name, ready=False)
        await self._journal.settle(suspend="suspended", vm_up=False, reason=SUSPENDED, message="")

    async def resume(self, request: VmRequest) -> Machine | None:
        """[2]; a VM that stands still and is no longer in files; `go_on` lets it run. None: it stays suspended, and
        whoever asked hears why.
        """
        try:
            machine = await self._machines.resume(request, self._paths.suspended)
        except HvError as e:
            self._log.warning("pod cannot be resumed", error=str(e))
            await self._refuse(e, "suspended")
            return None
        self._waking = True
        await self._journal.settle(suspend="", vm_up=True, vm_up_at=time.time(), reason="", message="")
        return machine

    async def refuse_resume(self, error: HvError) -> None:
        """It stays suspended."""
        await self._refuse(error, "suspended")

    async def _refuse(self, error: HvError, state: Suspend) -> None:
        self._refused = error
        await self._journal.settle(suspend=state, message=str(error) if state else "")

    async def go_on(
        self, machine: Machine, agent: AgentClient, identity: dict[str, Any], connect: Callable[[], Awaitable[None]]
    ) -> None:
        """Lets a resumed guest run, gives it what it must share with nobody, and removes the files.

        :param identity: arguments of the agent's ``setup``, as of now
        :param connect: puts the VM on its network
        :raises HvError: the guest does not run or its agent does not answer
        """
        try:
            await connect()
            await machine.wake()
            await asyncio.to_thread(remove_folder, self._paths.suspended)
            await self._renew_in_time(agent, identity)
        except HvError as e:
            self._refused = e
            raise
        finally:
            self._waking = False
            self._journal.topic.publish()

    @staticmethod
    async def _renew_in_time(agent: AgentClient, identity: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(RENEW_S):
                while not await _renew(agent, identity):  # noqa: ASYNC110 -- no event tells of it
                    await asyncio.sleep(LOOK_S)
        except TimeoutError as e:
            raise Timeout(f"the pod VM agent did not answer within {RENEW_S:g} s after it went on") from e

    # ---- after a daemon that was killed ------------------------------------------------------------------------------

    async def recover(self, machine: Machine | None) -> Machine | None:
        """What is to go on of the VM that was found; one that is not has been ended."""
        complete = Snapshot.exists(self._paths.suspended)
        await asyncio.to_thread(remove_folder, self._paths.suspended.with_suffix(".new"))
        if self.in_files or (self.state == "suspending" and complete):
            if machine is not None:
                await machine.remove()
            if self.state == "suspending":
                await self.settle()
            return None
        if self.state == "suspending":
            await self._journal.settle(suspend="")
        if machine is not None and not self._journal.record.terminal:
            await self._wake(machine)
        await asyncio.to_thread(remove_folder, self._paths.suspended)
        return machine

    async def _wake(self, machine: Machine) -> None:
        try:
            if await machine.wake():
                self._log.info("guest that stood still goes on")
        except HvError as e:  # a VM that does not answer is noticed by whoever uses it
            self._log.warning("guest cannot be woken", error=str(e))

    async def discard(self) -> None:
        """The pod has ended: the files go."""
        await asyncio.to_thread(remove_folder, self._paths.suspended)
        if self.state:
            self._journal.update(suspend="")


async def _renew(agent: AgentClient, identity: dict[str, Any]) -> bool:
    """False: the guest has not found its vsock device yet."""
    try:
        async with agent.open() as stream:
            await align_clock(stream, await stream.request("renew", identity))
    except Unavailable:
        return False
    return True


def remove_folder(folder: Path) -> None:
    """The manifest first: what is left of a removal that is cut short is no snapshot."""
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
