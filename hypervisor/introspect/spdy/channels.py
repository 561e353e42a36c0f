"""Exec and attach over SPDY: one stream for each channel, named by its ``streamType`` header.

Source: the kubelet's remote command server. Versions differ in how the end is told: ``v4.channel.k8s.io`` writes a
Status as JSON to the error stream, older ones the bare message of a failure. The client opens all streams first; only
when the last has come does the session begin.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Collection
from contextlib import suppress

from hypervisor.errors import ProtocolError
from hypervisor.introspect import session
from hypervisor.introspect.agent import AgentStream, Ending
from hypervisor.introspect.commands import StreamCommand
from hypervisor.introspect.session import ClientEvent, Stdin, StdinEnd
from hypervisor.introspect.spdy.connection import SpdyConnection, SpdyStream, Transport
from hypervisor.introspect.status import status_of_ending
from hypervisor.introspect.websocket import parse_resize

V4 = "v4.channel.k8s.io"
PROTOCOLS = (V4, "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io")
STREAMS_S = 30.0
"""Seconds that a client has to open its streams."""


def expected(command: StreamCommand, protocol: str) -> frozenset[str]:
    """The streams that a client which asked for `command` opens."""
    wanted = {"error": True, "stdin": command.stdin, "stdout": command.stdout}
    wanted["stderr"] = command.stderr and not command.tty
    wanted["resize"] = command.tty and protocol in (V4, "v3.channel.k8s.io")
    return frozenset(name for name, yes in wanted.items() if yes)


async def serve(transport: Transport, protocol: str, command: StreamCommand, agent: AgentStream) -> None:
    """Runs a session with the client at the other end of `transport`; returns when it is over and nothing is left."""
    connection = SpdyConnection(transport, server=True)
    reading = asyncio.create_task(_read(connection), name="spdy")
    try:
        streams = await gather(connection, expected(command, protocol))
        async with connection.asked_after():
            await session.run(SpdyChannels(connection, streams, protocol), agent, command.ending)
            await connection.linger()
    except ProtocolError:
        pass  # the client sees the connection end
    finally:
        await connection.close()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _read(connection: SpdyConnection) -> None:
    with suppress(ProtocolError):  # it ends the connection, which is all that there is to do
        await connection.run()


async def gather(connection: SpdyConnection, names: Collection[str]) -> dict[str, SpdyStream]:
    """The streams of a session, by type.

    :raises ProtocolError: others came, or not all of them in time
    """
    found: dict[str, SpdyStream] = {}
    try:
        async with asyncio.timeout(STREAMS_S):
            while set(names) - set(found):
                stream = await connection.accept()
                if stream is None:
                    raise ProtocolError("SPDY: the client went away before it had opened its streams")
                found[_named(stream, names, found)] = stream
    except TimeoutError:
        missing = ", ".join(sorted(set(names) - set(found)))
        raise ProtocolError(f"SPDY: the client did not open its streams within {STREAMS_S:g} s: {missing}") from None
    return found


def _named(stream: SpdyStream, names: Collection[str], found: Collection[str]) -> str:
    name = stream.headers.get("streamtype", "").lower()
    if name not in names or name in found:
        raise ProtocolError(f"SPDY: a stream of type {name[:40]!r}; expected: {', '.join(sorted(names))}, once each")
    return name


class SpdyChannels:
    """`ClientChannels` over the streams of a connection."""

    def __init__(self, connection: SpdyConnection, streams: dict[str, SpdyStream], protocol: str) -> None:
        self._connection = connection
        self._streams = streams
        self._protocol = protocol

    async def events(self) -> AsyncGenerator[ClientEvent, None]:
        """What comes on stdin and resize, until the client has gone."""
        events: asyncio.Queue[ClientEvent | None] = asyncio.Queue(1)
        tasks = [asyncio.create_task(self._gone(events))]
        if "stdin" in self._streams:
            tasks.append(asyncio.create_task(self._stdin(events)))
        if "resize" in self._streams:
            tasks.append(asyncio.create_task(self._resize(events)))
        try:
            while (event := await events.get()) is not None:
                yield event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def wait_gone(self) -> None:
        await self._connection.wait_over()

    async def _gone(self, events: asyncio.Queue[ClientEvent | None]) -> None:
        await self._connection.wait_over()
        await events.put(None)

    async def _stdin(self, events: asyncio.Queue[ClientEvent | None]) -> None:
        stream = self._streams["stdin"]
        while data := await stream.read():
            await events.put(Stdin(data))
        if not stream.reset:
            await events.put(StdinEnd())

    async def _resize(self, events: asyncio.Queue[ClientEvent | None]) -> None:
        buffer = b""
        decoder = json.JSONDecoder()
        while data := await self._streams["resize"].read():
            # Sizes follow each other without any mark between them.
            buffer = (buffer + data)[-4096:].lstrip()
            while buffer:
                try:
                    _, end = decoder.raw_decode(buffer.decode("utf-8", "replace"))
                except (ValueError, RecursionError):
                    break
                event = parse_resize(buffer[:end])
                buffer = buffer[end:].lstrip()
                if event is not None:
                    await events.put(event)

    async def send_stdout(self, data: bytes) -> None:
        await self._send("stdout", data)

    async def send_stderr(self, data: bytes) -> None:
        await self._send("stderr", data)

    async def _send(self, name: str, data: bytes) -> None:
        stream = self._streams.get(name)
        if stream is not None:
            await stream.write(data)

    async def send_ending(self, ending: Ending) -> None:
        """The output streams end, then the status is written, then the error stream ends."""
        if ending.error is not None and ending.exit_code in (126, 127):
            await self._send("stderr", f"{ending.error}\n".encode())
        for name in ("stdout", "stderr"):
            if name in self._streams:
                await self._streams[name].close()
        status = status_of_ending(ending)
        if self._protocol == V4:
            await self._streams["error"].write(json.dumps(status).encode())
        elif status.get("status") != "Success":
            await self._streams["error"].write(str(status.get("message", "")).encode())
        await self._streams["error"].close()
