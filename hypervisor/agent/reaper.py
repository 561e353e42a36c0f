"""Children and orphans: the only place that waits for processes.

As PID 1 the agent inherits every orphan of the guest, so it waits for *any* child. Whoever wants to know how a process
ended watches its pid:

- a process that the agent spawned itself is watched in the same turn of the event loop, before it can be reaped;
- a process that a helper made for us (crun's container, hv-exec's child) has a pid that we learn later. It may have
  ended by then. So while someone is `expecting` such a pid, the statuses of unknown pids are kept.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from .syscalls import signal_descriptor

MAX_UNCLAIMED = 4096


class Reaper:
    """Reaps all children of this process. Bound to one event loop; not thread-safe."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watched: dict[int, asyncio.Future[int]] = {}
        self._unclaimed: dict[int, int] = {}
        self._expecting = 0
        # Not loop.add_signal_handler(): that takes two turns of the loop and two writes to itself for each signal.
        self._old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        self._signals = signal_descriptor(signal.SIGCHLD)
        loop.add_reader(self._signals, self._signalled)

    def close(self) -> None:
        """Stops listening; watchers are cancelled."""
        self._loop.remove_reader(self._signals)
        os.close(self._signals)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._old_mask)
        for future in self._watched.values():
            future.cancel()
        self._watched.clear()

    def watch(self, pid: int) -> asyncio.Future[int]:
        """A future of the wait status of `pid` (see `os.waitstatus_to_exitcode`)."""
        future: asyncio.Future[int] = self._loop.create_future()
        status = self._unclaimed.pop(pid, None)
        if status is None:
            self._watched[pid] = future
        else:
            future.set_result(status)
        return future

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """While open, the end of a process that nobody watches yet is kept for a later `watch`."""
        self._expecting += 1
        try:
            yield
        finally:
            self._expecting -= 1
            if not self._expecting:
                self._unclaimed.clear()

    def _signalled(self) -> None:
        os.read(self._signals, 4096)
        self.reap()

    def reap(self) -> None:
        """Takes every ended child's status."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._ended(pid, status)

    def _ended(self, pid: int, status: int) -> None:
        future = self._watched.pop(pid, None)
        if future is not None:
            if not future.done():
                future.set_result(status)
        elif self._expecting and len(self._unclaimed) < MAX_UNCLAIMED:
            self._unclaimed[pid] = status


def exit_code(status: int) -> int:
    """A wait status as a shell's exit code: 128 + n for a process that signal n ended."""
    if os.WIFSIGNALED(status):
        return 128 + os.WTERMSIG(status)
    return os.WEXITSTATUS(status)


def exit_signal(status: int) -> int | None:
    """The signal that ended the process, if one did."""
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
