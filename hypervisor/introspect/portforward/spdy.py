"""Port-forward over SPDY: a data and an error stream for each connection, tied by ``requestID``.

Source: the kubelet's port-forward server (``portforward.k8s.io``). A client opens the error stream first, then the data
stream with the same id; each carries the port in a header. An error stream that stays empty until its end says that all
went well.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from hypervisor.errors import HvError, ProtocolError
from hypervisor.introspect.agent import AgentClient
from hypervisor.introspect.portforward.forward import forward, port_number
from hypervisor.introspect.spdy.connection import SpdyConnection, SpdyStream, Transport

PROTOCOL = "portforward.k8s.io"
PARTNER_S = 30.0
"""Seconds that a client has to open the second stream of a pair."""


class StreamLink:
    """`Link` over the two streams of a connection."""

    def __init__(self, data: SpdyStream, error: SpdyStream) -> None:
        self._data = data
        self._error = error

    async def read(self) -> bytes:
        return await self._data.read()

    async def write(self, data: bytes) -> None:
        await self._data.write(data)

    async def close(self) -> None:
        await self._data.close()

    async def cut(self) -> None:
        await self._data.cancel()

    async def fail(self, message: str) -> None:
        await self._error.write(message.encode())


class SpdyForwarder:
    """Serves a client's connection until it goes."""

    def __init__(self, connection: SpdyConnection, agent: AgentClient) -> None:
        self._connection = connection
        self._agent = agent
        self._waiting: dict[str, SpdyStream] = {}

    async def run(self) -> None:
        """Carries connections, many at once, until the client has gone; all of them end with it."""
        reading = asyncio.create_task(self._read(), name="spdy")
        try:
            async with asyncio.TaskGroup() as group:
                while (stream := await self._connection.accept()) is not None:
                    self._take(stream, group)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self) -> None:
        with suppress(ProtocolError):  # it ends the connection, which is all that there is to do
            await self._connection.run()

    def _take(self, stream: SpdyStream, group: asyncio.TaskGroup) -> None:
        kind, request = stream.headers.get("streamtype", ""), _request_of(stream)
        partner = self._waiting.get(request)
        if kind not in ("data", "error") or (partner is not None and partner.headers.get("streamtype") == kind):
            group.create_task(_quietly(stream.cancel()))
            return
        if partner is None:
            self._waiting[request] = stream
            group.create_task(self._expire(request, stream))
            return
        del self._waiting[request]
        data, error = (stream, partner) if kind == "data" else (partner, stream)
        group.create_task(self._carry(data, error), name=f"forward {request}")

    async def _expire(self, request: str, stream: SpdyStream) -> None:
        await asyncio.wait([asyncio.ensure_future(self._connection.wait_over())], timeout=PARTNER_S)
        if self._waiting.get(request) is stream:
            del self._waiting[request]
            await _quietly(stream.cancel())

    async def _carry(self, data: SpdyStream, error: SpdyStream) -> None:
        link = StreamLink(data, error)
        try:
            await forward(self._agent, port_number(data.headers.get("port", "")), link)
        except HvError as e:
            await _quietly(link.fail(str(e)))
        except OSError:
            pass  # the client has gone
        finally:
            data.abandon()
            await _quietly(data.close())
            await _quietly(error.close())


def _request_of(stream: SpdyStream) -> str:
    """The id; clients older than it take the stream's number: error streams are odd ones, data follows by two."""
    given = stream.headers.get("requestid", "")
    if given:
        return given
    return str(stream.number if stream.headers.get("streamtype") == "error" else stream.number - 2)


async def _quietly(call: object) -> None:
    """For what is only courtesy towards a client that may have gone."""
    with suppress(OSError):
        await call  # type: ignore[misc]


async def serve(transport: Transport, agent: AgentClient) -> None:
    """Serves the client at the other end of `transport` until it goes."""
    connection = SpdyConnection(transport, server=True)
    try:
        async with connection.asked_after():
            await SpdyForwarder(connection, agent).run()
    finally:
        await connection.close()
