"""One process, watched by pidfd: its end is seen at once, also when it is not our child (an adopted VM's).

States: ALIVE -> DEAD. A `ProcessWatch` holds its pidfd from `open` to `close`; no signal can reach a successor of the
same number.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import signal
import struct

from hypervisor.errors import NotFound
from hypervisor.vmx.process import ProcessId, start_time_of

# linux/pidfd.h: PIDFD_GET_INFO, _IOWR(0xFF, 11, struct pidfd_info) of 64 bytes; PIDFD_INFO_EXIT since Linux 6.15
_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO_EXIT = 1 << 3
_INFO_SIZE = 64
_EXIT_CODE = 60


class ProcessWatch:
    """Made by `open`; use within one event loop."""

    def __init__(self, process: ProcessId, pidfd: int) -> None:
        self.process = process
        self._pidfd = pidfd
        self._status: int | None = None
        self._reaped = False
        self._dead: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(pidfd, self._on_exit)

    @classmethod
    def open(cls, process: ProcessId) -> ProcessWatch:
        """Watch `process`.

        :raises NotFound: it has ended
        """
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError as e:
            raise NotFound(f"there is no process {process.pid}") from e
        try:
            # Read after the pidfd pinned it: the number cannot change hands between.
            if start_time_of(process.pid) != process.start_time:
                raise NotFound(f"process {process.pid} is another one by now")
            return cls(process, pidfd)
        except BaseException:
            os.close(pidfd)
            raise

    @property
    def alive(self) -> bool:
        """Whether it still runs, as of now."""
        if not self._dead.done() and readable(self._pidfd):
            self._on_exit()
        return not self._dead.done()

    async def wait(self) -> None:
        """Until it has ended; several may wait."""
        await asyncio.wait([self._dead])

    def status(self) -> int | None:
        """How it ended, as `os.waitpid` has it; None: unknown (not our child, and a kernel before 6.15)."""
        return self._status

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens when it has ended."""
        if not self._dead.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.signal(signal.SIGKILL)
        await self.wait()

    def close(self) -> None:
        """Stop watching; the process is left alone. Harmless when repeated."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_exit(self) -> None:
        if self._dead.done():
            return
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._status = self._reap()
        self._dead.set_result(None)

    def _reap(self) -> int | None:
        with contextlib.suppress(ChildProcessError):
            pid, status = os.waitpid(self.process.pid, os.WNOHANG)
            if pid:
                return status
        info = bytearray(struct.pack("=Q", _PIDFD_INFO_EXIT).ljust(_INFO_SIZE, b"\0"))
        try:
            fcntl.ioctl(self._pidfd, _PIDFD_GET_INFO, info)
        except OSError:
            return None
        (mask,) = struct.unpack_from("=Q", info)
        return int(struct.unpack_from("=i", info, _EXIT_CODE)[0]) if mask & _PIDFD_INFO_EXIT else None


def readable(fd: int) -> bool:
    """Whether a descriptor can be read now. By poll: select cannot take descriptors from 1024 on, which a host with
    some hundred sessions has."""
    waiting = select.poll()
    waiting.register(fd, select.POLLIN)
    return bool(waiting.poll(0))


def describe_status(status: int | None) -> str:
    """``was killed (signal 9)``, ``exited with status 1``, ``ended``."""
    if status is None:
        return "ended"
    if os.WIFSIGNALED(status):
        return f"was killed (signal {os.WTERMSIG(status)})"
    return f"exited with status {os.WEXITSTATUS(status)}"
