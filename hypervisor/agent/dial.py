"""``dial``: a channel to a TCP port inside the pod.

The agent lives in the guest's network namespace, which is the pod's: a server that listens on 127.0.0.1 alone is
reached. Both directions are half-closed on their own: an empty STDIN frame is the client's end of file, an empty STDOUT
frame the server's. END follows when both have ended, or says why the connection broke.

Source: US 11513830: a channel into a TCP port of the container.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

from . import wire
from .errors import UNAVAILABLE, AgentError, from_os, invalid
from .fields import Fields
from .server import Connection
from .wire import Frame, FrameType

CONNECT_S = 10.0
_ADDRESSES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


async def run_dial(args: dict[str, Any], connection: Connection) -> None:
    """The call. Refused, with the port in the message, when nobody listens there."""
    fields = Fields(args, "dial")
    port = fields.integer("port", low=1, high=65535)
    fields.done()
    server = await _connect(port)
    with server:
        await _Channel(connection, server).run()


async def _connect(port: int) -> socket.socket:
    """A connection to the port, over IPv4, or over IPv6 where nobody listens on the former."""
    refused: OSError | None = None
    for family, address in _ADDRESSES:
        server = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            async with asyncio.timeout(CONNECT_S):
                await asyncio.get_running_loop().sock_connect(server, (address, port))
        except OSError as e:  # TimeoutError is one
            server.close()
            refused = refused or e
        except BaseException:
            server.close()
            raise
        else:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return server
    reason = os.strerror(refused.errno) if refused and refused.errno else "no answer"
    raise AgentError(UNAVAILABLE, f"port {port} in the pod: {reason}")


class _Channel:
    """Two pumps between a client's frames and a socket."""

    def __init__(self, connection: Connection, server: socket.socket) -> None:
        self._connection = connection
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._client_ended: asyncio.Future[None] = self._loop.create_future()

    async def run(self) -> None:
        self._connection.accept({})
        self._connection.consume(self._consume)
        try:
            await self._down()
            await self._client_ended
        except OSError as e:
            raise from_os("the connection in the pod", e) from e
        self._connection.end()

    async def _down(self) -> None:
        while data := await self._loop.sock_recv(self._server, wire.MAX_DATA):
            room = self._connection.send(FrameType.STDOUT, data)
            if room is not None:
                await asyncio.shield(room)
        self._connection.send(FrameType.STDOUT, b"")

    def _consume(self, frame: Frame) -> Awaitable[None] | None:
        if frame.type is not FrameType.STDIN:
            raise invalid(f"{frame.type.name} frame in a dial")
        if self._client_ended.done():
            return None
        if frame.payload:
            return self._up(frame.payload)
        self._half_close()
        return None

    async def _up(self, data: bytes) -> None:
        try:
            await self._loop.sock_sendall(self._server, data)
        except OSError:
            # The server reads no more; what it still sends goes through, and its end tells the client.
            self._end_client()

    def _half_close(self) -> None:
        with suppress(OSError):  # it has ended by itself
            self._server.shutdown(socket.SHUT_WR)
        self._end_client()

    def _end_client(self) -> None:
        if not self._client_ended.done():
            self._client_ended.set_result(None)
