"""Port-forward: a client's connections to ports inside a pod, whatever carries them.

The walk of one: `Link` (what the client's protocol gives: two directions of bytes, and a place for an error)
-> the agent's call ``dial`` over vsock -> 127.0.0.1 in the pod's own network namespace.

Theory of operation
-------------------
*Up* copies from the client to the port and half-closes it at the client's end; *down* the other way. A connection ends
when both directions have. A refused port is told on the error side and ends that connection alone. A connection that a
server in the pod resets is reset towards the client and is no error: kubectl gives up all its connections when it is
told one, and servers reset as a matter of course.

Source: US 11513830: a channel into a TCP port of the container.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from hypervisor.agent.wire import FrameType
from hypervisor.errors import HvError, InvalidInput
from hypervisor.introspect.agent import AgentClient, AgentStream


class Link(Protocol):
    """One forwarded connection on the client's side."""

    async def read(self) -> bytes:
        """The next bytes; empty when the client sends no more."""

    async def write(self, data: bytes) -> None:
        """Waits while the client does not read; raises `OSError` when it has gone."""

    async def close(self) -> None:
        """No more bytes for the client."""

    async def cut(self) -> None:
        """The connection broke in the pod: no more bytes either way, and they were not all."""

    async def fail(self, message: str) -> None:
        """Tells the client why there is no connection, or that the way to the pod broke."""


def port_number(text: str) -> int:
    """:raises InvalidInput: not a port"""
    if not (text.isascii() and text.isdigit() and 0 < int(text[:6]) < 65536):
        raise InvalidInput(f"{text[:20]!r} is not a port; ports are 1 to 65535", where="port")
    return int(text)


def agent_request(port: int) -> tuple[str, dict[str, Any]]:
    """The second request, for a connection to `port`: call name and arguments."""
    return "dial", {"port": port}


async def forward(agent: AgentClient, port: int, link: Link) -> None:
    """Carries one connection to its end. What fails is told to the client; only its going away is raised.

    :raises OSError: the client has gone
    """
    call, args = agent_request(port)
    try:
        async with agent.asked(call, args) as stream:
            await _carry(stream, link)
    except HvError as e:
        await link.fail(f"error forwarding port {port} to pod: {e}")


async def _carry(stream: AgentStream, link: Link) -> None:
    """What the client has sent by now travels with the request: the guest wakes up once for both."""
    up = asyncio.create_task(_up(stream, link), name="forward-up")
    try:
        async for frame in stream.frames():
            if frame.type is FrameType.STDOUT:
                if frame.payload:
                    await link.write(frame.payload)
                else:
                    await link.close()
        if stream.ending is not None and stream.ending.error is not None:
            await link.cut()
        else:
            await link.close()
    finally:
        up.cancel()
        await asyncio.gather(up, return_exceptions=True)


async def _up(stream: AgentStream, link: Link) -> None:
    while data := await link.read():
        await stream.send_stdin(data)
    await stream.close_stdin()
