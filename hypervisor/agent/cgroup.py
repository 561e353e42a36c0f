"""A container's control group (v2): limits, accounting, freezing, killing."""

from __future__ import annotations

import asyncio
import errno
import os
from contextlib import suppress

from .spec import Resources

ROOT = "/sys/fs/cgroup"
PARENT = "/podvisor"
PRIVILEGED_PARENT = "/podvisor-privileged"  # beyond what devices.py attaches to the other
_REMOVE_TRIES = 200


def read_text(path: str) -> str:
    """A small file's text; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 65536).decode("ascii", "replace")
    finally:
        os.close(fd)


def write_text(path: str, text: str) -> None:
    """Writes a kernel file in one write; raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def parse_pairs(text: str) -> dict[str, int]:
    """``name number`` lines, as in memory.events and cpu.stat."""
    rows = (line.split() for line in text.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def weight_of(shares: int) -> int:
    """cgroup v1 CPU shares as a v2 weight, by the formula that Kubernetes uses."""
    return 1 + (shares - 2) * 9999 // 262142


class Cgroup:
    """The group of the container `name`. Holds nothing; methods raise OSError where the kernel refuses."""

    def __init__(self, name: str, privileged: bool = False) -> None:
        self.path = f"{PRIVILEGED_PARENT if privileged else PARENT}/{name}"  # as crun takes it
        self.directory = f"{ROOT}{self.path}"  # as everybody else does

    def kill(self) -> None:
        """SIGKILL to every process in it; harmless when it is gone."""
        with suppress(FileNotFoundError):
            write_text(f"{self.directory}/cgroup.kill", "1")

    def pids(self) -> list[int]:
        """Every process in it."""
        try:
            return [int(line) for line in read_text(f"{self.directory}/cgroup.procs").split()]
        except FileNotFoundError:
            return []

    async def freeze(self, frozen: bool) -> None:
        """Freezes or thaws, and waits until that is so (at most 2 s).

        :raises OSError: it did not happen in time
        """
        write_text(f"{self.directory}/cgroup.freeze", "1" if frozen else "0")
        for _ in range(200):
            if parse_pairs(read_text(f"{self.directory}/cgroup.events")).get("frozen") == int(frozen):
                return
            await asyncio.sleep(0.01)
        raise OSError(errno.ETIMEDOUT, "its processes did not stop in time")

    def thaw(self) -> None:
        """Lets frozen processes go on, without waiting; harmless when it is gone."""
        with suppress(FileNotFoundError):
            write_text(f"{self.directory}/cgroup.freeze", "0")

    def oom_kills(self) -> int:
        """Processes of the group that the kernel killed for want of memory."""
        try:
            return parse_pairs(read_text(f"{self.directory}/memory.events")).get("oom_kill", 0)
        except OSError:
            return 0

    def update(self, resources: Resources) -> None:
        """Sets every limit; an absent one is lifted."""
        memory = "max" if resources.memory_bytes is None else str(resources.memory_bytes)
        quota = "max" if resources.cpu_quota_us is None else str(resources.cpu_quota_us)
        weight = 100 if resources.cpu_shares is None else weight_of(resources.cpu_shares)
        self._write("memory.max", memory)
        self._write("cpu.max", f"{quota} 100000")
        self._write("cpu.weight", str(weight))
        self._write("pids.max", "max" if resources.pids is None else str(resources.pids))

    def stats(self) -> dict[str, int]:
        """CPU time in ns, memory in bytes, processes; zeros for a group that is gone."""
        return {
            "cpu_ns": 1000 * parse_pairs(self._read("cpu.stat")).get("usage_usec", 0),
            "memory_bytes": self._number("memory.current"),
            "memory_peak": self._number("memory.peak"),
            "pids": self._number("pids.current"),
        }

    async def remove(self) -> None:
        """Removes the group once its last process is gone.

        :raises OSError: a process in it does not die
        """
        for left in range(_REMOVE_TRIES, -1, -1):
            try:
                os.rmdir(self.directory)
                return
            except FileNotFoundError:
                return
            except OSError as e:
                if e.errno != errno.EBUSY or not left:
                    raise
            await asyncio.sleep(0.01)

    def _write(self, name: str, text: str) -> None:
        write_text(f"{self.directory}/{name}", text)

    def _read(self, name: str) -> str:
        try:
            return read_text(f"{self.directory}/{name}")
        except OSError:
            return ""

    def _number(self, name: str) -> int:
        text = self._read(name).strip()
        return int(text) if text.isdigit() else 0
