"""The pod VM controller: the life of one pod, from its acceptance to its removal.

Source: US 11579916: pod VM controllers execute outside the VMs and are the control plane's agents on a host.

Theory of operation
-------------------
One task a pod (`run`) walks through these, in order; `PodRecord` says after a crash where to go on::

    images  --> memory --> VM start --> boot, setup --> containers --> (ended) --> archive logs --> VM off --> (closed)
       ^                                                    |                                                    |
       +------ back-off <------ VM lost (QEMU, vmx or agent died, or never came up) and                        delete
                                restartPolicy is not Never; else the pod has Failed                              |
                                                                                                               (gone)

*Intent* (run, stop, delete) is all that the outside changes. It only grows, is on disk before the caller hears of it,
and interrupts whatever waits: pulls and back-offs end at once, containers get SIGTERM and their grace period, and a
delete with no grace period ends the VM without asking.

A daemon that finds a pod of an earlier one: ``closed``: nothing to do. VM alive and ``vm_up``: goes on with it; the
agent knows which containers run. VM alive without ``vm_up``: killed amid a start, whose progress nobody knows: the VM
is ended and the pod started anew. VM dead: lost while nobody watched, the same as if it had been seen.

Restarting a *VM* follows the kubelet, which makes a new sandbox for a pod whose sandbox died: every container that the
policy restarts counts one restart more. The pod's disk is the VM's, so emptyDir volumes begin empty again.

Its parts: `wanted` the intent, `preparation` what a VM is started with, `vmnetwork` its network, `vm_session` its
containers, `suspension` and `snapshots` its files, `endings` what the record says afterwards, `closing` the last reads.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractContextManager
from typing import Any

import structlog

from hypervisor.controller import store
from hypervisor.controller.archive import save_console
from hypervisor.controller.closing import Closing
from hypervisor.controller.concurrency import first
from hypervisor.controller.endings import end_lost, end_ran, end_stopped
from hypervisor.controller.eviction import EVICTED, GRACE_S, wait_exceeded
from hypervisor.controller.forks import tell_fork
from hypervisor.controller.journal import Journal, new_record
from hypervisor.controller.machine import Machine, VmRequest
from hypervisor.controller.paths import PodPaths
from hypervisor.controller.podstatus import pod_object
from hypervisor.controller.preparation import Preparation, placed
from hypervisor.controller.runtime_spec import setup_arguments
from hypervisor.controller.services import Services
from hypervisor.controller.sizing import vm_size
from hypervisor.controller.snapshots import PodSnapshots
from hypervisor.controller.spec import PodSpec
from hypervisor.controller.store import StoredPod
from hypervisor.controller.suspension import Suspension
from hypervisor.controller.vm_session import Arguments, VmSession, rounded
from hypervisor.controller.vmnetwork import VmNetwork
from hypervisor.controller.volumes import Contents, ObjectVolumes
from hypervisor.controller.wanted import Wanted
from hypervisor.errors import HvError, VmFailed
from hypervisor.images.model import Image
from hypervisor.introspect.agent import AgentClient


class PodVm:
    """One pod. `run` is to be run as a task; cancelling it lets go of the VM without ending it."""

    def __init__(self, services: Services, stored: StoredPod, pod: PodSpec, paths: PodPaths) -> None:
        self.stored = stored
        self.pod = pod
        self.paths = paths
        self.size = vm_size(pod)
        self.machine: Machine | None = None
        self._services = services
        self._journal = Journal(paths, store.load_record(paths) or new_record(pod), pod.restart_policy)
        self.suspension = Suspension(paths, self._journal, services.machines, f"{pod.namespace}/{pod.name}")
        self.snapshots = PodSnapshots(paths, self._journal, self.suspension)
        self._volumes = ObjectVolumes(services.objects, pod, stored.uid)
        self._wanted = Wanted(self._journal, pod.grace_s)
        self._network = VmNetwork(services.network, stored.uid, self._wanted)
        self._preparation = Preparation(services, self._journal, paths, stored.uid)
        self._closing = Closing(services, self._journal, paths, pod, stored.uid)
        self._log = structlog.get_logger().bind(pod=f"{pod.namespace}/{pod.name}", uid=stored.uid)
        self.gone = asyncio.Event()

    # ---- what others see and ask -------------------------------------------------------------------------------------

    @property
    def journal(self) -> Journal:
        """The record and its changes."""
        return self._journal

    def view(self) -> dict[str, Any]:
        """The ``v1`` Pod object, as of now."""
        stored = self.stored
        return pod_object(stored.manifest, self.pod, stored.uid, stored.created, self._journal.record)

    async def request_stop(self, grace_s: float | None = None) -> None:
        """Containers are to end and the VM to go off; the pod stays listed. On disk on return."""
        await self._wanted.intend("stop", grace_s)

    async def request_delete(self, grace_s: float | None = None) -> None:
        """As `request_stop`, and then the pod is to be removed."""
        await self._wanted.intend("delete", grace_s)

    async def restore(self, name: str) -> None:
        """What runs is given up for what a snapshot holds. Raises `HvError`; the pod is as it was then."""
        check = self._services.machines.check
        await self.snapshots.restore(name, lambda folder: check(self.vm_request(), folder))

    def session(self) -> AbstractContextManager[None]:
        """While it is open the VM of a pod that has ended waits for a while, so that the reader gets all."""
        return self._closing.session()

    def vm_request(self) -> VmRequest:
        """What the VM manager is asked for, with the images that were pulled last."""
        return self._preparation.request(self.pod, self.size)

    # ---- the life of the pod -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Lives the pod's life; returns when it has been removed."""
        try:
            if not self._journal.record.closed:
                await self._live()
                await self._close()
            await self._wanted.wait_deleted()
            await self._remove()
        finally:
            self._preparation.release()
            if self.machine is not None:
                await self.machine.detach()

    async def _live(self) -> None:
        """Returns when the pod has ended; its VM may still be there."""
        await self._take_over()
        deadline = asyncio.create_task(self._enforce_deadline())
        try:
            while not self._journal.record.terminal:
                if self._wanted.kind != "run" and self.machine is None:
                    break
                try:
                    await (self._in_files() if self.suspension.in_files else self._one_vm())
                except HvError as e:
                    await self._lost(e)
        finally:
            deadline.cancel()
            await asyncio.gather(deadline, return_exceptions=True)
        if not self._journal.record.terminal:
            end_stopped(self._journal)

    async def _take_over(self) -> None:
        """Finds the VM that an earlier daemon started."""
        self.pod = self._network.recalled(self.pod)
        machine = await self.suspension.recover(await self._adopt())
        await self.snapshots.sweep()
        record = self._journal.record
        if machine is not None and (record.vm_up or record.terminal):
            self._services.ledger.hold(self.stored.uid, self.size)
            self._services.ledger.measure(self.stored.uid, machine.memory_used)
            self.machine = machine
            await self._network.connect(machine, self.pod)
            self._log.info("running VM taken over")
            return
        if machine is not None or self.paths.vm.exists():
            self._log.info("leftover VM swept", alive=machine is not None)
        if machine is not None:
            await machine.remove()
        await self._services.machines.sweep(self.paths.vm)
        if record.vm_up and not record.terminal:
            await self._lost(VmFailed("the VM ended while no daemon was running"))

    async def _adopt(self) -> Machine | None:
        try:
            return await self._services.machines.adopt(self.paths.vm)
        except HvError as e:
            self._log.warning("VM cannot be taken over", error=str(e))
            return None

    async def _one_vm(self) -> None:
        """From images to the end of the containers, in one VM."""
        fresh = self.machine is None
        if fresh:
            images = await self._wanted.interruptible(self._preparation.pull(self.pod, running=False))
            if images is None:
                return
            self.pod = await self._network.allocated(self.pod)
            self.pod = await self._network.resolved(self.pod)
            arguments = self._preparation.arguments(self.pod, images)
            if arguments is None:
                return
            contents = await self._wanted.interruptible(self._preparation.volume_contents(self._volumes))
            if contents is None:
                return
            session = await self._wanted.interruptible(self._start(images, arguments, contents))
            if session is None:
                await self._drop_vm()
                return
        else:
            images = await self._preparation.pull(self.pod, running=True)
            arguments = self._preparation.arguments(self.pod, images)
            if arguments is None or self.machine is None:
                return
            session = self._session(self.machine, images, arguments)
        await first(
            session.run(self._wanted.wait_stop),
            self._wanted.wait_killed(),
            self._volumes.keep(session.agent),
            self._evict(session.agent),
            self._network.wait_unplugged(),
            self.suspension.wait_requested("suspending"),
        )
        if self.suspension.state == "suspending" and self._wanted.kind == "run":
            await self._suspend(session.machine)
        else:
            end_ran(self._journal, self.pod, self._wanted.kind)

    async def _suspend(self, machine: Machine) -> None:
        if await self.suspension.suspend(machine):
            self.machine = None
            self._services.ledger.release(self.stored.uid)
            await self.suspension.settle()

    async def _in_files(self) -> None:
        """Waits until the pod is to go on, and has its VM back then."""
        await self._wanted.interruptible(self.suspension.wait_requested("resuming"))
        if self._wanted.kind != "run":
            self._journal.update(reason="", message="")
            return
        try:
            images = await self._wanted.interruptible(self._preparation.pull(self.pod, running=True))
            self._services.ledger.promise(self.stored.uid, self.size)
        except HvError as e:
            await self.suspension.refuse_resume(e)
            return
        self.machine = None if images is None else await self.suspension.resume(self.vm_request())
        if self.machine is None:
            self._services.ledger.release(self.stored.uid)
            return
        self._services.ledger.measure(self.stored.uid, self.machine.memory_used)
        machine, agent = self.machine, self._services.connect(self.machine.address)
        identity = setup_arguments(self.pod)
        await self.suspension.go_on(machine, agent, identity, lambda: self._network.connect(machine, self.pod))
        await tell_fork(agent, self.stored.manifest, [c.name for c in self.pod.containers])

    async def _start(self, images: dict[str, Image], arguments: Arguments, contents: Contents) -> VmSession:
        """A VM that has been set up.

        :raises HvError: it could not be had; nothing of it is left but what `_lost` clears away
        """
        self._services.ledger.promise(self.stored.uid, self.size)
        queued = time.monotonic()
        async with self._services.starts:
            began = time.monotonic()
            record = self._journal.record
            timing = {**record.timing, "queue": began - queued}
            self._journal.update(vm_starts=record.vm_starts + 1, vm_up=False)
            self.machine = await self._services.machines.start(self.vm_request())
            self._services.ledger.measure(self.stored.uid, self.machine.memory_used)
            timing["vm"] = time.monotonic() - began
            await self._network.connect(self.machine, self.pod)
            self._journal.update(timing=rounded(timing))
            session = self._session(self.machine, images, arguments)
            await session.boot()
            await self._volumes.fill(session.agent, contents)
        self._log.info("VM is up", timing=dict(self._journal.record.timing))
        self._journal.update(reason="", message="")
        return session

    def _session(self, machine: Machine, images: dict[str, Image], arguments: Arguments) -> VmSession:
        completion = self._preparation.completion(self.pod)
        given = placed(arguments, machine, images)
        return VmSession(self._services, self.pod, self._journal, machine, given, completion)

    async def _enforce_deadline(self) -> None:
        if self.pod.deadline_s is None:
            return
        left = self.stored.created + self.pod.deadline_s - time.time()
        await asyncio.sleep(max(0.0, left))
        message = "Pod was active on the node longer than the specified deadline"
        self._journal.update(reason="DeadlineExceeded", message=message)
        await self.request_stop()

    async def _evict(self, agent: AgentClient) -> None:
        """Stops a pod that takes more than its limits; never returns, since the stop is seen elsewhere."""
        message = await wait_exceeded(agent, self.pod, self._services.times.storage_s)
        if self._wanted.kind == "run":
            self._journal.update(reason=EVICTED, message=message)
            await self.request_stop(GRACE_S)
        await asyncio.Event().wait()

    # ---- its ends ----------------------------------------------------------------------------------------------------

    async def _lost(self, error: HvError) -> None:
        """The VM died or could not be had: what is left of it goes, and the pod fails or waits for another VM."""
        self._log.warning("VM lost", error=str(error))
        await self._drop_vm()
        delay = end_lost(self._journal, self.pod, error, self._wanted.kind, self._services.times.backoff)
        if delay is not None:
            await self._wanted.interruptible(asyncio.sleep(delay))

    async def _drop_vm(self) -> None:
        machine, self.machine = self.machine, None
        if machine is not None:
            save_console(machine, self.paths)
            await machine.remove()
        else:
            await self._services.machines.sweep(self.paths.vm)
        self._services.ledger.release(self.stored.uid)

    async def _close(self) -> None:
        """The pod has ended: its logs are taken out of the VM, and the VM goes."""
        record = self._journal.record
        self._log.info("pod has ended", phase=record.phase, reason=record.reason)
        if self.machine is not None:
            await self._closing.read_out(self.machine)
        await self._drop_vm()
        await self.suspension.discard()
        self._preparation.release()
        await self._network.release()
        self._journal.update(closed=True, vm_up=False)

    async def _remove(self) -> None:
        self._journal.close()
        await self._network.release()
        await asyncio.to_thread(store.remove, self.paths)
        self._log.info("pod removed")
        self.gone.set()
        self._journal.topic.publish()
