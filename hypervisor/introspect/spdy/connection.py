"""One SPDY connection, either side: streams over a byte transport.

Theory of operation
-------------------
One task (`run`) reads frames and puts data into each stream's buffer; readers take it out. Peers of Kubernetes neither
send WINDOW_UPDATE nor wait for it, so the only back-pressure is the transport's own: while any stream's buffer is full,
nothing more is read from the connection, and TCP slows the peer down. A stream nobody reads any more (`abandon`) drops
what comes, so it holds up nobody. Writes go out in the order in which they were made, one frame at a time.

::

    stream: (SYN_STREAM) --> open --FIN received--> remote end closed --FIN sent--> gone
                              |  --FIN sent------> local end closed --FIN received--> gone
                              +--RST_STREAM either way, or the connection's end--> gone

When `run` returns, every stream has ended: readers get what is buffered, then the end; writers get `ConnectionError`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from hypervisor.errors import ProtocolError
from hypervisor.introspect.spdy.frames import (
    CANCEL,
    INVALID_STREAM,
    REFUSED_STREAM,
    Data,
    Frame,
    FrameReader,
    FrameWriter,
    GoAway,
    Ping,
    RstStream,
    SynReply,
    SynStream,
)
from hypervisor.kube.liveness import pinging

MAX_STREAMS = 1024
BUFFER = 256 * 1024
"""Bytes that a stream holds before the connection is read no further."""
CHUNK = 32 * 1024
"""Bytes of a data frame that is sent."""
LINGER_S = 10.0
"""Seconds that a peer has to end a connection on which it has been told all."""


class Transport(Protocol):
    """Bytes in order, both ways."""

    async def read(self) -> bytes:
        """Some bytes; empty at the end."""

    async def write(self, data: bytes) -> None:
        """Waits while the peer does not read; raises `OSError` when it has gone."""

    async def close(self) -> None:
        """Ends both directions."""


class SpdyStream:
    """One stream of a connection. One task may read and one may write at a time."""

    def __init__(self, connection: SpdyConnection, number: int, headers: Mapping[str, str]) -> None:
        self.number = number
        self.headers = headers
        self._connection = connection
        self._chunks: deque[bytes] = deque()
        self._held = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._abandoned = False
        self.remote_ended = False
        self.local_ended = False
        self.reset = False

    async def read(self) -> bytes:
        """The next bytes; empty when the peer has ended its direction, or the stream is gone."""
        while not self._chunks:
            if self.remote_ended:
                return b""
            self._news.clear()
            await self._news.wait()
        chunk = self._chunks.popleft()
        self._held -= len(chunk)
        if self._held < BUFFER:
            self._room.set()
        return chunk

    async def write(self, data: bytes) -> None:
        """Sends all of `data`.

        :raises ConnectionError: the stream or the connection has ended
        """
        for start in range(0, len(data), CHUNK):
            await self._send(Data(self.number, bytes(data[start : start + CHUNK])))

    async def close(self) -> None:
        """Ends this side's direction; a stream that has ended already is left as it is."""
        if not self.local_ended:
            try:
                await self._send(Data(self.number, b"", fin=True))
            except ConnectionError:
                return
            self.local_ended = True
            self._connection.forget_if_over(self)

    async def cancel(self) -> None:
        """Ends the stream in both directions at once."""
        if not (self.local_ended and self.remote_ended):
            self.end(reset=True)
            await self._connection.send(RstStream(self.number, CANCEL))
        self._connection.forget_if_over(self)

    def abandon(self) -> None:
        """Nobody will read any more: what has come and will come is dropped."""
        self._abandoned = True
        self._chunks.clear()
        self._held = 0
        self._room.set()

    async def _send(self, frame: Frame) -> None:
        if self.local_ended or self.reset:
            raise ConnectionResetError(f"SPDY: stream {self.number} has ended")
        await self._connection.send(frame)

    # ---- called by the connection ------------------------------------------------------------------------------------

    async def take(self, data: bytes) -> None:
        """Takes data in; waits while the buffer is full."""
        if self._abandoned or not data:
            return
        self._chunks.append(data)
        self._held += len(data)
        self._news.set()
        if self._held >= BUFFER:
            self._room.clear()
            await self._room.wait()

    def end(self, *, reset: bool = False) -> None:
        """The peer has ended its direction, or with `reset` both are over."""
        self.remote_ended = True
        if reset:
            self.reset = self.local_ended = True
        self._news.set()
        self._room.set()


