"""QEMU's control socket: a thin, typed face of `qemu.qmp`.

It adds what a host daemon needs: a time-out on every command, errors of this package's tree, events in bounded queues
(the package keeps every event for ever), and an end of file that is no error by itself, for QEMU ends with one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.protocol import StateError

from hypervisor.errors import Conflict, ProtocolError, Timeout, Unavailable

COMMAND_TIMEOUT_S = 10.0
#: events that a slow subscriber may be behind; older ones are dropped
EVENT_BACKLOG = 256
#: longest line that QEMU may send; query-qmp-schema answers with some 200 KiB
_LINE_LIMIT = 4 << 20

_quiet = logging.getLogger(f"{__name__}.client")
_quiet.setLevel(logging.CRITICAL + 1)  # it logs what it also raises; we report that once, where it is handled


class _Client(QMPClient):
    logger = _quiet


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """``time_ns`` is the host's wall clock when QEMU sent it."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)
    time_ns: int = 0


class Qmp:
    """A connection to one QEMU. Made by `connect`, ended by `close`; commands raise `Unavailable` once it is lost."""

    def __init__(self, client: QMPClient, name: str) -> None:
        self._client = client
        self._name = name
        self._disconnecting = asyncio.Lock()
        self._queues: set[asyncio.Queue[QmpEvent | None]] = set()
        #: the last events, oldest first: how a VM ended is told by its SHUTDOWN, which comes just before the end of
        #: file
        self.recent: deque[QmpEvent] = deque(maxlen=32)
        self._ended = asyncio.create_task(self._wait_end(), name=f"qmp {name}")
        # The filter sees each event and keeps none, so that the package's own endless history stays empty.
        client.events.event_filter = self._on_event

    @classmethod
    async def connect(cls, path: Path, *, name: str, timeout: float = COMMAND_TIMEOUT_S) -> Qmp:
        """Connect and negotiate.

        :raises Timeout: no greeting within `timeout` seconds
        :raises Unavailable: nothing listens there, or it hung up
        """
        client = _Client(name, readbuflen=_LINE_LIMIT)
        try:
            async with asyncio.timeout(timeout):
                await client.connect(str(path))
        except TimeoutError as e:
            raise Timeout(f"QEMU of VM {name} did not answer on its QMP socket within {timeout:g} s") from e
        except (QMPError, OSError, EOFError) as e:
            raise Unavailable(f"cannot reach QEMU of VM {name} on its QMP socket: {_root(e)}") from e
        return cls(client, name)

    @property
    def connected(self) -> bool:
        """Whether commands can be sent."""
        return self._client.runstate is Runstate.RUNNING

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND_TIMEOUT_S
    ) -> Any:
        """Run one QMP command; its result as parsed JSON.

        :raises Conflict: QEMU refused it; the message is QEMU's
        :raises Timeout: no answer within `timeout` seconds (a stopped or hung QEMU)
        :raises Unavailable: the connection is lost
        """
        try:
            async with asyncio.timeout(timeout):
                return await self._client.execute(command, arguments)
        except TimeoutError as e:
            raise Timeout(f"QEMU of VM {self._name} did not answer {command} within {timeout:g} s") from e
        except ExecuteError as e:
            raise Conflict(f"QEMU of VM {self._name} refused {command}: {e}") from e
        except (ExecInterruptedError, StateError) as e:
            raise Unavailable(f"the connection to QEMU of VM {self._name} is lost; {command} was not answered") from e
        except QMPError as e:
            raise ProtocolError(f"QEMU of VM {self._name} answered {command} with no QMP reply") from e

    async def give_fd(self, name: str, fd: int, *, fdset: int | None = None) -> None:
        """Hands over a duplicate of `fd`: under `name` (``getfd``), or into a set, where `name` is for people
        (``add-fd``). Raises as `execute`.
        """
        self._client.send_fd_scm(fd)
        if fdset is None:
            await self.execute("getfd", {"fdname": name})
        else:
            await self.execute("add-fd", {"fdset-id": fdset, "opaque": name})

    async def status(self) -> str:
        """QEMU's RunState: ``running``, ``paused``, ``io-error``, ``shutdown`` ..."""
        return str((await self.execute("query-status"))["status"])

    async def commands(self) -> frozenset[str]:
        """Commands that this QEMU has: what newer releases added is used only where it shows here."""
        schema = await self.execute("query-qmp-schema")
        return frozenset(entry["name"] for entry in schema if entry.get("meta-type") == "command")

    async def events(self) -> AsyncIterator[QmpEvent]:
        """Events from now on, until the connection ends. A reader that is `EVENT_BACKLOG` behind loses the oldest."""
        queue: asyncio.Queue[QmpEvent | None] = asyncio.Queue(EVENT_BACKLOG)
        if self._ended.done():
            return
        self._queues.add(queue)
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._queues.discard(queue)

    async def wait_closed(self) -> None:
        """Until the connection has ended, whoever ended it."""
        await asyncio.wait([self._ended])

    async def close(self) -> None:
        """Hang up; harmless when repeated. QEMU goes on and takes the next connection."""
        await self._disconnect()
        await self.wait_closed()

    async def _wait_end(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        await self._disconnect()
        for queue in self._queues:
            _put(queue, None)

    async def _disconnect(self) -> None:
        async with self._disconnecting:  # the package breaks when two disconnect at once
            if self._client.runstate is not Runstate.IDLE:
                with suppress(QMPError, OSError, EOFError):  # the reason that ended it; an end of file as a rule
                    await self._client.disconnect()

    def _on_event(self, message: Mapping[str, Any]) -> bool:
        stamp = message.get("timestamp", {})
        time_ns = int(stamp.get("seconds", 0)) * 10**9 + int(stamp.get("microseconds", 0)) * 1000
        event = QmpEvent(str(message["event"]), message.get("data", {}), time_ns)
        self.recent.append(event)
        for queue in self._queues:
            _put(queue, event)
        return False


def _put(queue: asyncio.Queue[QmpEvent | None], event: QmpEvent | None) -> None:
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(event)


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    exc = getattr(error, "exc", None)
    return str(exc or error) or type(error).__name__
