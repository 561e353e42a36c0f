"""``archive.get``, ``archive.put``: files of a container as a tar, whether or not its image has one.

A forked child enters the container's mount namespace, or the root of one that has ended, before it touches a path; so
the kernel resolves every link inside the container. The child has been made unable to import or load anything first: a
library or module of the container's own would otherwise run with the agent's rights (that is how `docker cp` was once
broken, CVE-2019-14271). What it streams goes through pipes; why it failed comes on a third one.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from . import syscalls
from .container import Container
from .engine import Engine
from .errors import INTERNAL, INVALID, AgentError, from_os, invalid
from .fields import Fields
from .reaper import Reaper, exit_code
from .server import Connection
from .spec import parse_name
from .streams import PipeWriter, Pump
from .wire import Frame, FrameType

_MAX_MESSAGE = 4096
Work = Callable[[int], None]  # with the stream's descriptor


class Entrance:
    """Into which tree a child goes: the agent's own, in the base class."""

    fds: tuple[int, ...] = ()

    def enter(self) -> None:
        """Runs in the child."""

    def close(self) -> None:
        """Runs in the agent, after the fork."""


class _Namespace(Entrance):
    """A running container's mount namespace, whose root becomes ours."""

    def __init__(self, pid: int) -> None:
        self.fds = (os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC),)

    def enter(self) -> None:
        syscalls.setns(self.fds[0], syscalls.CLONE_NEWNS)

    def close(self) -> None:
        os.close(self.fds[0])


class _EndedRoot(Entrance):
    """The overlay of a container that has ended."""

    def __init__(self, root: str) -> None:
        self._root = root

    def enter(self) -> None:
        os.chroot(self._root)
        os.chdir("/")


def _entrance(container: Container) -> Entrance:
    return _Namespace(container.pid) if container.pid else _EndedRoot(container.root.path)


# ---- the child -------------------------------------------------------------------------------------------------------


def _isolate(keep: tuple[int, ...]) -> None:
    """Cuts the child off from the agent: its signals, its descriptors, and every way to load code."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    start = 3
    for fd in sorted(keep):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, 1 << 20)
    sys.meta_path.clear()
    sys.path_hooks.clear()
    sys.path.clear()


def _run_child(stream: int, errors: int, entrance: Entrance, work: Work) -> int:
    """The child's life; gives its exit status."""
    try:
        _isolate((stream, errors, *entrance.fds))
        entrance.enter()
        work(stream)
        return 0
    except BrokenPipeError:
        return 1
    except AgentError as e:
        text = f"{e.reason}\n{e.message}"
    except OSError as e:
        error = from_os(str(e.filename or "archive"), e)
        text = f"{error.reason}\n{error.message}"
    except Exception as e:
        text = f"{INTERNAL if not isinstance(e, ValueError | EOFError) else INVALID}\narchive: {e}"
    os.write(errors, text.encode("utf-8", "surrogateescape")[:_MAX_MESSAGE])
    return 1


class Child:
    """A forked child that works on one end of a pipe. Always `close` it."""

    def __init__(self, reaper: Reaper, entrance: Entrance, work: Work, *, reads: bool) -> None:
        child_end, our_end = _pipe(reads)
        self.errors, errors = os.pipe2(os.O_CLOEXEC)
        self.stream = our_end
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_run_child(child_end, errors, entrance, work))
        self.status = reaper.watch(self.pid)
        os.close(child_end)
        os.close(errors)
        entrance.close()

    async def finished(self) -> None:
        """Waits for its end.

        :raises AgentError: it failed
        """
        status = await self.status
        if exit_code(status):
            text = os.read(self.errors, _MAX_MESSAGE).decode("utf-8", "replace")
            reason, _, message = text.partition("\n")
            raise AgentError(reason or INTERNAL, message or "archive: the agent's helper process died")

    def close(self) -> None:
        """Kills it if it still runs."""
        if not self.status.done():
            os.kill(self.pid, signal.SIGKILL)
        if self.stream >= 0:
            os.close(self.stream)
            self.stream = -1
        os.close(self.errors)


def _pipe(child_reads: bool) -> tuple[int, int]:
    """(the child's end, ours)."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    return (read_end, write_end) if child_reads else (write_end, read_end)


# ---- the calls -------------------------------------------------------------------------------------------------------


def _parse(args: dict[str, Any], call: str, engine: Engine) -> tuple[Container, str]:
    fields = Fields(args, call)
    container = engine.get(parse_name(fields, "container"))
    path = fields.path_text("path")
    fields.done()
    if not container.alive and not os.path.ismount(container.root.path):
        raise invalid(f"container {container.name}: never had a root, so it has no files")
    return container, path


async def run_get(args: dict[str, Any], connection: Connection, engine: Engine) -> None:
    """The call."""
    from . import tarstream

    container, path = _parse(args, "archive.get", engine)
    connection.accept({})
    await _send(connection, engine.reaper, _entrance(container), lambda fd: tarstream.pack_path(path, fd))
    connection.end(error=None)


async def run_put(args: dict[str, Any], connection: Connection, engine: Engine) -> None:
    """The call."""
    from . import tarstream

    container, path = _parse(args, "archive.put", engine)
    connection.accept({})
    child = Child(engine.reaper, _entrance(container), lambda fd: tarstream.unpack_into(path, fd), reads=True)
    writer = PipeWriter(child.stream)
    child.stream = -1
    try:
        connection.consume(lambda frame: _feed(writer, frame))
        await child.finished()
    finally:
        writer.close()
        child.close()
    connection.end(error=None)


def _feed(writer: PipeWriter, frame: Frame) -> Awaitable[None] | None:
    if frame.type is not FrameType.STDIN:
        raise invalid(f"{frame.type.name} frame in an archive.put")
    if frame.payload:
        return writer.write(frame.payload)
    writer.close()
    return None


async def send_tree(directory: str, connection: Connection, reaper: Reaper) -> None:
    """A tar of a directory of the guest's own, names relative to it."""
    from . import tarstream

    await _send(connection, reaper, Entrance(), lambda fd: tarstream.pack_path(f"{directory}/.", fd))


async def _send(connection: Connection, reaper: Reaper, entrance: Entrance, work: Work) -> None:
    child = Child(reaper, entrance, work, reads=False)
    pump = Pump(child.stream, lambda data: connection.send(FrameType.STDOUT, data))
    child.stream = -1
    try:
        await pump.ended
        await child.finished()
    finally:
        pump.close()
        child.close()
