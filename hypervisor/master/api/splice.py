"""A client's connection joined to a node's, byte for byte, once a request has asked for an upgrade.

Theory of operation
-------------------
*dialled*: TLS to the node stands, nothing of the client's has been sent; a failure is still an ordinary answer.
*taken over*: the client's transport is given another protocol than aiohttp's, and the node gets the request. What
the node answers (101 or an error) goes to the client as it is, and so does everything after it, both ways; a side that
cannot keep up pauses the reading of the other. *Ended*: one side has closed; what is under way to the other is still
sent, then that is closed too. So WebSocket, SPDY and whatever comes later are carried without being understood.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from aiohttp import web
from aiohttp.web_request import BaseRequest

from hypervisor.errors import Unavailable
from hypervisor.kube.liveness import keep_alive

CONNECT_S = 10.0
DRAIN_S = 5.0
_STATUS_LINE = len(b"HTTP/1.1 101")
_NOT_FORWARDED = frozenset(("host", "authorization", "x-remote-user", "x-remote-group", "transfer-encoding"))


@dataclass(frozen=True, slots=True)
class NodeAddress:
    """Where a node serves."""

    host: str
    port: int
    tls: ssl.SSLContext


class _Half(asyncio.Protocol):
    """One of the two connections."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _Half | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's TLS transports are none by inheritance

    def data_received(self, data: bytes) -> None:
        if len(self.head) < _STATUS_LINE:
            self.head += data[:_STATUS_LINE]
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def eof_received(self) -> bool:
        return False  # TLS knows no half-closed connection

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None and not self.other.lost.done():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None and not self.other.lost.done():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()  # after what is still to be written


async def splice(request: BaseRequest, address: NodeAddress, target: str) -> web.StreamResponse:
    """Forwards an upgrade request to a node and joins the two connections until one of them ends.

    :param target: path and query at the node
    :returns: an answer that cannot be sent any more, with the status that the node gave; it satisfies aiohttp
    :raises Unavailable: the node cannot be reached; the client has been sent nothing yet
    """
    back = await _dial(address)
    client = request.transport
    if client is None or back.transport is None:
        if back.transport is not None:
            back.transport.abort()
        raise ConnectionResetError("the client has gone")
    front = _Half()
    front.other, back.other = back, front
    back.transport.write(_head(request, address, target))
    _take_over(request, client, front)
    try:
        await asyncio.wait((front.lost, back.lost), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait((front.lost, back.lost), timeout=DRAIN_S)
    finally:
        client.abort()
        back.transport.abort()
        request.protocol.connection_lost(None)
        # Not left to the garbage collector, which comes late: each TLS connection holds 256 KiB of buffers.
        for half in (front, back):
            half.other = half.transport = None
    return web.Response(status=_status(back.head))


def _status(head: bytes) -> int:
    """Of an answer's first bytes; 502 when there were none that could be read."""
    code = head[9:_STATUS_LINE]
    return int(code) if head.startswith(b"HTTP/1.") and code.isdigit() and len(code) == 3 else 502


async def _dial(address: NodeAddress) -> _Half:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_S):
            _, half = await loop.create_connection(_Half, address.host, address.port, ssl=address.tls)
    except (OSError, TimeoutError) as e:
        why = "no answer" if isinstance(e, TimeoutError) else str(e)
        raise Unavailable(f"error dialing backend: {address.host}:{address.port}: {why}") from e
    return half


def _take_over(request: BaseRequest, client: asyncio.Transport, front: _Half) -> None:
    front.transport = client
    keep_alive(client)
    client.set_protocol(front)
    early = getattr(request.protocol, "_message_tail", b"")  # a client that did not wait for the 101
    if early:
        front.data_received(early)
    if not client.is_reading():
        client.resume_reading()


def _head(request: BaseRequest, address: NodeAddress, target: str) -> bytes:
    lines = [f"{request.method} {target} HTTP/1.1".encode("ascii"), f"Host: {address.host}:{address.port}".encode()]
    lines += [name + b": " + value for name, value in forwarded(request)]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def forwarded(request: BaseRequest) -> Iterable[tuple[bytes, bytes]]:
    """The headers that a node may see: not the client's credentials, nor whom it impersonates."""
    for name, value in request.raw_headers:
        lower = name.decode("latin-1").lower()
        if lower not in _NOT_FORWARDED and not lower.startswith("impersonate-"):
            yield name, value
