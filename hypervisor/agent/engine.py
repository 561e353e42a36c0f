"""The container engine: every container of the pod, and what can be done to them.

Calls about one container take its lock, so that they happen one after the other; different containers do not wait for
each other.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import Any

from . import bundle, devices, launch, logs, messages
from .caps import effective
from .container import EXITED, PAUSED, RUNNING, Container
from .errors import AgentError, conflict, from_os, invalid, not_found
from .events import Hub
from .exec_request import container_prefix
from .reaper import Reaper, exit_code, exit_signal
from .seccomp import Profiles
from .server import complain
from .spec import SECCOMP_DEFAULT, ContainerSpec, Resources
from .storage import DATA, SHARED_MEMORY, Root, discard, empty_trash
from .users import read_in_root, resolve
from .volumes import Volumes

MAX_CONTAINERS = 256


class Engine:
    """Owns the containers, their processes and mounts."""

    def __init__(self, reaper: Reaper, volumes: Volumes) -> None:
        self.reaper = reaper
        self.volumes = volumes
        self.hub = Hub()
        self.containers: dict[str, Container] = {}
        self.pid_namespace: str | None = None
        self.hostname = ""
        self._profiles = Profiles()
        self._devices_confined: bool | None = None  # not tried yet
        self._locks: dict[str, asyncio.Lock] = {}
        self._emptying: asyncio.Future[None] | None = None

    # ---- finding ----

    def get(self, name: str) -> Container:
        """The container `name`, in whatever state.

        :raises AgentError: NotFound
        """
        if name not in self.containers:
            have = ", ".join(sorted(self.containers)) or "none"
            raise not_found(f"container {name!r}: the pod has no such container (it has: {have})")
        return self.containers[name]

    def running(self, name: str) -> Container:
        """The container `name`, which must be running and not be paused.

        :raises AgentError: NotFound, Conflict
        """
        container = self.get(name)
        if container.state != RUNNING or container.pidfd < 0:
            raise conflict(f"container {name}: is {container.state}, not running")
        return container

    def lock(self, name: str) -> asyncio.Lock:
        """What a call that changes `name` holds."""
        return self._locks.setdefault(name, asyncio.Lock())

    def as_json(self) -> list[dict[str, Any]]:
        """All containers."""
        return [c.as_json() for c in self.containers.values()]

    async def share_processes(self) -> None:
        """From now on all containers are in one PID namespace, which a pause process of ours holds open."""
        from .pause import start_pause

        pid = await start_pause(self.reaper)
        self.pid_namespace = f"/proc/{pid}/ns/pid"

    # ---- starting ----

    async def start(self, spec: ContainerSpec) -> Container:
        """Creates and starts a container; a failure leaves nothing running, and the attempt is listed as exited.

        :raises AgentError: Conflict when it runs already; whatever keeps it from starting
        """
        async with self.lock(spec.name):
            attempt = await self._next_attempt(spec)
            container = Container(spec, attempt)
            self.containers[spec.name] = container
            try:
                await self._start(container)
            except AgentError as e:
                await self._failed(container, e)
                raise
            except BaseException as e:
                await self._failed(container, AgentError("Internal", f"the agent failed: {e!r}"))
                raise
            self.hub.publish("start", container.as_json())
            return container

    async def _next_attempt(self, spec: ContainerSpec) -> int:
        before = self.containers.get(spec.name)
        if before is not None and before.alive:
            raise conflict(f"container {spec.name}: is {before.state} already")
        if before is None and len(self.containers) >= MAX_CONTAINERS:
            raise conflict(f"container {spec.name}: the pod has {MAX_CONTAINERS} containers already")
        if spec.hostname not in (None, "", self.hostname):
            raise invalid(f"container.hostname: a pod has one host name, {self.hostname!r}, not {spec.hostname!r}")
        if before is not None and before.watcher is not None:
            await before.watcher
        written = logs.attempts(f"{DATA}/logs/{spec.name}")
        return max([before.attempt + 1 if before else 0, *(a + 1 for a in written)])

    async def _start(self, container: Container) -> None:
        spec = container.spec
        self._prepare_log(container)
        await container.root.mount(spec.image_disk, self.volumes.quotas, spec.disk_bytes)
        try:
            context = self._context(container)
            with self.reaper.expecting():
                pid = await launch.run_crun(container, bundle.config(spec, context), self.reaper)
                status = self.reaper.watch(pid)
            container.now_running(pid, _pidfd(pid), context.user)
            if context.seccomp is not None:
                self._profiles.learn(_capabilities(spec), f"{launch.CRUN_STATE}/{spec.name}/seccomp.bpf")
        finally:
            container.root.release_binds()
        container.exec_prefix = container_prefix(container)
        container.watcher = asyncio.create_task(self._watch(container, status))
        if container.attempt:
            self._empty_trash()

    def _empty_trash(self) -> None:
        """In the background: the layer of the attempt before. One that is missed goes with the next."""
        if self._emptying is None or self._emptying.done():
            self._emptying = asyncio.get_running_loop().run_in_executor(None, empty_trash)

    def _prepare_log(self, container: Container) -> None:
        """Makes the log directory and drops all logs but the previous attempt's."""
        try:
            os.makedirs(container.log_directory, exist_ok=True)
            for old in logs.attempts(container.log_directory)[:-1]:
                for path in logs.files(container.log_directory, old):
                    os.unlink(path)
        except OSError as e:
            complain(f"logs of {container.name}: {e}")

    def _context(self, container: Container) -> bundle.Context:
        spec = container.spec
        root = container.root.open()
        try:
            user = resolve(spec.user, read_in_root(root, "etc/passwd"), read_in_root(root, "etc/group"))
        finally:
            os.close(root)
        wants_filter = spec.seccomp == SECCOMP_DEFAULT and not spec.privileged
        return bundle.Context(
            rootfs=container.root.path,
            cgroup=container.cgroup.path,
            user=user,
            binds=self._binds(spec, container.root),
            seccomp=self._profiles.get(_capabilities(spec)) if wants_filter else None,
            pid_namespace=self.pid_namespace,
            devices_confined=self._confine_devices(),
        )

    def _confine_devices(self) -> bool:
        if self._devices_confined is None:
            self._devices_confined = devices.confine()
        return self._devices_confined

    def _binds(self, spec: ContainerSpec, root: Root) -> list[bundle.Bind]:
        binds = [bundle.Bind(SHARED_MEMORY, "/dev/shm", False)]
        binds += [
            bundle.Bind(f"{DATA}/etc/{n}", f"/etc/{n}", spec.read_only_root)
            for n in ("hosts", "hostname", "resolv.conf")
        ]
        for mount in spec.mounts:
            source = root.bind_source(self.volumes.path(mount.volume), mount)
            binds.append(bundle.Bind(source, mount.path, mount.read_only))
        for i, file in enumerate(spec.files):
            binds.append(bundle.Bind(root.write_file(i, file), file.path, True))
        if spec.message is not None:
            binds.append(bundle.Bind(root.make_message_file(), spec.message.path, False))
        return binds

    async def _failed(self, container: Container, error: AgentError) -> None:
        container.cgroup.kill()
        container.now_exited(error.extra.get("exit_code", 128), None, error.message)
        self.hub.publish("exit", container.as_json())
        await self._clean_up(container)

    # ---- ending ----

    async def _watch(self, container: Container, status: asyncio.Future[int]) -> None:
        """Lives as long as the container; see its theory of operation."""
        ended = await status
        container.oom_killed = container.cgroup.oom_kills() > 0
        container.cgroup.kill()
        container.cgroup.thaw()
        await container.streams.drained()
        container.termination_message = messages.read(container, failed=ended != 0)
        container.now_exited(exit_code(ended), exit_signal(ended))
        if container.oom_killed:
            self.hub.publish("oom", container.as_json())
        self.hub.publish("exit", container.as_json())
        await self._clean_up(container)

    async def _clean_up(self, container: Container) -> None:
        try:
            await container.cgroup.remove()
        except OSError as e:
            complain(f"control group of {container.name}: {e}")
        launch.forget(container)

    def signal(self, name: str, number: int, everybody: bool) -> None:
        """Sends a signal to the first process, or to every process of the container.

        :raises AgentError: NotFound, Conflict
        """
        container = self.get(name)
        if container.state not in (RUNNING, PAUSED) or container.pidfd < 0:
            raise conflict(f"container {name}: is {container.state}, not running")
        if everybody and number == signal.SIGKILL:
            container.cgroup.kill()
            return
        for pid in container.cgroup.pids() if everybody else ():
            if pid != container.pid:
                _send(pid, number)
        with suppress(ProcessLookupError):  # it has just ended
            signal.pidfd_send_signal(container.pidfd, number)

    async def stop(self, name: str, grace_s: float) -> Container:
        """The stop signal, `grace_s` seconds, SIGKILL; returns when it has ended. Harmless when it has already."""
        container = self.get(name)
        async with self.lock(name):
            if container.state == PAUSED:
                container.cgroup.thaw()
                container.state = RUNNING
            if container.alive:
                if container.pidfd >= 0:
                    self.signal(name, container.spec.stop_signal, False)
                await self._wait_exited(container, grace_s)
                container.cgroup.kill()
                await container.exited.wait()
            return container

    @staticmethod
    async def _wait_exited(container: Container, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(container.exited.wait(), seconds)

    async def stop_all(self, grace_s: float) -> None:
        """Stops every container at the same time."""
        await asyncio.gather(*(self.stop(n, grace_s) for n, c in self.containers.items() if c.alive))

    async def remove(self, name: str) -> None:
        """Forgets a container that has ended, its writable layer and its logs.

        :raises AgentError: NotFound; Conflict when it still runs
        """
        container = self.get(name)
        async with self.lock(name):
            if container.alive:
                raise conflict(f"container {name}: is {container.state}; stop it first")
            if container.watcher is not None:
                await container.watcher
            container.root.unmount()
            discard(container.log_directory)
            self.containers.pop(name, None)
        await asyncio.to_thread(empty_trash)

    # ---- changing ----

    def update(self, name: str, resources: Resources) -> None:
        """Sets a running container's limits.

        :raises AgentError: NotFound, Conflict, or Invalid where the kernel refuses one
        """
        container = self.get(name)
        if container.state not in (RUNNING, PAUSED):
            raise conflict(f"container {name}: is {container.state}, not running")
        try:
            container.cgroup.update(resources)
        except OSError as e:
            raise from_os(f"container {name}: new limits", e) from e

    async def freeze(self, name: str, frozen: bool) -> None:
        """Pauses or resumes; harmless when it is so already.

        :raises AgentError: NotFound, Conflict
        """
        async with self.lock(name):
            container = self.get(name)
            if container.state not in (RUNNING, PAUSED):
                raise conflict(f"container {name}: is {container.state}, not running")
            try:
                await container.cgroup.freeze(frozen)
            except OSError as e:
                raise from_os(f"container {name}: {'pause' if frozen else 'resume'}", e) from e
            if container.state != EXITED:
                container.state = PAUSED if frozen else RUNNING


def _capabilities(spec: ContainerSpec) -> list[str]:
    return effective(spec.cap_add, spec.cap_drop, spec.privileged)


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1  # it has ended already
