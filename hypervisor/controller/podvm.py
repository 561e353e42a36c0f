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
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import structlog

from hypervisor.controller import store
from hypervisor.controller.archive import archive_logs, save_console
from hypervisor.controller.concurrency import first
from hypervisor.controller.environment import fetch_external
from hypervisor.controller.eviction import EVICTED, GRACE_S, wait_exceeded
from hypervisor.controller.forks import tell_fork
from hypervisor.controller.journal import Journal, new_record
from hypervisor.controller.machine import Machine, VmRequest
from hypervisor.controller.manifest import CLUSTER_DOMAIN
from hypervisor.controller.paths import PodPaths
from hypervisor.controller.podfacts import facts_of
from hypervisor.controller.podstatus import phase_of, pod_object
from hypervisor.controller.pulls import pull_all
from hypervisor.controller.record import ContainerRecord, Intent, Phase, Running, State, Terminated, Waiting
from hypervisor.controller.resolving import resolving
from hypervisor.controller.runtime_spec import container_arguments, setup_arguments
from hypervisor.controller.services import PodNetwork, Services
from hypervisor.controller.sizing import vm_size
from hypervisor.controller.snapshots import PodSnapshots
from hypervisor.controller.spec import ContainerSpec, PodSpec
from hypervisor.controller.store import StoredPod
from hypervisor.controller.suspension import Suspension
from hypervisor.controller.vm_session import Arguments, VmSession, rounded
from hypervisor.controller.volumes import RETRY_S, Contents, ObjectVolumes
from hypervisor.errors import HvError, InvalidInput, VmFailed
from hypervisor.images.model import Image
from hypervisor.introspect.agent import AgentClient

LOST_EXIT_CODE = 137
"""What Kubernetes gives a container that went away with its sandbox."""
LOG_BYTES = 48 * 1024 * 1024
"""More than the log files of one container can have: two instances of two files of 10 MiB, and tar around them."""
MOUNT_FAILED = "FailedMount"
_STRENGTH = {"run": 0, "stop": 1, "delete": 2}


