"""One streaming session, whatever the client's protocol: the client's channels on one side, the agent on the other.

Theory of operation
-------------------
Two pumps run for as long as the session does. *Up* carries stdin, its end and terminal sizes from the client to the
agent; *down* carries output to the client and, last, how the process ended. Each pump holds at most one message: it
reads the next only when the other side has taken the last, so a slow client stops the process in the guest and a
process that does not read stops the client.

The session ends when the agent says END (the client gets a status), when the client goes away (the agent sees the
connection close), or when the agent's connection breaks (the client gets a failure status). The end of one pump ends
the other, before the status is sent: from then on the client's input is its own side's to drop. Nothing outlives `run`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

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

    def events(self) -> AsyncGenerator[ClientEvent, None]:
        """What the client sends; ends when the client has gone. Whoever takes them closes it."""

    async def wait_gone(self) -> None:
        """Waits until the client has gone; unlike the end of `events` it is seen while nobody takes those."""

    async def send_stdout(self, data: bytes) -> None:
        """Waits while the client does not read; raises `OSError` when it has gone."""

    async def send_stderr(self, data: bytes) -> None:
        """As `send_stdout`."""

    async def send_ending(self, ending: Ending) -> None:
        """The status, and the orderly end of the client's connection; nobody takes `events` any more."""


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
    gone = asyncio.create_task(client.wait_gone(), name="session-gone")
    try:
        await asyncio.wait({up, down, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not down.done():
            return None  # the client has gone; whoever opened the agent's stream closes it
        ending = down.result()
        await _end(up)
        if ending is not None:
            await client.send_ending(told(ending))
        return ending
    except OSError:
        return None
    finally:
        await _end(up, down, gone)


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _pump_up(client: ClientChannels, agent: AgentStream) -> None:
    try:
        async with aclosing(client.events()) as events:
            async for event in events:
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
