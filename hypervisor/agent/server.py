"""Connections and dispatch.

Theory of operation
-------------------
A connection is in one of these states::

    IDLE     no call; the next frame must be a REQUEST
    UNARY    a handler runs; it always runs to its end, whether or not the client is still there
    STREAM   a handler runs that owns the connection: frames go to its consumer, it sends frames, END is the last
    ENDED    END has left; what the host still sends is dropped until it closes. If the agent closed first, with input
             unread, that would be a reset, and it could overtake END: the exit code would be lost
    CLOSED   for any reason; a streaming handler has been cancelled and has cleaned up

The end of the client's half of the connection counts as the client being gone. Flow control: a consumer that returns an
awaitable stops the reading of the socket until that is done; `send` returns an awaitable while much is unsent.

Sockets are driven with `add_reader` and `add_writer`, not with asyncio's streams: those take eight turns of the event
loop for a call where this takes three, and a turn costs a millisecond under TCG. Frames of one turn leave together.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from . import wire
from .errors import INTERNAL, AgentError, from_os, invalid
from .wire import Frame, FrameType

MAX_CONNECTIONS = 1024
RECEIVE = 256 * 1024
_RECEIVE_FIRST = 8 * 1024  # until a client fills it: memory for more is mapped anew for every read
FLUSH_ABOVE = 64 * 1024  # bytes waiting to be sent that are not held back for a common send
ROOM_BELOW = 512 * 1024  # bytes waiting to be sent beyond which `send` asks its caller to wait
_MAX_PIECES = 512  # of one sendmsg, below the kernel's IOV_MAX
LINGER_S = 60.0  # for the host to close a connection whose call has ended

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
        self._listeners: list[socket.socket] = []

    def serve(self, listener: socket.socket) -> None:
        """Starts answering on a listening stream socket of any family; owns it from now on."""
        listener.setblocking(False)
        self._listeners.append(listener)
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _address = listener.accept()
        except OSError:  # nobody any more, or no descriptor left: they wait in the backlog
            return
        if len(self.connections) >= MAX_CONNECTIONS or not _from_host(client):
            client.close()
        else:
            connection = Connection(self, client)
            self.connections.add(connection)
            connection.start()

    async def close(self) -> None:
        """Ends all connections and waits until their handlers have cleaned up."""
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener.fileno())
            listener.close()
        self._listeners.clear()
        tasks = [c.task for c in self.connections if c.task is not None]
        for connection in list(self.connections):
            connection.abort()
        await asyncio.gather(*tasks, return_exceptions=True)


def _from_host(client: socket.socket) -> bool:
    """Only the host may give orders: a container that may open vsock sockets could reach this port too."""
    if client.family != socket.AF_VSOCK:
        return True
    return bool(client.getpeername()[0] == socket.VMADDR_CID_HOST)


class Connection:
    """One client. Handlers use `accept`, `send`, `consume`, `end`."""

    def __init__(self, server: Server, client: socket.socket) -> None:
        client.setblocking(False)
        self._server = server
        self._socket = client
        self._loop = asyncio.get_running_loop()
        self._decoder = wire.Decoder()
        self._receive_size = _RECEIVE_FIRST
        self._frames: deque[Frame] = deque()
        self._consumer: Consumer | None = None
        self._busy_consumer: asyncio.Task[None] | None = None
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._flush_planned = False  # a call of _flush is due, in this turn or when the socket takes more
        self._writer_added = False
        self._room: asyncio.Future[None] | None = None
        self._streaming = False
        self._refused = False  # a streaming call: what the host sent along with it is dropped
        self._ended = False
        self._closing = False  # the call has ended: as soon as all is sent, only the host's close is waited for
        self._lingering: asyncio.TimerHandle | None = None
        self._held = False
        self.lost = False  # closed, by whomever
        self.task: asyncio.Task[None] | None = None

    # ---- what a handler uses ----

    def send(self, kind: FrameType, payload: bytes) -> Awaitable[None] | None:
        """Sends one frame; returns None, or an awaitable of the moment when more should come."""
        return self._send(wire.pack_header(kind, len(payload)), payload)

    def send_json(self, kind: FrameType, value: object) -> Awaitable[None] | None:
        """Sends one JSON frame; as `send`."""
        return self._send(wire.pack_json(kind, value))

    async def send_all(self, kind: FrameType, data: bytes) -> None:
        """Sends `data` of any length and waits until more should come."""
        for start in range(0, len(data), wire.MAX_DATA):
            room = self.send(kind, data[start : start + wire.MAX_DATA])
            if room is not None:
                await asyncio.shield(room)

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
        """Drops the connection without sending what is pending; cancels a streaming call."""
        if self.lost:
            return
        self.lost = True
        if self._lingering is not None:
            self._lingering.cancel()
        if not self._held:
            self._loop.remove_reader(self._socket.fileno())
        if self._writer_added:
            self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._server.connections.discard(self)
        self._unsent.clear()
        self._unsent_bytes = 0
        self._make_room()
        if self._busy_consumer is not None:
            self._busy_consumer.cancel()
        if self.task is not None and self._streaming:
            self.task.cancel()

    async def flushed(self, seconds: float) -> None:
        """Waits until what was sent has left, at most so long."""
        for _ in range(int(seconds * 100)):
            if not self._unsent_bytes:
                return
            await asyncio.sleep(0.01)

    # ---- sending ----

    def _send(self, *pieces: bytes) -> Awaitable[None] | None:
        if self.lost:
            return None
        for piece in filter(None, pieces):  # an empty one would never leave the queue
            self._unsent.append(piece)
            self._unsent_bytes += len(piece)
        if not self._flush_planned:
            self._flush_planned = True
            if self._unsent_bytes >= FLUSH_ABOVE:
                self._flush()
            else:
                self._loop.call_soon(self._flush)
        if self._unsent_bytes >= ROOM_BELOW and self._room is None:
            self._room = self._loop.create_future()
        return self._room

    def _flush(self) -> None:
        """Sends what can be sent; the rest when the socket takes more."""
        if self.lost:
            return None
        while self._unsent:
            try:
                pieces = [self._unsent[i] for i in range(min(len(self._unsent), _MAX_PIECES))]
                self._sent(self._socket.sendmsg(pieces))
            except BlockingIOError:
                self._flush_planned = self._writer_added = True
                self._loop.add_writer(self._socket.fileno(), self._flush)
                return None
            except OSError:  # the client has gone
                return self.abort()
        self._flush_planned = False
        if self._writer_added:
            self._writer_added = False
            self._loop.remove_writer(self._socket.fileno())
        if self._closing:
            self._linger()
        return None

    def _linger(self) -> None:
        """From STREAM to ENDED (see the module)."""
        if self._lingering is None:
            with suppress(OSError):  # it has gone already
                self._socket.shutdown(socket.SHUT_WR)
            self._lingering = self._loop.call_later(LINGER_S, self.abort)

    def _sent(self, count: int) -> None:
        self._unsent_bytes -= count
        while count:
            first = self._unsent.popleft()
            if count < len(first):
                self._unsent.appendleft(first[count:])
                break
            count -= len(first)
        if self._unsent_bytes < ROOM_BELOW:
            self._make_room()

    def _make_room(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None

    # ---- receiving ----

    def start(self) -> None:
        """Reads what is there already, usually the request, and from then on whatever comes."""
        self._loop.add_reader(self._socket.fileno(), self._receive)
        self._receive()

    def _receive(self) -> None:
        try:
            data = self._socket.recv(self._receive_size)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:  # a client that can send no more has gone
            return self.abort()
        if len(data) == self._receive_size:
            self._receive_size = RECEIVE
        if self._closing:
            return None
        try:
            self._frames.extend(self._decoder.feed(data))
        except wire.WireError as e:
            complain(f"closing a connection: {e}")
            return self.abort()
        return self._deliver()

    # ---- inside ----

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
        """Stops or resumes reading."""
        if self.lost or hold == self._held:
            return
        self._held = hold
        if hold:
            self._loop.remove_reader(self._socket.fileno())
        else:
            self._loop.add_reader(self._socket.fileno(), self._receive)

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
            if self._refused:
                return
            complain(f"closing a connection: {frame.type.name} frame without a call")
            self.abort()
            return
        self._refused = False
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
        if not self._streaming:
            self._deliver()
        elif not self.lost:
            self._closing = True
            self._frames.clear()
            self._consumer = None
            self._hold(False)  # to see the client go while it does not take the rest
            self._flush()

    def _refuse(self, error: AgentError) -> None:
        """An error before the RESPONSE is one; after it, it is the END's."""
        if self._streaming and not self._ended:
            self.end(error=error.as_json())
        elif not self._streaming:
            self.send_json(FrameType.RESPONSE, {"ok": False, "error": error.as_json()})

    async def _call(self, payload: bytes) -> None:
        name, args = parse_request(payload)
        if (unary := self._server.calls.unary.get(name)) is not None:
            result = await unary(args)
            self._flush_planned = True  # below
            self.respond(result)
            self._flush()
        elif (streaming := self._server.calls.streaming.get(name)) is not None:
            self._refused = True  # until it is accepted
            await streaming(args, self)
        else:
            raise invalid(f"unknown call {name[:80]!r}; docs/wire-protocol.md lists them")

    def accept(self, result: dict[str, Any]) -> None:
        """A streaming handler's RESPONSE: from here on the connection is the handler's and ends with it.

        :raises ClientGone: there is nobody any more to answer; the handler cleans up
        """
        self._streaming, self._refused = True, False
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
