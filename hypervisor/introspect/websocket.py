"""Channels over a WebSocket: subprotocols ``v4.channel.k8s.io`` and ``v5.channel.k8s.io``.

Each binary message begins with a channel number: 0 stdin, 1 stdout, 2 stderr, 3 error (one Status object, last),
4 resize (JSON ``{"Width":c,"Height":r}``). v5 adds 255, CLOSE: its one byte names the channel that ends, which is how
stdin is half-closed; v4 has no such thing, and a client of it can only go away.

Source: Kubernetes KEP-4006, and the kubelet's behaviour towards clients that ask for several subprotocols: the
server's first choice among those offered wins.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import WSMessage, WSMsgType, web

from hypervisor.introspect.agent import Ending
from hypervisor.introspect.session import ClientEvent, Resize, Stdin, StdinEnd
from hypervisor.introspect.status import status_of_ending
from hypervisor.kube.liveness import pinging

V5 = "v5.channel.k8s.io"
V4 = "v4.channel.k8s.io"
PROTOCOLS = (V5, V4)

STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
MAX_MESSAGE = 4 * 1024 * 1024
LINGER_S = 10.0  # that a client has to answer our close, before the connection is cut


class WebSocketChannels:
    """`ClientChannels` over an aiohttp WebSocket that has been prepared."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket

    async def events(self) -> AsyncGenerator[ClientEvent, None]:
        """What the client sends; unknown channels are ignored, as upstream does."""
        async for message in self._socket:
            data = payload(message)
            if not data:
                continue
            event = parse_event(data, half_close=self._socket.ws_protocol == V5)
            if event is not None:
                yield event

    async def wait_gone(self) -> None:
        """Never returns: aiohttp cancels the request's task when the connection is lost."""
        await asyncio.Event().wait()

    async def send_stdout(self, data: bytes) -> None:
        await self._socket.send_bytes(bytes([STDOUT]) + data)

    async def send_stderr(self, data: bytes) -> None:
        await self._socket.send_bytes(bytes([STDERR]) + data)

    async def send_ending(self, ending: Ending) -> None:
        if ending.error is not None and ending.exit_code in (126, 127):
            # A client prints its own words for an exit code; the reason goes where a runtime would have put it.
            await self.send_stderr(f"{ending.error}\n".encode())
        await self._socket.send_bytes(bytes([ERROR]) + json.dumps(status_of_ending(ending)).encode())
        # Reads on, and drops what the client still types, until it closes too: a connection closed with input unread
        # is reset, and the status may never be seen.
        await self._socket.close()


def payload(message: WSMessage) -> bytes:
    """A message's bytes. Text counts too: the official Python client sends strings as such."""
    if message.type is WSMsgType.BINARY:
        return bytes(message.data)
    return str(message.data).encode() if message.type is WSMsgType.TEXT else b""


def parse_event(message: bytes, *, half_close: bool) -> ClientEvent | None:
    """A client's message as an event; None for one that means nothing here.

    :param message: channel byte and payload, not empty
    :param half_close: whether CLOSE exists in the agreed subprotocol
    """
    channel, payload = message[0], message[1:]
    if channel == STDIN:
        return Stdin(payload) if payload else None
    if channel == RESIZE:
        return parse_resize(payload)
    if channel == CLOSE and half_close and payload == bytes([STDIN]):
        return StdinEnd()
    return None


def parse_resize(payload: bytes) -> Resize | None:
    """A terminal's size in JSON; None for one that makes no sense."""
    try:
        size = json.loads(payload)
        columns, rows = int(size["Width"]), int(size["Height"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
    if not (0 < columns <= 0xFFFF and 0 < rows <= 0xFFFF):
        return None
    return Resize(columns, rows)


@asynccontextmanager
async def accept(request: web.Request, protocols: tuple[str, ...]) -> AsyncIterator[web.WebSocketResponse]:
    """Answers the upgrade; the agreed subprotocol is the first of `protocols` that the client offered. As long as the
    context lasts, the client is asked after.

    :raises web.HTTPBadRequest: not a WebSocket handshake
    """
    socket = web.WebSocketResponse(protocols=protocols, max_msg_size=MAX_MESSAGE, timeout=LINGER_S, compress=False)
    await socket.prepare(request)
    async with pinging(request.transport, socket.ping):
        yield socket


def offered(request: web.Request) -> list[str]:
    """The subprotocols that the client offered, in its order."""
    header = request.headers.get("Sec-WebSocket-Protocol", "")
    return [p.strip() for p in header.split(",") if p.strip()]
