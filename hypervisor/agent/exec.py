"""``exec``: a further process in a running container, through hv-exec.

Theory of operation
-------------------
::

    SPAWNED   hv-exec runs; it has a request (memfd), a report socket and the process's streams
    REPORTED  "P<pid>": the new process exists, is our child, and will execute, or say why not
              ("E<code> <errno> <message>");
              with a terminal its master has come before ("T")
    RUNNING   RESPONSE sent; output is pumped, input is consumed
    ENDED     its status is known; what is in the pipes is delivered; END sent

When the client goes first, our ends of the pipes (or the terminal) are closed, as a kubelet does: the process sees end
of file, SIGPIPE or, on a terminal, SIGHUP. It is not killed; the reaper takes it when it ends.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, NamedTuple

from . import wire
from .container import Container
from .engine import Engine
from .errors import CONFLICT, EXHAUSTED, INTERNAL, INVALID, NOT_FOUND, AgentError, invalid
from .exec_request import ExecRequest, encode
from .fields import Fields, check_command
from .launch import spawn
from .reaper import Reaper, exit_code, exit_signal
from .server import Connection
from .spec import User, parse_name, parse_user
from .streams import PipeWriter, Pump
from .users import read_in_root, resolve
from .wire import Frame, FrameType

_REPORT_WAIT_MS = 20
HV_EXEC = "/usr/lib/podvisor/hv-exec"


class Report:
    """What hv-exec says on its report socket, as it comes.

    :ivar ready: done once the pid is known and, where one is wanted, the terminal has come or never will; raises
        AgentError when there is no new process
    :ivar error: what the new process said before it could become the program
    """

    def __init__(self, sock: socket.socket, tty: bool) -> None:
        self._sock = sock
        self._tty = tty
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self.ready: asyncio.Future[int] = self._loop.create_future()
        self.master = -1  # owned here until taken
        self.error: AgentError | None = None
        self._pid = 0
        self._loop.add_reader(sock.fileno(), self._read)

    def wait_a_little(self) -> None:
        """Blocks the whole agent for a few milliseconds, in which hv-exec nearly always does its work: the only CPU is
        its anyway, and each turn of the event loop that this saves costs a millisecond under TCG."""
        waiting = select.poll()  # not select(): with some hundred sessions descriptors go beyond 1024
        waiting.register(self._sock, select.POLLIN)
        waiting.poll(_REPORT_WAIT_MS)
        self._read()

    def read_rest(self) -> None:
        """Takes what is still unread, after the process has ended."""
        if self._sock.fileno() >= 0:
            self._read()

    def close(self) -> None:
        """Closes the socket, and the terminal if nobody took it."""
        self._close_socket()
        if self.master >= 0:
            os.close(self.master)
            self.master = -1
        self.ready.cancel()

    def _close_socket(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def _read(self) -> None:
        while True:
            try:
                data, fds, _flags, _address = socket.recv_fds(self._sock, 2048, 1)
            except BlockingIOError:
                return None
            except OSError:
                data, fds = b"", []
            if not data:
                return self._ended()
            self._take(data, fds)

    def _take(self, data: bytes, fds: list[int]) -> None:
        kind, text = data[:1], data[1:].decode("utf-8", "replace")
        for fd in fds:
            os.set_inheritable(fd, False)
            if kind == b"T" and self.master < 0:
                self.master = fd
            else:
                os.close(fd)
        if kind == b"P":
            self._pid = int(text)
        elif kind == b"E":
            code, error, message = text.split(" ", 2)
            self.error = AgentError(_reason(int(code), int(error)), message, exit_code=int(code))
        if self._pid and (not self._tty or self.master >= 0) and not self.ready.done():
            self.ready.set_result(self._pid)

    def _ended(self) -> None:
        """End of file: the program has been executed, or there will be none."""
        self._close_socket()
        if self.ready.done():
            return
        if self._pid:
            self.ready.set_result(self._pid)
        else:
            self.ready.set_exception(self.error or AgentError(INTERNAL, "hv-exec ended and said nothing"))


def _reason(code: int, error: int) -> str:
    """hv-exec's exit code and errno as a word of the protocol."""
    if code == 127:
        return NOT_FOUND
    if error in (errno.EAGAIN, errno.ENOMEM):
        return EXHAUSTED
    return CONFLICT if error == errno.ESRCH else INVALID


