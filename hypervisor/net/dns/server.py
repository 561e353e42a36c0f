"""The sockets of a host's name server: UDP and TCP on one port of the address that every tap has.

Only this host's pods are answered, and only those whose policies let them ask; anyone else's packets are not even read
as questions. Each pod has so many questions open at once and no more, so that one cannot keep the others from asking.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import cast

from hypervisor.errors import HostUnfit
from hypervisor.net.dns.answer import TCP_MOST, Answerer, Transport

MayAsk = Callable[[str, Transport], bool]
"""Whether an address is a pod's of this host that may ask."""

OPEN_OF_ONE, OPEN_TCP_OF_ONE = 32, 8
IDLE_S = 10.0
_IP_FREEBIND = 15
_TRIES = 20


class NameServer:
    """Serves questions. `opened` makes it; its tasks end with the block."""

    def __init__(self, answerer: Answerer, may_ask: MayAsk) -> None:
        self._answerer = answerer
        self._may_ask = may_ask
        self._open: Counter[tuple[str, Transport]] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    @classmethod
    @asynccontextmanager
    async def opened(cls, answerer: Answerer, may_ask: MayAsk, address: str) -> AsyncIterator[NameServer]:
        """While the block lasts it is served, on a port that was free.

        :raises HostUnfit: the address cannot be listened at
        """
        server = cls(answerer, may_ask)
        loop = asyncio.get_running_loop()
        udp, tcp = _sockets(address)
        server.port = udp.getsockname()[1]
        try:
            transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(server), sock=udp)
            listening = await asyncio.start_server(server._connection, sock=tcp)
        except BaseException:
            udp.close()
            tcp.close()
            raise
        try:
            yield server
        finally:
            transport.close()
            listening.close()
            await server._close()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _enter(self, address: str, transport: Transport, most: int) -> bool:
        if not self._may_ask(address, transport) or self._open[address, transport] >= most:
            return False
        self._open[address, transport] += 1
        return True

    def _leave(self, address: str, transport: Transport) -> None:
        self._open[address, transport] -= 1
        if not self._open[address, transport]:
            del self._open[address, transport]

    # ---- UDP ---------------------------------------------------------------------------------------------------------

    def datagram(self, data: bytes, sender: tuple[str, int], transport: asyncio.DatagramTransport) -> None:
        """One came. Beyond what a pod may have open it is dropped: resolvers ask again."""
        if self._enter(sender[0], "udp", OPEN_OF_ONE):
            task = asyncio.create_task(self._one(data, sender, transport), name="a pod's question")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _one(self, data: bytes, sender: tuple[str, int], transport: asyncio.DatagramTransport) -> None:
        try:
            answer = await self._answerer.answer(data, "udp")
            if answer is not None and not transport.is_closing():
                transport.sendto(answer, sender)
        finally:
            self._leave(sender[0], "udp")

    # ---- TCP ---------------------------------------------------------------------------------------------------------

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        address = (writer.get_extra_info("peername") or ("",))[0]
        if task is None or not self._enter(address, "tcp", OPEN_TCP_OF_ONE):
            writer.close()
            return
        self._tasks.add(task)
        try:
            with suppress(OSError, EOFError, TimeoutError):
                while await self._exchange(reader, writer):
                    pass
        except asyncio.CancelledError:
            if task.cancelling():  # the server ends: start_server's own handler would log it as an error
                return
            raise
        finally:
            self._tasks.discard(task)
            self._leave(address, "tcp")
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        async with asyncio.timeout(IDLE_S):
            (length,) = struct.unpack(">H", await reader.readexactly(2))
            data = await reader.readexactly(length)
        answer = await self._answerer.answer(data, "tcp")
        if answer is None:
            return False
        writer.write(struct.pack(">H", len(answer[:TCP_MOST])) + answer[:TCP_MOST])
        async with asyncio.timeout(IDLE_S):
            await writer.drain()
        return True


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: NameServer) -> None:
        self._server = server
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if self._transport is not None:
            self._server.datagram(data, addr, self._transport)


def _sockets(address: str) -> tuple[socket.socket, socket.socket]:
    """One port of both protocols; the address need not be there yet, as no pod is."""
    error: OSError | None = None
    for _ in range(_TRIES):
        try:
            tcp = _bound(socket.SOCK_STREAM, address, 0)
        except OSError as failed:
            raise HostUnfit(f"the pods' name server cannot listen at {address}: {failed.strerror}") from failed
        try:
            return _bound(socket.SOCK_DGRAM, address, tcp.getsockname()[1]), tcp
        except OSError as failed:
            tcp.close()
            error = failed
    raise HostUnfit(f"the pods' name server finds no free port at {address}") from error


def _bound(kind: socket.SocketKind, address: str, port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)
    try:
        made.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        made.bind((address, port))
        return made
    except BaseException:
        made.close()
        raise