class SpdyConnection:
    """The streams of one connection. `run` is a task of the owner's; `accept` gives the streams that the peer opens."""

    def __init__(self, transport: Transport, *, server: bool) -> None:
        self._transport = transport
        self._server = server
        self._reader = FrameReader()
        self._writer = FrameWriter()
        self._sending = asyncio.Lock()
        self._streams: dict[int, SpdyStream] = {}
        self._arrived: asyncio.Queue[SpdyStream | None] = asyncio.Queue()
        self._newest = 0
        self._next = self._pings = 2 if server else 1
        self._over = asyncio.Event()

    @property
    def over(self) -> bool:
        """It has ended."""
        return self._over.is_set()

    async def wait_over(self) -> None:
        """Waits until it has ended."""
        await self._over.wait()

    async def run(self) -> None:
        """Reads until the peer ends, says GOAWAY, or breaks the protocol; then every stream has ended.

        :raises ProtocolError: the peer broke the protocol
        """
        try:
            while data := await self._transport.read():
                for frame in self._reader.feed(data):
                    if not await self._handle(frame):
                        return
        except OSError:
            return  # the peer has gone
        finally:
            self._end()
            self._arrived.put_nowait(None)

    def _end(self) -> None:
        self._over.set()
        for stream in self._streams.values():
            stream.end(reset=True)
        self._streams.clear()

    @asynccontextmanager
    async def asked_after(self) -> AsyncIterator[None]:
        """As long as the context lasts, a peer that has gone is noticed, even while nothing is read from it because a
        stream's buffer is full."""
        async with pinging(None, self._ping):
            yield

    async def _ping(self) -> None:
        self._pings = (self._pings + 2) & 0x7FFFFFFF
        try:
            await self.send(Ping(self._pings))
        except OSError:
            self._end()
            raise

    async def linger(self) -> None:
        """Reads on, dropping what comes, until the peer ends the connection, for `LINGER_S` seconds at most: one closed
        with input unread is reset, and what was sent last may never be seen."""
        for stream in tuple(self._streams.values()):
            stream.abandon()
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await self.wait_over()

    async def accept(self) -> SpdyStream | None:
        """The next stream that the peer opened, already accepted; None: there will be no more."""
        if self.over and self._arrived.empty():
            return None
        return await self._arrived.get()

    async def open(self, headers: Mapping[str, str], *, fin: bool = False) -> SpdyStream:
        """Opens a stream; it may be written to at once."""
        stream = SpdyStream(self, self._next, headers)
        self._next += 2
        self._streams[stream.number] = stream
        await self.send(SynStream(stream.number, headers, fin=fin))
        stream.local_ended = fin
        return stream

    async def send(self, frame: Frame) -> None:
        """:raises ConnectionError: the connection has ended"""
        async with self._sending:
            if self.over:
                raise ConnectionResetError("SPDY: the connection has ended")
            await self._transport.write(self._writer.render(frame))

    async def close(self) -> None:
        """Says GOAWAY and ends the transport."""
        try:
            if not self.over:
                await self.send(GoAway(self._newest))
        except OSError:
            pass  # it has gone by itself
        finally:
            await self._transport.close()

    def forget_if_over(self, stream: SpdyStream) -> None:
        """Drops a stream that has ended in both directions."""
        if stream.local_ended and stream.remote_ended:
            self._streams.pop(stream.number, None)

    # ---- frames ------------------------------------------------------------------------------------------------------

    async def _handle(self, frame: Frame) -> bool:
        """False: the peer goes away."""
        match frame:
            case Data(number, data, fin):
                await self._data(number, data, fin)
            case SynStream():
                await self._begin(frame)
            case RstStream(number, _):
                stream = self._streams.pop(number, None)
                if stream is not None:
                    stream.end(reset=True)
            case Ping(number) if (number % 2 == 1) == self._server:
                await self.send(frame)
            case GoAway():
                return False
        return True

    async def _data(self, number: int, data: bytes, fin: bool) -> None:
        stream = self._streams.get(number)
        if stream is None:
            if number > self._newest:
                await self.send(RstStream(number, INVALID_STREAM))
            return  # of a stream that has ended here: it was on its way
        await stream.take(data)
        if fin:
            stream.end()
            self.forget_if_over(stream)

    async def _begin(self, frame: SynStream) -> None:
        if frame.stream <= self._newest or (frame.stream % 2 == 1) != self._server:
            raise ProtocolError(f"SPDY: stream {frame.stream} after {self._newest} is out of order")
        self._newest = frame.stream
        if len(self._streams) >= MAX_STREAMS:
            await self.send(RstStream(frame.stream, REFUSED_STREAM))
            return
        stream = SpdyStream(self, frame.stream, frame.headers)
        stream.remote_ended, stream.local_ended = frame.fin, frame.unidirectional
        self._streams[frame.stream] = stream
        await self.send(SynReply(frame.stream))
        self._arrived.put_nowait(stream)
