"""The pause process: PID 1 of the PID namespace that a pod's containers share (csrc/exec/pause.c)."""

from __future__ import annotations

import asyncio
import socket

from .exec import HV_EXEC, Report
from .launch import spawn
from .reaper import Reaper
from .server import complain


async def start_pause(reaper: Reaper) -> int:
    """Starts it; gives its pid.

    :raises AgentError: it could not be started
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    report = Report(ours, False)
    try:
        with theirs, reaper.expecting(), open("/dev/null", "r+b") as null:
            stdio = (null.fileno(), null.fileno(), 2)
            reaper.watch(spawn([HV_EXEC, "pause", str(theirs.fileno())], stdio, (theirs.fileno(),)))
            theirs.close()
            pid = await report.ready
            reaper.watch(pid).add_done_callback(_ended)
            return pid
    finally:
        report.close()


def _ended(status: asyncio.Future[int]) -> None:
    if not status.cancelled():
        complain(f"the pause process ended with wait status {status.result()}")
