"""An idle guest gives back what QEMU translated for it.

Theory of operation
-------------------
TCG keeps all code that it ever translated, some 45 MiB after a start, most of it code that ran once. The library in a
clone's QEMU throws it away when it gets a signal (csrc/memory/preload_trim.c); what runs next is translated anew, which
makes the next command in the guest some 0.2 s slower, once. So it is done for guests that idle, and seldom::

    WATCHING --little CPU time for `idle_s`, and `WORTH_BYTES` grown since the last time--> signal, `idle_s` doubles
        ^------------------------------------------------------------------------------------------------'

A guest that wakes now and then, for a probe say, and idles between is so trimmed less and less often. Clones that wait
in the warm pool are not trimmed: what they have translated is what they are for.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from hypervisor.vmx.process import ProcessId

log = structlog.get_logger(__name__)

#: as PV_TRIM_SIGNAL in csrc/memory/preload.h
SIGNAL = signal.SIGRTMIN + 6
LOOK_S = 5.0
IDLE_S = 20.0
MOST_IDLE_S = 3600.0
#: of one CPU. A guest that does nothing takes 0.5 %, one command a second 5 %
IDLE_CPU = 0.01
WORTH_BYTES = 8 << 20
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Look:
    """What is seen of a process: seconds of CPU time, and bytes of private memory."""

    cpu_s: float
    private_bytes: int

    @classmethod
    def at(cls, pid: int) -> Look | None:
        """Now; None when it has ended."""
        try:
            times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            status = dict(x.split(":", 1) for x in Path(f"/proc/{pid}/status").read_text().splitlines())
            private = int(status["RssAnon"].split()[0]) * 1024
        except (OSError, KeyError):
            return None
        return cls((int(times[11]) + int(times[12])) / _TICKS, private)


class IdleRule:
    """When to trim. Pure: told what is seen, and when (seconds, monotonic)."""

    def __init__(self, now: float, look: Look, idle_s: float = IDLE_S) -> None:
        self.idle_s = idle_s
        self._began, self._first = now, look
        self._least = 0

    def trims(self, now: float, look: Look) -> bool:
        """Whether it has idled long enough, and there is something to gain."""
        if look.cpu_s - self._first.cpu_s > IDLE_CPU * self.idle_s:
            self._began, self._first = now, look
            return False
        return now - self._began >= self.idle_s and look.private_bytes >= self._least + WORTH_BYTES

    def trimmed(self, now: float, look: Look) -> None:
        """It was done; this is what was left."""
        self.idle_s = min(2 * self.idle_s, MOST_IDLE_S)
        self._began, self._first = now, look
        self._least = look.private_bytes


def takes_signal(pid: int) -> bool:
    """Whether the library in that QEMU waits for the signal; to another process it would be the end.

    Its first thread, which is looked at, has it blocked; only the one that waits shows it as not blocked meanwhile.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    blocked = next((int(line.split()[1], 16) for line in lines if line.startswith("SigBlk:")), 0)
    return bool(blocked >> (SIGNAL - 1) & 1)


async def trim_when_idle(qemu: ProcessId, name: str, done: Callable[[], None], idle_s: float = IDLE_S) -> None:
    """Trims that QEMU whenever it is time, until it ends or this is cancelled. `done` is called after each time."""
    clock = asyncio.get_running_loop().time
    look = Look.at(qemu.pid)
    if look is None or not takes_signal(qemu.pid):
        return
    rule = IdleRule(clock(), look, idle_s)
    while (look := Look.at(qemu.pid)) is not None:
        if rule.trims(clock(), look):
            if not qemu.signal(SIGNAL):
                return
            await asyncio.sleep(LOOK_S)
            left = Look.at(qemu.pid) or look
            rule.trimmed(clock(), left)
            done()
            log.info("idle guest trimmed", vm=name, before=look.private_bytes, after=left.private_bytes)
        await asyncio.sleep(LOOK_S)