class PodVm:
    """One pod. `run` is to be run as a task; cancelling it lets go of the VM without ending it."""

    def __init__(self, services: Services, stored: StoredPod, pod: PodSpec, paths: PodPaths) -> None:
        self.stored = stored
        self.pod = pod
        self.paths = paths
        self.size = vm_size(pod)
        self.machine: Machine | None = None
        self._sessions = 0
        self._images: dict[str, Image] = {}
        self._services = services
        self._journal = Journal(paths, store.load_record(paths) or new_record(pod), pod.restart_policy)
        self.suspension = Suspension(paths, self._journal, services.machines, f"{pod.namespace}/{pod.name}")
        self.snapshots = PodSnapshots(paths, self._journal, self.suspension)
        self._volumes = ObjectVolumes(services.objects, pod, stored.uid)
        self._intent = asyncio.Event()
        self._leases = ExitStack()
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
        await self._intend("stop", grace_s)

    async def request_delete(self, grace_s: float | None = None) -> None:
        """As `request_stop`, and then the pod is to be removed."""
        await self._intend("delete", grace_s)

    async def restore(self, name: str) -> None:
        """What runs is given up for what a snapshot holds. Raises `HvError`; the pod is as it was then."""
        check = self._services.machines.check
        await self.snapshots.restore(name, lambda folder: check(self._request(self._images), folder))

    @contextmanager
    def session(self) -> Iterator[None]:
        """While it is open the VM of a pod that has ended waits for a while, so that the reader gets all."""
        self._sessions += 1
        try:
            yield
        finally:
            self._sessions -= 1
            self._journal.topic.publish()

    async def _intend(self, kind: Any, grace_s: float | None) -> None:
        grace = float(self.pod.grace_s if grace_s is None else grace_s)
        before = self._journal.record.intent
        if _STRENGTH[kind] < _STRENGTH[before.kind]:
            kind = before.kind
        if before.kind != "run":
            grace = min(grace, before.grace_s)
        same = before.kind == kind and before.grace_s == grace
        intent = Intent(kind, grace, before.at if same else time.time())
        await self._journal.intend(intent)
        self._intent.set()

    # ---- the life of the pod -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Lives the pod's life; returns when it has been removed."""
        if self._wanted != "run":
            self._intent.set()
        try:
            if not self._journal.record.closed:
                await self._live()
                await self._close()
            await self._wait_deleted()
            await self._remove()
        finally:
            self._leases.close()
            if self.machine is not None:
                await self.machine.detach()

    @property
    def _wanted(self) -> str:
        return self._journal.record.intent.kind

    async def _live(self) -> None:
        """Returns when the pod has ended; its VM may still be there."""
        await self._take_over()
        deadline = asyncio.create_task(self._enforce_deadline())
        try:
            while not self._journal.record.terminal:
                if self._wanted != "run" and self.machine is None:
                    break
                try:
                    await (self._in_files() if self.suspension.in_files else self._one_vm())
                except HvError as e:
                    await self._lost(e)
        finally:
            deadline.cancel()
            await asyncio.gather(deadline, return_exceptions=True)
        if not self._journal.record.terminal:
            self._end_stopped()

    async def _take_over(self) -> None:
        """Finds the VM that an earlier daemon started."""
        record = self._journal.record
        self._address(self._network.addresses(self.stored.uid) if self._network else ())
        machine = await self.suspension.recover(await self._adopt())
        await self.snapshots.sweep()
        record = self._journal.record
        if machine is not None and (record.vm_up or record.terminal):
            self._services.ledger.hold(self.stored.uid, self.size)
            self._services.ledger.measure(self.stored.uid, machine.memory_used)
            self.machine = machine
            await self._connect(machine)
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
            images = await self._interruptible(self._pull(running=False))
            if images is None:
                return
            if self._network is not None and self.pod.network.mode != "none":
                self._address(await self._interruptible(self._network.allocate(self.stored.uid)) or ())
                self._resolve(await self._interruptible(self._network.name_servers()) or ())
            arguments = self._arguments(images)
            if arguments is None:
                return
            contents = await self._interruptible(self._volume_contents())
            if contents is None:
                return
            session = await self._interruptible(self._start(images, arguments, contents))
            if session is None:
                await self._drop_vm()
                return
        else:
            images = await self._pull(running=True)
            arguments = self._arguments(images)
            if arguments is None or self.machine is None:
                return
            session = self._session(self.machine, images, arguments)
        await first(
            session.run(self._wait_stop),
            self._wait_killed(),
            self._volumes.keep(session.agent),
            self._evict(session.agent),
            self._wait_unplugged(),
            self.suspension.wait_requested("suspending"),
        )
        if self.suspension.state == "suspending" and self._wanted == "run":
            await self._suspend(session.machine)
        else:
            self._end_ran()

    async def _suspend(self, machine: Machine) -> None:
        if await self.suspension.suspend(machine):
            self.machine = None
            self._services.ledger.release(self.stored.uid)
            await self.suspension.settle()

    async def _in_files(self) -> None:
        """Waits until the pod is to go on, and has its VM back then."""
        await self._interruptible(self.suspension.wait_requested("resuming"))
        if self._wanted != "run":
            self._journal.update(reason="", message="")
            return
        try:
            images = await self._interruptible(self._pull(running=True))
            self._services.ledger.promise(self.stored.uid, self.size)
        except HvError as e:
            await self.suspension.refuse_resume(e)
            return
        self.machine = None if images is None else await self.suspension.resume(self._request(images))
        if self.machine is None:
            self._services.ledger.release(self.stored.uid)
            return
        self._services.ledger.measure(self.stored.uid, self.machine.memory_used)
        machine, agent = self.machine, self._services.connect(self.machine.address)
        await self.suspension.go_on(machine, agent, setup_arguments(self.pod), lambda: self._connect(machine))
        await tell_fork(agent, self.stored.manifest, [c.name for c in self.pod.containers])

    @property
    def _network(self) -> PodNetwork | None:
        return self._services.network

    def _address(self, addresses: tuple[str, ...]) -> None:
        """From now on the pod has these addresses."""
        self.pod = replace(self.pod, network=replace(self.pod.network, routed=addresses))

    def _resolve(self, servers: tuple[str, ...]) -> None:
        """From now on its guest is to ask these, where its DNS policy says so."""
        network = resolving(self.pod.network, self.pod.namespace, CLUSTER_DOMAIN, servers)
        self.pod = replace(self.pod, network=network)

    async def _connect(self, machine: Machine) -> None:
        if self._network is not None and machine.tap is not None:
            await self._network.connect(self.stored.uid, *machine.tap, facts_of(self.pod))

    async def _wait_unplugged(self) -> None:
        """:raises VmFailed: the VM's tap was removed; QEMU does not hear of that, and only another VM has another"""
        if self._network is None:
            await asyncio.Event().wait()
            return
        await self._network.wait_unplugged(self.stored.uid)
        raise VmFailed("its tap was removed from the host; a VM with another one takes its place")

    async def _interruptible(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of `work`; None, and `work` cancelled, as soon as the pod is no longer wanted."""
        return await first(work, self._wait_unwanted())

    async def _wait_unwanted(self) -> None:
        await self._intent.wait()

    async def _wait_stop(self) -> float:
        """Waits until the pod is no longer wanted; its grace period."""
        await self._intent.wait()
        return self._journal.record.intent.grace_s

    async def _wait_killed(self) -> None:
        """Waits until the pod is to go at once."""
        await self._wait_record(lambda intent: intent.kind == "delete" and intent.grace_s <= 0)

    async def _wait_record(self, met: Callable[[Intent], bool]) -> None:
        version = 0
        while not met(self._journal.record.intent):
            version = await self._journal.topic.wait_newer(version)

    async def _pull(self, *, running: bool) -> dict[str, Image]:
        """Every container's image, leased until the pod has ended.

        :param running: the VM runs with them already; only their configs are wanted
        """
        began = time.monotonic()
        source = self._services.images
        objects, times = self._services.objects, self._services.times
        images = await pull_all(self.pod, source, self._journal, times.backoff, running=running, secrets=objects)
        self._images = images
        for image in {image.id: image for image in images.values()}.values():
            self._leases.enter_context(source.lease(image))
        if not running:
            self._journal.update(timing=rounded({"pull": time.monotonic() - began}))
        return images

    def _arguments(self, images: dict[str, Image]) -> Arguments | None:
        """What the agent is to be given for each container; None, and the pod has failed, when it makes no sense."""
        arguments: dict[str, dict[str, Any]] = {}
        for container in (*self.pod.init_containers, *self.pod.containers):
            image = images[container.name]
            try:
                arguments[container.name] = container_arguments(container, self.pod, self.stored.uid, image)
            except InvalidInput as e:
                reason = "CreateContainerConfigError"
                self._journal.container(container.name, state=Waiting(reason, str(e)))
                self._journal.update(phase="Failed", reason=reason, message=str(e))
                return None
        return arguments

    async def _complete(self, container: ContainerSpec, given: dict[str, Any]) -> dict[str, Any]:
        """A container's arguments with what config maps and secrets say now; its disk stays."""
        external = await fetch_external(self._services.objects, self.pod, container)
        image = self._images[container.name]
        now = container_arguments(container, self.pod, self.stored.uid, image, external)
        return now | {"image_disk": given["image_disk"]}

    async def _volume_contents(self) -> Contents:
        """What volumes hold that are made of other objects; one that is missing is waited for."""
        delay = RETRY_S[0]
        while True:
            try:
                contents = await self._volumes.fetch()
            except HvError as e:
                self._journal.update(reason=MOUNT_FAILED, message=str(e))
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY_S[1])
            else:
                if self._journal.record.reason == MOUNT_FAILED:
                    self._journal.update(reason="", message="")
                return contents

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
            self.machine = await self._services.machines.start(self._request(images))
            self._services.ledger.measure(self.stored.uid, self.machine.memory_used)
            timing["vm"] = time.monotonic() - began
            await self._connect(self.machine)
            self._journal.update(timing=rounded(timing))
            session = self._session(self.machine, images, arguments)
            await session.boot()
            await self._volumes.fill(session.agent, contents)
        self._log.info("VM is up", timing=dict(self._journal.record.timing))
        self._journal.update(reason="", message="")
        return session

    def _session(self, machine: Machine, images: dict[str, Image], arguments: Arguments) -> VmSession:
        placed = {
            name: given | {"image_disk": machine.disk_serial(images[name].disk)} for name, given in arguments.items()
        }
        return VmSession(self._services, self.pod, self._journal, machine, placed, self._complete)

    def _request(self, images: dict[str, Image]) -> VmRequest:
        disks = {image.serial: image.disk for image in images.values()}
        label = f"{self.pod.name[:50].rstrip('-.')}-{self.stored.uid[:8]}"
        pod = self.pod
        return VmRequest(self.paths.vm, self.size, tuple(disks.items()), pod.network.mode, label, pod.cold, pod.disks)

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
        if self._wanted == "run":
            self._journal.update(reason=EVICTED, message=message)
            await self.request_stop(GRACE_S)
        await asyncio.Event().wait()

    # ---- its ends ----------------------------------------------------------------------------------------------------

    def _end_ran(self) -> None:
        """The containers have ended, for good or because a stop was asked for."""
        record = self._journal.record
        if self._wanted == "run":
            phase = phase_of(record, self.pod.restart_policy)
            if phase not in ("Succeeded", "Failed"):
                phase = "Failed"
            self._journal.update(phase=phase)
        else:
            self._end_stopped()

    def _end_stopped(self) -> None:
        record = self._journal.record
        ended = [c.state for c in record.containers]
        good = all(isinstance(s, Terminated) and s.succeeded for s in ended) and not record.reason
        phase: Phase = "Succeeded" if good else "Failed"
        never_ran = all(c.ended is None for c in record.containers)
        changes = {"reason": "Stopped", "message": "stopped before its containers ran"} if never_ran else {}
        self._journal.update(phase=phase, **({} if record.reason else changes))

    async def _lost(self, error: HvError) -> None:
        """The VM died or could not be had: what is left of it goes, and the pod fails or waits for another VM."""
        self._log.warning("VM lost", error=str(error))
        await self._drop_vm()
        record = self._journal.record
        again = self.pod.restart_policy != "Never" and self._wanted == "run"
        reason = error.reason
        for container in (*record.init_containers, *record.containers):
            self._lose(container, reason, str(error), again=again)
        if not again:
            self._journal.update(phase="Failed", reason=record.reason or reason, message=str(error), vm_up=False)
            return
        ran_s = time.time() - record.vm_up_at if record.vm_up else 0.0
        delay = self._services.times.backoff.next(record.vm_delay_s, ran_s)
        message = f"{error}; another VM starts in {delay:g} s"
        self._journal.update(reason=reason, message=message, vm_up=False, vm_delay_s=delay)
        await self._interruptible(asyncio.sleep(delay))

    def _lose(self, container: ContainerRecord, reason: str, message: str, *, again: bool) -> None:
        state: State = container.state
        is_init = container.name in {c.name for c in self.pod.init_containers}
        if isinstance(state, Running):
            state = Terminated(LOST_EXIT_CODE, reason, message, started_ns=state.started_ns, finished_ns=time.time_ns())
        if not again:
            self._journal.container(container.name, state=state)
            return
        done = isinstance(state, Terminated) and state.succeeded and self.pod.restart_policy == "OnFailure"
        if done and not is_init:
            return
        ended = state if isinstance(state, Terminated) else container.last
        self._journal.container(container.name, state=Waiting(), last=ended)

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
        if self.machine is not None and not self._discard:
            await first(self._archive(self.machine), self._wait_discard())
        await self._drop_vm()
        await self.suspension.discard()
        self._leases.close()
        if self._network is not None:
            await self._network.release(self.stored.uid)
        self._journal.update(closed=True, vm_up=False)

    @property
    def _discard(self) -> bool:
        """Nobody wants the logs: the pod is being deleted, and nobody reads them (or it is to go at once)."""
        intent = self._journal.record.intent
        return intent.kind == "delete" and (self._sessions == 0 or intent.grace_s <= 0)

    async def _wait_discard(self) -> None:
        await self._wait_record(lambda _: self._discard)

    async def _archive(self, machine: Machine) -> None:
        times = self._services.times
        agent = self._services.connect(machine.address)
        try:
            async with asyncio.timeout(times.archive_s):
                containers = len(self.pod.init_containers) + len(self.pod.containers)
                await archive_logs(agent, self.paths, LOG_BYTES * containers)
        except (HvError, TimeoutError, OSError) as e:
            self._log.warning("logs could not be archived", error=str(e))
        with suppress(TimeoutError):
            async with asyncio.timeout(times.linger_s):
                await self._wait_no_sessions()

    async def _wait_no_sessions(self) -> None:
        await self._wait_record(lambda _: self._sessions == 0)

    async def _wait_deleted(self) -> None:
        await self._wait_record(lambda intent: intent.kind == "delete")

    async def _remove(self) -> None:
        self._journal.close()
        if self._network is not None:
            await self._network.release(self.stored.uid)
        await asyncio.to_thread(store.remove, self.paths)
        self._log.info("pod removed")
        self.gone.set()
        self._journal.topic.publish()