class Process:
    """A process being executed, with the agent's ends of its streams.

    :param pidfd: of the first process of the container that it joins; -1 for one beside the containers
    """

    def __init__(self, request: bytes, pidfd: int, *, tty: bool, stdin: bool) -> None:
        self.outputs: list[tuple[FrameType, int]] = []
        self.stdin = -1
        self._theirs: list[int] = []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.report = Report(ours, tty)
        try:
            with theirs:
                self.helper = self._spawn(request, pidfd, theirs.fileno(), tty, stdin)
        except BaseException:
            self.close()
            raise
        finally:
            for fd in self._theirs:
                os.close(fd)

    def _spawn(self, request: bytes, pidfd: int, report: int, tty: bool, stdin: bool) -> int:
        memory = os.memfd_create("exec", os.MFD_CLOEXEC)
        self._theirs.append(memory)
        os.write(memory, request)
        stdio = self._null() if tty else self._pipes(stdin)
        keep = tuple(fd for fd in (memory, report, pidfd) if fd >= 0)
        return spawn([HV_EXEC, str(memory), str(report)], stdio, keep)

    def _null(self) -> tuple[int, int, int]:
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._theirs.append(null)
        return null, null, null

    def _pipes(self, stdin: bool) -> tuple[int, int, int]:
        if stdin:
            first, self.stdin = os.pipe2(os.O_CLOEXEC)
        else:
            first = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self._theirs.append(first)
        for kind in (FrameType.STDOUT, FrameType.STDERR):
            ours, theirs = os.pipe2(os.O_CLOEXEC)
            self.outputs.append((kind, ours))
            self._theirs.append(theirs)
        return first, self._theirs[-2], self._theirs[-1]

    def take_terminal(self, stdin: bool) -> None:
        """The terminal has come: it is the process's output, and its input too."""
        master, self.report.master = self.report.master, -1
        self.outputs.append((FrameType.STDOUT, master))
        if stdin:
            self.stdin = os.dup(master)

    def close(self) -> None:
        """Closes what nobody took."""
        self.report.close()
        for _kind, fd in self.outputs:
            os.close(fd)
        self.outputs = []
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1


class Session:
    """A client and its process: input, output, end."""

    def __init__(self, connection: Connection, process: Process, pid: int, status: asyncio.Future[int]) -> None:
        self._connection = connection
        self._pid = pid
        self._status = status
        self._report = process.report
        self._tty = len(process.outputs) == 1
        self._stdin = PipeWriter(process.stdin) if process.stdin >= 0 else None
        process.stdin = -1
        self._pumps = [self._pump(kind, fd) for kind, fd in process.outputs]
        process.outputs = []

    def _pump(self, kind: FrameType, fd: int) -> Pump:
        return Pump(fd, lambda data: self._connection.send(kind, data))

    def consume(self, frame: Frame) -> Awaitable[None] | None:
        """One frame of the client."""
        if frame.type is FrameType.STDIN:
            return self._take_input(frame.payload)
        if frame.type is FrameType.RESIZE:
            if self._tty:
                resize(self._pumps[0].fileno(), frame.payload)
        elif frame.type is FrameType.SIGNAL:
            if not self._status.done():  # not reaped: the pid is still its own
                send_signal(self._pid, frame.payload[0])
        else:
            raise invalid(f"{frame.type.name} frame in an exec")
        return None

    def _take_input(self, data: bytes) -> Awaitable[None] | None:
        if self._stdin is None:
            return None
        if data:
            return self._stdin.write(data)
        if not self._tty:  # a terminal has no half-close; its user ends it by typing
            self._stdin.close()
        return None

    async def finish(self) -> None:
        """Waits for the end of the process and delivers what it wrote."""
        status = await self._status
        self._report.read_rest()
        for pump in self._pumps:
            pump.drain()
        for pump in self._pumps:
            await pump.ended
        self._connection.end(**ending(status, self._report.error))

    def close(self) -> None:
        """Closes our ends of its streams."""
        if self._stdin is not None:
            self._stdin.close()
        for pump in self._pumps:
            pump.close()


def ending(status: int, error: AgentError | None) -> dict[str, Any]:
    """END's body for a wait status; an error of hv-exec's child comes before the program ever ran."""
    if error is not None:
        return {"exit_code": error.extra["exit_code"], "signal": None, "error": error.as_json()}
    return {"exit_code": exit_code(status), "signal": exit_signal(status), "error": None}


