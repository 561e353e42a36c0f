"""Processes named so that a name never means another one: by pid and start time, signalled and awaited through a
pidfd.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal as signals
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hypervisor.errors import NotFound

_START_TIME_FIELD = 22 - 3
"""proc(5), ``stat``, counted after the parenthesised name, which may itself hold spaces and parentheses."""


def start_time_of(pid: int) -> int:
    """When the process began, in clock ticks since boot. Raises `NotFound`."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NotFound(f"there is no process {pid}") from error
    return int(text.rpartition(")")[2].split()[_START_TIME_FIELD])


@dataclass(frozen=True)
class ProcessId:
    """One process for ever: a pid that was given to another process later is not this one.

    :param start_time: clock ticks since boot, as in ``/proc/PID/stat``. It means nothing after a reboot: keep the
    boot id with it.
    """

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> Self:
        """The process that has this pid now. Raises `NotFound`."""
        return cls(pid, start_time_of(pid))

    @contextlib.contextmanager
    def _pidfd(self) -> Iterator[int | None]:
        """A descriptor of exactly this process while it has not been reaped, or None.

        The start time is looked at after the descriptor was opened, so that both are of the same process.
        """
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            yield None
            return
        try:
            yield fd if self._same() else None
        finally:
            os.close(fd)

    def _same(self) -> bool:
        try:
            return start_time_of(self.pid) == self.start_time
        except NotFound:
            return False

    def alive(self) -> bool:
        """Whether it runs. A zombie does not."""
        with self._pidfd() as fd:
            return fd is not None and not _ended(fd)

    def signal(self, number: int) -> bool:
        """Sends a signal to exactly this process. False when it has ended.

        :raises PermissionError: it belongs to somebody else
        """
        with self._pidfd() as fd:
            if fd is None or _ended(fd):
                return False
            try:
                signals.pidfd_send_signal(fd, number)
            except ProcessLookupError:
                return False
            return True

    def kill(self) -> bool:
        """`signal` with SIGKILL."""
        return self.signal(signals.SIGKILL)

    async def wait_exit(self) -> None:
        """Returns when it has ended, whoever its parent is. Polls nothing."""
        loop = asyncio.get_running_loop()
        with self._pidfd() as fd:
            if fd is None or _ended(fd):
                return
            ended = asyncio.Event()
            loop.add_reader(fd, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(fd)


def _ended(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))
