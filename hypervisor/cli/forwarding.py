"""What ``hv port-forward`` does: local listeners, and SPDY in one WebSocket to the pod's host.

Theory of operation
-------------------
One WebSocket (subprotocol ``SPDY/3.1+portforward.k8s.io``, as kubectl speaks it) carries a SPDY connection. Each local
connection gets two streams of it, ``error`` and ``data``, tied by a request id::

    accepted -> streams opened -> bytes both ways, each way half-closed on its own -> the error stream's end: over

The host ends the error stream last, and empty if all went well. A text on it, as for a refused port, is printed, and
that connection alone is reset. When the WebSocket ends, all of them do, and the command fails; a signal ends it too.

Imported by this one command only: asyncio costs more than all of ``hv exec``.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from hypervisor.cli import ws
from hypervisor.cli.connect import connect_any
from hypervisor.cli.output import note
from hypervisor.cli.rest import target
from hypervisor.cli.signals import Interrupted
from hypervisor.cli.state import pod_reference
from hypervisor.errors import HvError, Unavailable
from hypervisor.introspect.spdy.connection import SpdyConnection, SpdyStream

if TYPE_CHECKING:
    from hypervisor.cli.rest import Stream

TUNNEL = "SPDY/3.1+portforward.k8s.io"
RECEIVE = 256 * 1024
HIGH_WATER = 256 * 1024
"""Bytes that wait to be sent before writers do."""
CHUNK = 32 * 1024
MAX_ERROR = 4096
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_forward(state: str, pod: str, ports: Sequence[tuple[int, int]], address: str) -> None:
    """Forwards until a signal comes.

    :param ports: (local port or 0, port in the pod)
    :raises Interrupted: the signal
    :raises HvError: there is no such pod, an address cannot be had, or the connection broke
    """
    namespace, name = pod_reference(pod)
    connection = connect_any(state)
    try:
        ws.handshake(connection, target(("portForward", namespace, name)), (TUNNEL,))
        stream, early = connection.detach()
        stream.setblocking(False)
        asyncio.run(_serve(TunnelTransport(stream, early), ports, address))
    finally:
        connection.close()


class TunnelTransport:
    """A WebSocket's binary messages as the bytes of a `SpdyConnection`; the stream below it is its owner's to close.

    It polls the descriptor itself, since that may be one of TLS. Answers to pings never wait: they are sent from where
    the connection is read, which has to go on while the other side takes nothing.
    """

    def __init__(self, stream: Stream, early: bytes) -> None:
        """
        :param stream: does not block
        :param early: what was read of it already
        """
        self._stream = stream
        self._decoder = ws.Decoder(early)
        self._unsent = bytearray()
        self._sent = asyncio.Event()
        self._gone = False
        self.reason = ""

    async def read(self) -> bytes:
        """The next message; empty at the end, whose `reason` is the peer's if it gave one."""
        while not self._gone:
            opcode, payload = next(self._decoder.messages(), (None, b""))
            if opcode is None:
                data = await self._receive()
                self._gone = self._gone or not data
                self._decoder.feed(data)
            elif opcode == ws.PING:
                self._put(ws.encode(ws.PONG, payload))
            elif opcode == ws.CLOSE:
                self.reason = payload[2:].decode("utf-8", "replace")
                break
            elif opcode == ws.BINARY and payload:
                return payload
        return b""

    async def write(self, data: bytes) -> None:
        """Waits while the peer does not read. :raises ConnectionError: it has gone"""
        self._put(ws.encode(ws.BINARY, data))
        while len(self._unsent) > HIGH_WATER and not self._gone:
            self._sent.clear()
            await self._sent.wait()
        if self._gone:
            raise ConnectionResetError("hostd has gone")

    async def close(self) -> None:
        """Says so, if that can be had without waiting, and lets go of the descriptor."""
        self._put(ws.encode(ws.CLOSE, (1000).to_bytes(2, "big")))
        self._gone = True
        self._sent.set()
        asyncio.get_running_loop().remove_writer(self._stream.fileno())

    async def _receive(self) -> bytes:
        while True:
            try:
                return self._stream.recv(RECEIVE)
            except BlockingIOError:
                await self._readable()
            except OSError:
                return b""

    async def _readable(self) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._stream.fileno(), ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._stream.fileno())

    def _put(self, frame: bytes) -> None:
        if not self._gone:
            self._unsent += frame
            self._flush()

    def _flush(self) -> None:
        loop, fd = asyncio.get_running_loop(), self._stream.fileno()
        try:
            while self._unsent:
                with memoryview(self._unsent) as view:
                    sent = self._stream.send(view[:RECEIVE])
                del self._unsent[:sent]
        except BlockingIOError:
            loop.add_writer(fd, self._flush)
            return
        except OSError:
            self._gone = True
        loop.remove_writer(fd)
        self._sent.set()


