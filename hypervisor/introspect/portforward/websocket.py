"""Port-forward over WebSockets.

Two forms. *Tunnelled*: subprotocol ``SPDY/3.1+portforward.k8s.io``; the binary messages are the bytes of a SPDY
connection, and everything else is as over SPDY (KEP-4006; newer kubectl). *Plain*: ``?ports=N&ports=M`` and subprotocol
``v4.channel.k8s.io``: for the i-th port, channel 2i carries data and 2i+1 errors, each begun by the server with a
message that holds the port as two bytes, little-endian (the official Python client). There is no half-close in it: the
connection to a port ends with the WebSocket, or by the server's end, which the client sees as the WebSocket's.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from contextlib import suppress

from aiohttp import WSMsgType, web

from hypervisor.errors import InvalidInput
from hypervisor.introspect.agent import AgentClient
from hypervisor.introspect.portforward import spdy
from hypervisor.introspect.portforward.forward import forward, port_number
from hypervisor.introspect.websocket import V4, accept, offered, payload

TUNNEL = f"SPDY/3.1+{spdy.PROTOCOL}"
MAX_PORTS = 100
HELD = 16
"""Messages of a channel that wait for the pod before the WebSocket is read no further."""


async def serve(request: web.Request, agent: AgentClient) -> web.StreamResponse:
    """Answers the upgrade, tunnelled where the client offers it, and serves the client until it goes.

    :raises InvalidInput: no upgrade to one of the subprotocols, or no ports; nothing has been answered
    """
    protocols = offered(request)
    if not {TUNNEL, V4} & set(protocols):
        raise InvalidInput(
            f"upgrade to SPDY/3.1, or to a WebSocket with subprotocol {TUNNEL} or {V4}", where="Sec-WebSocket-Protocol"
        )
    named = request.query.getall("port", []) or request.query.getall("ports", [])  # an API server's word, a client's
    ports = [] if TUNNEL in protocols else parse_ports(named)
    async with accept(request, (TUNNEL, V4)) as socket:
        if socket.ws_protocol == TUNNEL:
            await spdy.serve(TunnelTransport(socket), agent)
        else:
            await run_plain(socket, agent, ports)
    return socket


class TunnelTransport:
    """A WebSocket's messages as the bytes of a `SpdyConnection`."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket

    async def read(self) -> bytes:
        while True:
            message = await self._socket.receive()
            if message.type is WSMsgType.BINARY:
                if message.data:
                    return bytes(message.data)
            elif message.type is not WSMsgType.TEXT:
                return b""

    async def write(self, data: bytes) -> None:
        await self._socket.send_bytes(data)

    async def close(self) -> None:
        await self._socket.close()


def parse_ports(texts: Sequence[str]) -> list[int]:
    """The ports of a plain client, each ``N`` or several with commas between them.

    :raises InvalidInput: none, too many, or no ports at all
    """
    ports = [port_number(part) for text in texts for part in text.split(",")]
    if not ports:
        raise InvalidInput("name at least one port: ?ports=N", where="ports")
    if len(ports) > MAX_PORTS:
        raise InvalidInput(f"{len(ports)} ports; at most {MAX_PORTS} go through one WebSocket", where="ports")
    return ports


class ChannelLink:
    """`Link` over the two channels of a port."""

    def __init__(self, socket: web.WebSocketResponse, index: int) -> None:
        self._socket = socket
        self._data, self._error = bytes([2 * index]), bytes([2 * index + 1])
        self.incoming: asyncio.Queue[bytes] = asyncio.Queue(HELD)

    async def begin(self, port: int) -> None:
        """Sends the port on both channels, as every client waits for."""
        for channel in (self._data, self._error):
            await self._socket.send_bytes(channel + struct.pack("<H", port))

    async def read(self) -> bytes:
        return await self.incoming.get()

    async def write(self, data: bytes) -> None:
        await self._socket.send_bytes(self._data + data)

    async def close(self) -> None:
        """The protocol has no word for it."""

    async def cut(self) -> None:
        """Nor for this."""

    async def fail(self, message: str) -> None:
        await self._socket.send_bytes(self._error + message.encode())


async def run_plain(socket: web.WebSocketResponse, agent: AgentClient, ports: Sequence[int]) -> None:
    """Serves a plain client until it goes, or until the last of its connections has ended."""
    links = [ChannelLink(socket, index) for index in range(len(ports))]
    for link, port in zip(links, ports, strict=True):
        await link.begin(port)
    carrying = [
        asyncio.create_task(forward(agent, port, link), name=f"forward {port}")
        for link, port in zip(links, ports, strict=True)
    ]
    reading = asyncio.create_task(_read(socket, links), name="websocket")
    try:
        ended = asyncio.ensure_future(asyncio.wait(carrying))
        await asyncio.wait([reading, ended], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (reading, *carrying):
            task.cancel()
        await asyncio.gather(reading, *carrying, return_exceptions=True)
        with suppress(OSError):
            await socket.close()


async def _read(socket: web.WebSocketResponse, links: Sequence[ChannelLink]) -> None:
    async for message in socket:
        data = payload(message)
        if not data:
            continue
        index, kind = divmod(data[0], 2)
        if kind == 0 and index < len(links) and len(data) > 1:
            await links[index].incoming.put(data[1:])
    for link in links:
        await link.incoming.put(b"")
