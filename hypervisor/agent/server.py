"""Connections and dispatch.

Theory of operation
-------------------
A connection is in one of these states::

    IDLE     no call; the next frame must be a REQUEST
    UNARY    a handler runs; it always runs to its end, whether or not the client is still there
    STREAM   a handler runs that owns the connection: frames go to its consumer, it sends frames, END is the last
    CLOSED   for any reason; a streaming handler has been cancelled and has cleaned up

The end of the client's half of the connection counts as the client being gone. Flow control: a consumer that returns an
awaitable stops the reading of the socket until that is done; `send` returns an awaitable while the socket is full.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from . import wire
from .errors import INTERNAL, AgentError, from_os, invalid
from .wire import Frame, FrameType

MAX_CONNECTIONS = 1024
WRITE_HIGH_WATER = 512 * 1024

Unary = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
Streaming = Callable[[dict[str, Any], "Connection"], Awaitable[None]]
Consumer = Callable[[Frame], Awaitable[None] | None]


def complain(text: str) -> None:
    """A line on the console, for developers; never fails."""
    try:
        sys.stderr.write(f"agent: {text}\n")
        sys.stderr.flush()
    except OSError:
        pass


class ClientGone(Exception):
    """The client of a streaming call went before the call had begun."""


class Calls:
    """The table of calls."""

    def __init__(self) -> None:
        self.unary: dict[str, Unary] = {}
        self.streaming: dict[str, Streaming] = {}


class Server:
    """Accepts connections on listening sockets and answers calls until closed."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.connections: set[Connection] = set()
        self._servers: list[asyncio.Server] = []

    async def serve(self, listener: socket.socket) -> None:
        """Starts answering on a listening stream socket of any family; owns it from now on."""
        loop = asyncio.get_running_loop()
        self._servers.append(await loop.create_server(lambda: Connection(self), sock=listener, backlog=512))

    async def close(self) -> None:
        """Ends all connections and waits until their handlers have cleaned up."""
        for server in self._servers:
            server.close()
        tasks = [c.task for c in self.connections if c.task is not None]
        for connection in list(self.connections):
            connection.abort()
        await asyncio.gather(*tasks, return_exceptions=True)


