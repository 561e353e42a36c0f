"""Starting a container: one invocation of crun, and what it leaves behind when the container has ended.

``crun run --detach`` makes the container's first process, writes its pid to a file and exits; the process then becomes
the agent's child (PID 1 inherits orphans). Everything else that crun could do later - exec, kill, pause, delete - the
agent does itself: each crun costs over 100 ms under TCG.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import sys
from contextlib import suppress

from .container import STDERR, STDOUT, Container
from .errors import INTERNAL, INVALID, NOT_FOUND, AgentError, from_os
from .reaper import Reaper, exit_code
from .storage import write_whole
from .streams import PipeWriter

CRUN = "/usr/bin/crun"
CRUN_STATE = "/run/podvisor/crun"
_RESET_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)  # which Python ignores
_MAX_MESSAGE = 4096
_NOT_FOUND_MARKS = ("executable file", "not found in $PATH", "No such file or directory")
_NOT_EXECUTABLE_MARKS = ("Permission denied", "Exec format error", "Is a directory", "Operation not permitted")


def spawn(
    argv: list[str], stdio: tuple[int, int, int], keep: tuple[int, ...] = (), env: dict[str, str] | None = None
) -> int:
    """Starts a program with these standard streams and, of all other descriptors, only `keep`; gives its pid."""
    actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(stdio)]
    actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in keep]  # onto itself: only clears close-on-exec
    return os.posix_spawn(
        argv[0], argv, {} if env is None else env, file_actions=actions, setsigdef=_RESET_SIGNALS, setsigmask=()
    )


class Pipes:
    """Both ends of a container's standard streams until crun has taken its own; then `hand_over`, else `close`."""

    def __init__(self, container: Container) -> None:
        self.theirs: list[int] = []
        self.ours: dict[str, int] = {}
        self._listener: socket.socket | None = None
        self.console = f"{container.root.directory}/console.sock"
        try:
            if container.spec.tty:
                self._open_console()
            else:
                self._open_pipes(container.spec.stdin)
        except OSError:
            self.close()
            raise

    def _open_console(self) -> None:
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.theirs = [null]
        errors, self._crun_errors = os.pipe2(os.O_CLOEXEC)
        self.ours["stderr"] = errors
        self.theirs.append(self._crun_errors)
        _unlink(self.console)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._listener.bind(self.console)
        self._listener.listen(1)

    def _open_pipes(self, stdin: bool) -> None:
        if stdin:
            read_end, self.ours["stdin"] = os.pipe2(os.O_CLOEXEC)
        else:
            read_end = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self.theirs.append(read_end)
        for name in ("stdout", "stderr"):
            self.ours[name], write_end = os.pipe2(os.O_CLOEXEC)
            self.theirs.append(write_end)

    @property
    def stdio(self) -> tuple[int, int, int]:
        """What crun gets."""
        if self._listener is not None:
            return self.theirs[0], self.theirs[0], self.theirs[1]
        return self.theirs[0], self.theirs[1], self.theirs[2]

    def close_theirs(self) -> None:
        """After the spawn: the agent must not hold the container's ends open."""
        for fd in self.theirs:
            os.close(fd)
        self.theirs = []

    def read_complaint(self) -> str:
        """What crun wrote to stderr before it failed; nothing of a container is in there."""
        fd = self.ours["stderr"]
        os.set_blocking(fd, False)
        try:
            return os.read(fd, _MAX_MESSAGE).decode("utf-8", "replace").strip()
        except OSError:
            return ""

    def hand_over(self, container: Container) -> None:
        """Gives our ends to the container's streams."""
        streams = container.streams
        if self._listener is not None:
            master = self._take_master()
            streams.stdin = PipeWriter(os.dup(master)) if container.spec.stdin else None
            streams.add_output(master, STDOUT)
        else:
            if "stdin" in self.ours:
                streams.stdin = PipeWriter(self.ours.pop("stdin"))
            streams.add_output(self.ours.pop("stdout"), STDOUT)
            streams.add_output(self.ours.pop("stderr"), STDERR)
        self.close()

    def _take_master(self) -> int:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        with connection:
            _data, control, _flags, _address = connection.recvmsg(64, socket.CMSG_SPACE(4))
        fds = array.array("i")
        for level, kind, data in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if len(fds) != 1:
            raise OSError("crun sent no terminal")
        os.set_inheritable(fds[0], False)
        return fds[0]

    def close(self) -> None:
        """Closes whatever is still here."""
        self.close_theirs()
        for fd in self.ours.values():
            os.close(fd)
        self.ours = {}
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            _unlink(self.console)


async def run_crun(container: Container, config: dict[str, object], reaper: Reaper) -> int:
    """Runs crun; gives the pid of the container's first process, whose streams the container then has.

    Call it with `reaper.expecting()` open, and watch the pid before it is closed.

    :raises AgentError: NotFound or Invalid with ``exit_code`` 127 or 126 for a program that cannot be executed
    """
    directory = container.root.directory
    try:
        text = json.dumps(config, ensure_ascii=False)  # not dump(), which is Python all the way
        write_whole(f"{directory}/config.json", text.encode("utf-8", "surrogateescape"))
        _unlink(f"{directory}/pid")
        pipes = Pipes(container)
    except OSError as e:
        raise from_os("the container's bundle", e) from e
    try:
        argv = _crun_argv(container, pipes)
        status = reaper.watch(spawn(argv, pipes.stdio, env={"PATH": "/usr/bin"}))
        pipes.close_theirs()
        code = exit_code(await status)
        if code:
            raise _explain(container, pipes.read_complaint(), code)
        with open(f"{directory}/pid", encoding="ascii") as f:
            pid = int(f.read())
        pipes.hand_over(container)
        return pid
    except OSError as e:
        raise from_os("crun", e) from e
    finally:
        pipes.close()


def _crun_argv(container: Container, pipes: Pipes) -> list[str]:
    directory = container.root.directory
    argv = [CRUN, "--root", CRUN_STATE, "--cgroup-manager", "cgroupfs", "run", "--detach"]
    argv += ["--bundle", directory, "--pid-file", f"{directory}/pid"]
    if container.spec.tty:
        argv += ["--console-socket", pipes.console]
    return [*argv, container.name]


def _explain(container: Container, complaint: str, code: int) -> AgentError:
    text = complaint or f"crun ended with {code} and said nothing"
    program = container.spec.argv[0]
    about_program = "executable" in text or "exec" in text or program in text
    if about_program and any(mark in text for mark in _NOT_FOUND_MARKS):
        return AgentError(
            NOT_FOUND, f"{program[:512]!r}: executable not found in the container ({text})", exit_code=127
        )
    if about_program and any(mark in text for mark in _NOT_EXECUTABLE_MARKS):
        return AgentError(INVALID, f"{program[:512]!r}: cannot be executed ({text})", exit_code=126)
    return AgentError(INTERNAL, f"the container could not be started: {text}", exit_code=128)


def forget(container: Container) -> None:
    """Removes crun's traces of a container that has ended; harmless when there are none."""
    directory = f"{CRUN_STATE}/{container.name}"
    try:
        for name in os.listdir(directory):
            os.unlink(f"{directory}/{name}")
        os.rmdir(directory)
    except FileNotFoundError:
        pass
    except OSError as e:
        sys.stderr.write(f"agent: {directory}: {e}\n")


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
