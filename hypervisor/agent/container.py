"""One container: its state, its standard streams, its end.

Theory of operation
-------------------
::

    (none) -> created -> running <-> paused -> exited -> created (attempt + 1) ...

`created` lasts while crun works. When the first process ends, the rest of the container is killed, what is left in its
pipes is read into the log, the state becomes `exited` and everybody who waits hears of it; then the control group and
crun's traces go. The root stays mounted, so that files can still be fetched, until the container is started again or
removed.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable
from typing import Any

from .cgroup import Cgroup
from .logs import LogWriter
from .spec import ContainerSpec, User
from .storage import LOGS, Root
from .streams import PipeWriter, Pump

CREATED, RUNNING, PAUSED, EXITED = "created", "running", "paused", "exited"
STDOUT, STDERR = b"stdout", b"stderr"


class Client:
    """Somebody attached to a container's output; `server.Connection` behind `attach.py`."""

    def deliver(self, stream: bytes, data: bytes) -> Awaitable[None] | None:
        """Takes one chunk; None, or an awaitable of having room again."""
        raise NotImplementedError


class Streams:
    """The agent's ends of a running container's standard streams."""

    def __init__(self, log: LogWriter) -> None:
        self.log = log
        self.clients: list[Client] = []
        self.stdin: PipeWriter | None = None
        self.changed = asyncio.Event()  # set whenever the log has grown; whoever waits clears it by `wait_changed`
        self._pumps: list[Pump] = []

    def add_output(self, fd: int, stream: bytes) -> None:
        """From now on what comes out of `fd` (owned from here) is logged and handed to the clients."""
        self._pumps.append(Pump(fd, lambda data: self._take(stream, data)))

    def _take(self, stream: bytes, data: bytes) -> Awaitable[None] | None:
        self.log.write(stream, data)
        self.changed.set()
        self.changed = asyncio.Event()
        rooms = [room for client in list(self.clients) if (room := client.deliver(stream, data)) is not None]
        if not rooms:
            return None
        return rooms[0] if len(rooms) == 1 else _all(rooms)

    @property
    def terminal(self) -> int:
        """The descriptor to set a terminal's size with; -1 when there is none (any more)."""
        return self._pumps[0].fileno() if len(self._pumps) == 1 else -1

    async def drained(self) -> None:
        """After the last process has ended: waits until all that it wrote has been logged and delivered."""
        for pump in self._pumps:
            pump.drain()
        for pump in self._pumps:
            await pump.ended

    def close(self) -> None:
        """Ends everything; what is still unread is lost."""
        if self.stdin is not None:
            self.stdin.close()
        for pump in self._pumps:
            pump.close()
        self.log.close()
        self.changed.set()


async def _all(rooms: list[Awaitable[None]]) -> None:
    for room in rooms:
        await asyncio.shield(room)


class Container:
    """A container of the pod, in whatever state; `engine.Engine` drives it."""

    def __init__(self, spec: ContainerSpec, attempt: int) -> None:
        self.spec = spec
        self.name = spec.name
        self.attempt = attempt
        self.state = CREATED
        self.pid = 0
        self.pidfd = -1
        self.user = User(0, 0)
        self.exit_code: int | None = None
        self.signal: int | None = None
        self.oom_killed = False
        self.started_ns = 0
        self.finished_ns = 0
        self.message = ""
        self.termination_message = ""
        self.root = Root(spec.name)
        self.cgroup = Cgroup(spec.name, spec.privileged)
        self.log_directory = f"{LOGS}/{spec.name}"
        self.streams = Streams(
            LogWriter(self.log_directory, attempt, max_bytes=spec.log_max_bytes, max_files=spec.log_files)
        )
        self.exec_prefix = b""  # what every exec into it has in common (exec_request.py)
        self.exited = asyncio.Event()
        self.watcher: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """It has processes, or is about to."""
        return self.state != EXITED

    def now_running(self, pid: int, pidfd: int, user: User) -> None:
        """crun has started it. `pidfd` is owned from here; -1 when it has ended already."""
        self.pid, self.pidfd, self.user = pid, pidfd, user
        self.started_ns = time.time_ns()
        self.state = RUNNING

    def now_exited(self, exit_code: int, signal: int | None, message: str = "") -> None:
        """It has ended, or could not be started."""
        self.exit_code, self.signal, self.message = exit_code, signal, message
        self.finished_ns = time.time_ns()
        self.pid = 0
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        self.state = EXITED
        self.streams.close()
        self.exited.set()

    def as_json(self) -> dict[str, Any]:
        """The protocol's view of it."""
        return {
            "name": self.name,
            "attempt": self.attempt,
            "state": self.state,
            "pid": self.pid,
            "exit_code": self.exit_code,
            "signal": self.signal,
            "oom_killed": self.oom_killed,
            "started_ns": self.started_ns,
            "finished_ns": self.finished_ns,
            "message": self.message,
            "termination_message": self.termination_message,
            "log_dropped_bytes": self.streams.log.dropped_bytes,
        }