class Connection(asyncio.Protocol):
    """One client. Handlers use `respond`, `send`, `consume`, `end`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._decoder = wire.Decoder()
        self._frames: deque[Frame] = deque()
        self._consumer: Consumer | None = None
        self._busy_consumer: asyncio.Task[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._streaming = False
        self._ended = False
        self.task: asyncio.Task[None] | None = None

    # ---- what a handler uses ----

    @property
    def lost(self) -> bool:
        """The client has gone."""
        return self._transport is None or self._transport.is_closing()

    def send(self, kind: FrameType, payload: bytes) -> Awaitable[None] | None:
        """Sends one frame; returns None, or an awaitable of the moment when the socket takes more."""
        if self._transport is None or self._transport.is_closing():
            return None
        self._transport.write(wire.pack(kind, payload))
        return self._room

    async def send_all(self, kind: FrameType, data: bytes) -> None:
        """Sends `data` of any length and waits until the socket takes more."""
        for start in range(0, len(data), wire.MAX_DATA):
            room = self.send(kind, data[start : start + wire.MAX_DATA])
            if room is not None:
                await asyncio.shield(room)

    def send_json(self, kind: FrameType, value: object) -> Awaitable[None] | None:
        """Sends one JSON frame; as `send`."""
        if self.lost:
            return None
        assert self._transport is not None
        self._transport.write(wire.pack_json(kind, value))
        return self._room

    def respond(self, result: dict[str, Any]) -> None:
        """Accepts the call."""
        self.send_json(FrameType.RESPONSE, {"ok": True, "result": result})

    def end(self, **body: Any) -> None:
        """The END frame: the last one of a streaming call."""
        self._ended = True
        self.send_json(FrameType.END, body)

    def consume(self, consumer: Consumer) -> None:
        """From now on, the client's frames go to `consumer`, in order, one at a time."""
        self._consumer = consumer
        self._deliver()

    def abort(self) -> None:
        """Drops the connection without sending what is pending."""
        if self._transport is not None:
            self._transport.abort()

    async def flushed(self, seconds: float) -> None:
        """Waits until what was sent has left, at most so long."""
        for _ in range(int(seconds * 100)):
            if self._transport is None or not self._transport.get_write_buffer_size():
                return
            await asyncio.sleep(0.01)

    # ---- what asyncio calls ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if len(self._server.connections) >= MAX_CONNECTIONS or not self._from_host(transport):
            transport.abort()
            return
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._transport = None
        self.resume_writing()
        if self._busy_consumer is not None:
            self._busy_consumer.cancel()
        if self.task is not None and self._streaming:
            self.task.cancel()

    def eof_received(self) -> bool:
        return False  # closes the transport: a client that can send no more has gone

    def pause_writing(self) -> None:
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None

    def data_received(self, data: bytes) -> None:
        try:
            self._frames.extend(self._decoder.feed(data))
        except wire.WireError as e:
            complain(f"closing a connection: {e}")
            self.abort()
            return
        self._deliver()

    # ---- inside ----

    @staticmethod
    def _from_host(transport: asyncio.Transport) -> bool:
        """Only the host may give orders: a container that may open vsock sockets could reach this port too."""
        peer = transport.get_extra_info("socket")
        if peer is None or peer.family != socket.AF_VSOCK:
            return True
        return bool(peer.getpeername()[0] == socket.VMADDR_CID_HOST)

    def _deliver(self) -> None:
        """Hands waiting frames on: to the consumer of a streaming call, or as the next request."""
        while self._frames and self._busy_consumer is None:
            if self._consumer is not None:
                self._consume(self._frames.popleft())
            elif self.task is None:
                self._request(self._frames.popleft())
            else:
                break
        self._hold(bool(self._frames) or self._busy_consumer is not None)

    def _hold(self, hold: bool) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if hold:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _consume(self, frame: Frame) -> None:
        assert self._consumer is not None
        try:
            busy = self._consumer(frame)
        except AgentError as e:
            complain(f"closing a connection: {e.message}")
            self.abort()
            return
        if busy is not None:
            self._busy_consumer = self._loop.create_task(self._consume_rest(busy))

    async def _consume_rest(self, busy: Awaitable[None]) -> None:
        try:
            await busy
        finally:
            self._busy_consumer = None
        self._deliver()

    def _request(self, frame: Frame) -> None:
        if frame.type is not FrameType.REQUEST:
            complain(f"closing a connection: {frame.type.name} frame without a call")
            self.abort()
            return
        self.task = self._loop.create_task(self._answer(frame.payload))

    async def _answer(self, payload: bytes) -> None:
        try:
            await self._call(payload)
        except AgentError as e:
            self._refuse(e)
        except ClientGone:
            pass
        except OSError as e:
            self._refuse(from_os("the agent", e))
        except Exception as e:  # a bug: tell both the client and the console, and go on serving others
            _complain_about(e)
            self._refuse(AgentError(INTERNAL, f"the agent failed: {type(e).__name__}: {e}"))
        finally:
            self._after_call()

    def _after_call(self) -> None:
        self.task = None
        if self._streaming:
            if self._transport is not None:
                self._transport.close()
        else:
            self._deliver()

    def _refuse(self, error: AgentError) -> None:
        """An error before the RESPONSE is one; after it, it is the END's."""
        if self._streaming and not self._ended:
            self.end(error=error.as_json())
        elif not self._streaming:
            self.send_json(FrameType.RESPONSE, {"ok": False, "error": error.as_json()})

    async def _call(self, payload: bytes) -> None:
        name, args = parse_request(payload)
        if (unary := self._server.calls.unary.get(name)) is not None:
            self.respond(await unary(args))
        elif (streaming := self._server.calls.streaming.get(name)) is not None:
            await streaming(args, self)
        else:
            raise invalid(f"unknown call {name[:80]!r}; docs/wire-protocol.md lists them")

    def accept(self, result: dict[str, Any]) -> None:
        """A streaming handler's RESPONSE: from here on the connection is the handler's and ends with it.

        :raises ClientGone: there is nobody any more to answer; the handler cleans up
        """
        self._streaming = True
        if self.lost:
            raise ClientGone
        self.respond(result)


def parse_request(payload: bytes) -> tuple[str, dict[str, Any]]:
    """The call and its arguments out of a REQUEST's payload.

    :raises AgentError: Invalid
    """
    try:
        request = wire.parse_json(payload)
    except wire.WireError as e:
        raise invalid(f"request: {e}") from e
    version, name, args = request.pop("v", None), request.pop("call", None), request.pop("args", {})
    if version != wire.VERSION:
        raise invalid(f"request: protocol version {version!r}; this agent speaks {wire.VERSION}")
    if not isinstance(name, str) or not isinstance(args, dict):
        raise invalid("request: `call` must be a string and `args` an object")
    if request:
        raise invalid(f"request: unknown field {next(iter(request))[:80]!r}")
    return name, args


def _complain_about(error: Exception) -> None:
    import traceback

    complain("".join(traceback.format_exception(error))[-4000:])
