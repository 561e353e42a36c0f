"""From an HTTP request with ``Upgrade: SPDY/3.1`` to the bytes below it.

aiohttp knows no upgrade but its own WebSocket's, so the connection is taken away from it: its transport is given
another protocol *before* the 101 is sent, or the client's first frames could still be read as HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from hypervisor.errors import InvalidInput
from hypervisor.kube.liveness import keep_alive

UPGRADE = "SPDY/3.1"
HIGH_WATER = 256 * 1024
"""Bytes read and not yet taken, at which the connection is read no further."""


class RawTransport(asyncio.Protocol):
    """A connection that was taken away from aiohttp, as `hypervisor.introspect.spdy.connection.Transport`."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._incoming: list[bytes] = []
        self._held = 0
        self._ended = False
        self._news = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()

    # ---- called by the event loop ------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._incoming.append(data)
        self._held += len(data)
        self._news.set()
        if self._held >= HIGH_WATER:
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._end()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _end(self) -> None:
        self._ended = True
        self._news.set()
        self._writable.set()

    # ---- called by the connection ------------------------------------------------------------------------------------

    async def read(self) -> bytes:
        """All that has come since; empty at the end."""
        while not self._incoming:
            if self._ended:
                return b""
            self._news.clear()
            await self._news.wait()
        data = b"".join(self._incoming)
        self._incoming.clear()
        self._held = 0
        if not self._ended and not self._transport.is_reading():
            self._transport.resume_reading()
        return data

    async def write(self, data: bytes) -> None:
        """Waits while the client does not read.

        :raises ConnectionError: it has gone
        """
        if self._ended or self._transport.is_closing():
            raise ConnectionResetError("the client has gone")
        self._transport.write(data)
        await self._writable.wait()

    async def close(self) -> None:
        """Ends the connection after what is still to be written."""
        self._transport.close()


@asynccontextmanager
async def accept(request: web.Request, protocols: tuple[str, ...]) -> AsyncIterator[tuple[RawTransport, str]]:
    """Answers 101 and gives the bytes; the connection ends with the context. What the handler returns after that is
    not sent.

    :param protocols: those that this side speaks, the best first; the first that the client offers too is agreed on
    :raises InvalidInput: none in common; nothing has been answered
    """
    agreed = agree(request, protocols)
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client has gone")
    keep_alive(transport)
    raw = RawTransport(transport)
    transport.set_protocol(raw)
    early = getattr(request.protocol, "_message_tail", b"")  # a client that did not wait for the 101
    if early:
        raw.data_received(early)
    if not transport.is_reading():
        transport.resume_reading()
    lines = ("HTTP/1.1 101 Switching Protocols", "Connection: Upgrade", f"Upgrade: {UPGRADE}")
    head = "\r\n".join((*lines, f"X-Stream-Protocol-Version: {agreed}", "", ""))
    try:
        await raw.write(head.encode())
        yield raw, agreed
    finally:
        transport.close()
        request.protocol.connection_lost(None)


def wanted(request: web.Request) -> bool:
    """Whether the client asks for SPDY."""
    return request.headers.get("Upgrade", "").lower() == UPGRADE.lower()


def agree(request: web.Request, protocols: tuple[str, ...]) -> str:
    """:raises InvalidInput: the client speaks none of `protocols`"""
    offered = [p.strip() for v in request.headers.getall("X-Stream-Protocol-Version", []) for p in v.split(",")]
    for protocol in protocols:
        if protocol in offered:
            return protocol
    raise InvalidInput(f"offer one of the stream protocols {', '.join(protocols)}", where="X-Stream-Protocol-Version")