class Forwarder:
    """The listeners, and the connections that came to them; a context manager, which ends all of them."""

    def __init__(self, connection: SpdyConnection) -> None:
        self._connection = connection
        self._ids = itertools.count()
        self._servers: list[asyncio.Server] = []
        self._carrying: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Forwarder:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        for server in self._servers:
            server.close()
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    async def listen(self, address: str, local: int, remote: int) -> int:
        """Listens; the port that was taken. :raises HvError: it cannot be had"""

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._carry(reader, writer, remote), name=f"forward {remote}")
            self._carrying.add(task)
            task.add_done_callback(self._carrying.discard)

        try:
            server = await asyncio.start_server(accepted, address, local)
        except OSError as e:
            why = os.strerror(e.errno) if e.errno else str(e)
            raise HvError(f"cannot listen on {joined(address, local)}: {why}") from e
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, remote: int) -> None:
        """One connection, from its acceptance to its end."""
        opened: list[SpdyStream] = []
        try:
            headers = {"port": str(remote), "requestid": str(next(self._ids))}
            opened.append(error := await self._connection.open({"streamtype": "error", **headers}, fin=True))
            opened.append(data := await self._connection.open({"streamtype": "data", **headers}))
            await _converse(error, data, reader, writer, remote)
        except OSError:
            _reset(writer)  # one of the two sides has gone
        finally:
            writer.close()
            for stream in opened:
                stream.abandon()
                with suppress(OSError):
                    await (stream.close() if stream.remote_ended else stream.cancel())


async def _converse(
    error: SpdyStream, data: SpdyStream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, remote: int
) -> None:
    """:raises OSError: one of the two sides has gone"""
    up = asyncio.create_task(_up(reader, data), name="forward-up")
    down = asyncio.create_task(_down(data, writer), name="forward-down")
    ended = asyncio.create_task(_message(error), name="forward-error")
    try:
        while not ended.done():  # the error stream's end is the connection's
            under_way: set[asyncio.Task[Any]] = {ended, *(t for t in (up, down) if not t.done())}
            done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {ended}:
                task.result()
        if message := ended.result():
            note(message)
            _reset(writer)
        elif error.reset and not data.reset:
            note(f"port {remote}: hostd takes no more connections of this command at once")
            _reset(writer)
        else:
            await down
    finally:
        for task in (up, down, ended):
            task.cancel()
        await asyncio.gather(up, down, ended, return_exceptions=True)


async def _up(reader: asyncio.StreamReader, data: SpdyStream) -> None:
    while chunk := await reader.read(CHUNK):
        await data.write(chunk)
    await data.close()


async def _down(data: SpdyStream, writer: asyncio.StreamWriter) -> None:
    while chunk := await data.read():
        writer.write(chunk)
        await writer.drain()
    if data.reset:
        raise ConnectionResetError("reset in the pod")
    writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection such that its client sees that it broke, and drops what was still to be sent."""
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _message(error: SpdyStream) -> str:
    """What is written to an error stream until its end, on one line."""
    text = b""
    while chunk := await error.read():
        text = (text + chunk)[:MAX_ERROR]
    return "".join(c if c.isprintable() else " " for c in text.decode("utf-8", "replace")).strip()


def joined(address: str, port: int) -> str:
    """An address and a port as one writes them."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


async def _serve(transport: TunnelTransport, ports: Sequence[tuple[int, int]], address: str) -> None:
    stopped = _stopped()
    connection = SpdyConnection(transport, server=False)
    reading = asyncio.create_task(connection.run(), name="spdy")
    try:
        async with Forwarder(connection) as forwarder:
            taken = [await forwarder.listen(address, local, remote) for local, remote in ports]
            for port, (_, remote) in zip(taken, ports, strict=True):
                print(f"Forwarding from {joined(address, port)} -> {remote}", flush=True)  # noqa: T201
            waited: set[asyncio.Future[Any]] = {reading, stopped}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not reading.done():
            reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await connection.close()
    if stopped.done():
        raise Interrupted(stopped.result())
    if (error := reading.exception()) is not None:
        raise error
    raise Unavailable(f"the connection to hostd ended: {transport.reason or 'see hv host status'}")


def _stopped() -> asyncio.Future[int]:
    """The signal that asks us to end, once it has come."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()

    def stop(number: int) -> None:
        if not stopped.done():
            stopped.set_result(number)

    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
            loop.add_signal_handler(number, partial(stop, number))
    return stopped
