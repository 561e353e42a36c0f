"""One streaming session, whatever the client's protocol: the client's channels on one side, the agent on the other.

Theory of operation
-------------------
Two pumps run for as long as the session does. *Up* carries stdin, its end and terminal sizes from the client to the
agent; *down* carries output to the client and, last, how the process ended. Each pump holds at most one message: it
reads the next only when the other side has taken the last, so a slow client stops the process in the guest and a
process that does not read stops the client.

The session ends when the agent says END (the client gets a status), when the client goes away (the agent sees the
connection close), or when the agent's connection breaks (the client gets a failure status). The end of one pump ends
the other; nothing outlives `run`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from hypervisor.agent.wire import FrameType
from hypervisor.errors import HvError
from hypervisor.introspect.agent import AgentStream, Ending


@dataclass(frozen=True)
class Stdin:
    """Bytes that the client typed; empty data is never sent."""

    data: bytes


@dataclass(frozen=True)
class StdinEnd:
    """The client half-closed its standard input."""


@dataclass(frozen=True)
class Resize:
    """The client's terminal has a new size, in characters."""

    columns: int
    rows: int


ClientEvent = Stdin | StdinEnd | Resize


class ClientChannels(Protocol):
    """A client's side of a session; one implementation a protocol."""

    def events(self) -> AsyncIterator[ClientEvent]:
        """What the client sends; ends when the client has gone."""

    async def send_stdout(self, data: bytes) -> None:
        """Waits while the client does not read; raises `OSError` when it has gone."""

    async def send_stderr(self, data: bytes) -> None:
        """As `send_stdout`."""

    async def send_ending(self, ending: Ending) -> None:
        """The status, and the orderly end of the client's connection."""


def _unchanged(ending: Ending) -> Ending:
    return ending


async def run(
    client: ClientChannels, agent: AgentStream, told: Callable[[Ending], Ending] = _unchanged
) -> Ending | None:
    """Runs a session to its end.

    :param told: what the client is told for how the process ended
    :returns: how the process ended; None when the client went away first
    """
    up = asyncio.create_task(_pump_up(client, agent), name="session-up")
    down = asyncio.create_task(_pump_down(client, agent), name="session-down")
    try:
        await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        if not down.done():
            return None  # the client has gone; whoever opened the agent's stream closes it
        ending = down.result()
        if ending is not None:
            await client.send_ending(told(ending))
        return ending
    except OSError:
        return None
    finally:
        for task in (up, down):
            task.cancel()
        await asyncio.gather(up, down, return_exceptions=True)


async def _pump_up(client: ClientChannels, agent: AgentStream) -> None:
    try:
        async for event in client.events():
            match event:
                case Stdin(data):
                    await agent.send_stdin(data)
                case StdinEnd():
                    await agent.close_stdin()
                case Resize(columns, rows):
                    await agent.resize(columns, rows)
    except HvError:
        # The agent's side broke: the other pump sees the same and reports it to the client.
        await asyncio.Event().wait()


async def _pump_down(client: ClientChannels, agent: AgentStream) -> Ending | None:
    try:
        async for frame in agent.frames():
            if frame.type is FrameType.STDOUT:
                await client.send_stdout(frame.payload)
            elif frame.type is FrameType.STDERR:
                await client.send_stderr(frame.payload)
    except HvError as e:
        return Ending(exit_code=255, error=e)
    except OSError:
        return None
    return agent.ending
