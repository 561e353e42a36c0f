"""``debug``: a process in the guest itself, beside the containers and with all of its rights.

It sees what the agent sees: every process of the guest, the pod's network namespace, the agent's root (read-only; a
busybox is in it), the containers' files below ``/proc/PID/root``. It is born in a control group of its own, and what it
started ends with it: nothing of a debugging session stays in a guest. When memory is short it is the first to go.
"""

from __future__ import annotations

import asyncio
import errno
import os
from itertools import count
from typing import Any

from .caps import NAMES, mask
from .cgroup import Cgroup
from .exec import converse, parse_terminal, spawn_with
from .exec_request import ExecRequest
from .fields import Fields, check_command
from .reaper import Reaper
from .server import Connection
from .spec import User

_OOM_SCORE = 1000
_END_TRIES = 3000  # half a minute under emulation at the least
_HOME = "/root"
_numbers = count(1)
_ending: set[asyncio.Future[None]] = set()


async def run_debug(args: dict[str, Any], connection: Connection, reaper: Reaper) -> None:
    """The call."""
    fields = Fields(args, "debug")
    argv = fields.texts("argv")
    stdin, terminal = fields.flag("stdin"), parse_terminal(fields)
    fields.done()
    check_command(argv, [], "debug")
    request = ExecRequest(argv, [], "/", User(0, 0, (), _HOME), terminal)
    group = DebugGroup(next(_numbers))
    await group.make()
    try:
        async with spawn_with(group.prefix(), -1, request, reaper, stdin=stdin) as spawned:
            await converse(connection, spawned)
    finally:
        # A task of its own: the client that has its answer closes the connection, and this call is cancelled.
        ending = asyncio.ensure_future(group.end())
        _ending.add(ending)
        ending.add_done_callback(_ending.discard)
        await asyncio.shield(ending)


class DebugGroup(Cgroup):
    """The control group of one session, beside those of privileged containers: no device is out of reach."""

    def __init__(self, number: int) -> None:
        super().__init__(f"debug.{number}", privileged=True)  # no container's name has a dot

    async def make(self) -> None:
        """Makes it, and its parent where no container has needed one yet."""
        os.makedirs(self.directory, exist_ok=True)

    async def end(self) -> None:
        """Kills what is in it, again and again until nothing is, and removes it.

        :raises OSError: a process in it does not die
        """
        for left in range(_END_TRIES, -1, -1):
            self.kill()
            try:
                os.rmdir(self.directory)
                return
            except FileNotFoundError:
                return
            except OSError as e:
                if e.errno != errno.EBUSY or not left:
                    raise
            await asyncio.sleep(0.01)

    def prefix(self) -> bytes:
        """hv-exec's records: every capability, no filter, no namespace to join."""
        everything = f"{mask(list(NAMES)):x}"
        records = [
            "guest=1",
            f"cgroup={self.directory}",
            f"caps={everything},{everything},{everything},0,0",
            f"oom={_OOM_SCORE}",
        ]
        return "".join(f"{record}\0" for record in records).encode()
