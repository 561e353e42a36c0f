"""Connections to pod VM agents, kept for the next call.

Theory of operation
-------------------
Connecting takes a quarter to a half of a call that does little, most of it the guest's time under TCG. So a connection
whose unary call was answered is *idle* for `IDLE_S` seconds, and the next unary call to that VM takes it::

    connected --answered--> idle --the next call--> in use --answered--> idle
        |                    +--time, too many of them, closed by the VM's side--> closed
        +--refused, broken, given up, timed out--> closed

Each call has a connection to itself while it runs, so no call waits behind another. What a device process leaves when
it ends (its VM's end, or another takes over) is the end of the stream, which is seen before a call is tried on it. A
call that breaks in the middle is not tried again: whether it took effect is unknown, as on a connection of its own.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypervisor.vsock.address import VsockAddress

if TYPE_CHECKING:
    from hypervisor.introspect.agent import AgentStream

IDLE_S = 15.0
"""Longer than the usual time between two probes of a container."""
MAX_IDLE = 4
"""Idle connections to one VM; those beyond it are closed."""


@dataclass(eq=False, slots=True)
class _Idle:
    stream: AgentStream
    timer: asyncio.TimerHandle


class KeptConnections:
    """The idle connections of all VMs of a host. One event loop; `close` ends them all."""

    def __init__(self) -> None:
        self._idle: dict[VsockAddress, list[_Idle]] = {}
        self._closed = False

    def take(self, address: VsockAddress) -> AgentStream | None:
        """The connection used last of those that still stand; the caller's from now on. None: there is none."""
        while idle := self._idle.get(address):
            stream = idle[-1].stream
            self._forget(address, stream)
            if stream.alive:
                return stream
            stream.abort()
        return None

    def give(self, address: VsockAddress, stream: AgentStream) -> None:
        """Keeps a connection on which no call is under way, or closes it; it is no longer the caller's."""
        if self._closed or not stream.alive or len(self._idle.get(address, ())) >= MAX_IDLE:
            stream.abort()
            return
        loop = asyncio.get_running_loop()
        timer = loop.call_later(IDLE_S, self._expire, address, stream)
        self._idle.setdefault(address, []).append(_Idle(stream, timer))

    def close(self) -> None:
        """Closes what is idle; what is given back later is closed too."""
        self._closed = True
        for address, idle in list(self._idle.items()):
            for one in list(idle):
                self._expire(address, one.stream)

    def __len__(self) -> int:
        return sum(len(idle) for idle in self._idle.values())

    def _expire(self, address: VsockAddress, stream: AgentStream) -> None:
        self._forget(address, stream)
        stream.abort()

    def _forget(self, address: VsockAddress, stream: AgentStream) -> None:
        idle = self._idle[address]
        one = next(i for i in idle if i.stream is stream)
        one.timer.cancel()
        idle.remove(one)
        if not idle:
            del self._idle[address]