def resize(terminal: int, payload: bytes) -> None:
    """Sets a terminal's size; harmless for a negative descriptor or a terminal that has gone."""
    if terminal >= 0:
        columns, rows = wire.parse_resize(payload)
        with suppress(OSError):
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def send_signal(pid: int, number: int) -> None:
    """Sends a signal to a process that has not been reaped; an impossible number is ignored."""
    with suppress(ProcessLookupError, ValueError, OSError):
        os.kill(pid, number)


def parse_exec(args: dict[str, Any], engine: Engine) -> tuple[Container, ExecRequest, bool]:
    """The container, what to run in it, and whether its input is wanted.

    :raises AgentError: Invalid, NotFound, Conflict
    """
    fields = Fields(args, "exec")
    name = parse_name(fields, "container")
    argv = fields.texts("argv")
    variables = fields.take("env", dict, "an object of strings", {})
    cwd = fields.path_text("cwd", None)
    user = parse_user(fields, None)
    stdin, terminal = fields.flag("stdin"), parse_terminal(fields)
    fields.done()
    container = engine.running(name)
    env = [*container.spec.env, *_variables(variables)]
    check_command(argv, env, "exec")
    who = container.user if user is None else _resolve_in(container, user)
    return container, ExecRequest(argv, env, cwd or container.spec.cwd, who, terminal), stdin


def parse_terminal(fields: Fields) -> tuple[int, int] | None:
    """``tty``, ``columns`` and ``rows`` as `ExecRequest.terminal` has them."""
    size = fields.integer("columns", 0, high=65535), fields.integer("rows", 0, high=65535)
    return size if fields.flag("tty") else None


def _variables(variables: dict[str, Any]) -> list[str]:
    for name, value in variables.items():
        if not name or "=" in name or "\0" in name or not isinstance(value, str) or "\0" in value:
            raise invalid(f"exec.env: {name[:80]!r} must be a variable's name with a string as its value")
    return [f"{name}={value}" for name, value in variables.items()]


def _resolve_in(container: Container, user: User | str) -> User:
    root = container.root.open()
    try:
        return resolve(user, read_in_root(root, "etc/passwd"), read_in_root(root, "etc/group"))
    finally:
        os.close(root)


class Spawned(NamedTuple):
    """A new process in a container: its streams and report, its pid, and the future of its wait status."""

    process: Process
    pid: int
    status: asyncio.Future[int]


def spawn_in(
    container: Container, request: ExecRequest, reaper: Reaper, *, stdin: bool = False
) -> AbstractAsyncContextManager[Spawned]:
    """Executes `request` in a running container; see `spawn_with`."""
    return spawn_with(container.exec_prefix, container.pidfd, request, reaper, stdin=stdin)


@asynccontextmanager
async def spawn_with(
    prefix: bytes, pidfd: int, request: ExecRequest, reaper: Reaper, *, stdin: bool
) -> AsyncIterator[Spawned]:
    """Executes `request`; streams that nobody has taken are closed on the way out.

    :param prefix: hv-exec's records of where it is to run
    :param pidfd: see `Process`
    :raises AgentError: there is no new process
    """
    tty = request.terminal is not None
    with reaper.expecting():
        process = Process(encode(prefix, request), pidfd, tty=tty, stdin=stdin)
        reaper.watch(process.helper)
        try:
            process.report.wait_a_little()
            pid = await process.report.ready  # always comes: a container that ends takes hv-exec with it
            status = reaper.watch(pid)
        except BaseException:
            process.close()
            raise
    try:
        if process.report.master >= 0:
            process.take_terminal(stdin)
        yield Spawned(process, pid, status)
    finally:
        process.close()


async def run_exec(args: dict[str, Any], connection: Connection, engine: Engine, reaper: Reaper) -> None:
    """The call."""
    container, request, stdin = parse_exec(args, engine)
    async with spawn_in(container, request, reaper, stdin=stdin) as spawned:
        await converse(connection, spawned)


async def converse(connection: Connection, spawned: Spawned) -> None:
    """Accepts the call and joins client and process until the process has ended."""
    connection.accept({"pid": spawned.pid})
    session = Session(connection, spawned.process, spawned.pid, spawned.status)
    try:
        connection.consume(session.consume)
        await session.finish()
    finally:
        session.close()
