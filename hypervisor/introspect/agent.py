"""The typed client of the pod VM agent: one method a call, over AF_VSOCK.

Each call has a connection to itself, so that no call waits behind another and a broken one takes nothing with it: a
new one (0.6 ms under TCG), or for a unary call one that an earlier call has left (`hypervisor.introspect.kept`). The
protocol is `hypervisor.agent.wire`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from hypervisor.agent import wire
from hypervisor.agent.wire import Frame, FrameType
from hypervisor.errors import (
    Conflict,
    HvError,
    InvalidInput,
    NotFound,
    ProtocolError,
    ResourceExhausted,
    Timeout,
    Unavailable,
)
from hypervisor.introspect.kept import KeptConnections
from hypervisor.vsock.address import VsockAddress
from hypervisor.vsock.connect import connect

CONNECT_TIMEOUT = 5.0
CALL_TIMEOUT = 30.0
BEGIN_TIMEOUT = 120.0
"""Until a streaming call has begun: of hundreds at once on a slow machine, each waits for those before it."""

_REASONS: dict[str, type[HvError]] = {
    "Invalid": InvalidInput,
    "NotFound": NotFound,
    "Conflict": Conflict,
    "ResourceExhausted": ResourceExhausted,
    "Unavailable": Unavailable,
}


def error_from(body: dict[str, Any]) -> HvError:
    """The exception that an agent's error object stands for; an unknown reason is a plain `HvError`."""
    kind = _REASONS.get(str(body.get("reason")), HvError)
    return kind(str(body.get("message", "the agent gave no reason")))


@dataclass(frozen=True)
class Ending:
    """How a streaming call ended.

    :ivar exit_code: 0-255; 128 + n when signal n ended the process; 126 and 127 as in a shell
    :ivar error: what went wrong outside of the process, when something did
    """

    exit_code: int
    signal: int | None = None
    error: HvError | None = None

    @classmethod
    def of(cls, body: dict[str, Any]) -> Ending:
        error = body.get("error")
        return cls(
            exit_code=int(body.get("exit_code") or 0),
            signal=body.get("signal"),
            error=error_from(error) if isinstance(error, dict) else None,
        )


class AgentStream:
    """A connection to the agent. One reader and one writer at a time; not thread-safe."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._unanswered: str | None = None  # the call that was asked for and neither accepted nor refused yet
        self.ending: Ending | None = None  # set once END has come

    async def send(self, kind: FrameType, payload: bytes = b"") -> None:
        """One frame; waits while the agent does not read (back-pressure).

        :raises Unavailable: the connection broke
        """
        await self._write(wire.pack(kind, payload))

    async def send_stdin(self, data: bytes) -> None:
        """`data` of any length as STDIN frames; empty data sends nothing (see `close_stdin`)."""
        for start in range(0, len(data), wire.MAX_DATA):
            await self._write(wire.pack(FrameType.STDIN, data[start : start + wire.MAX_DATA]))

    async def close_stdin(self) -> None:
        """End of file on the process's standard input."""
        await self._write(wire.pack(FrameType.STDIN))

    async def resize(self, columns: int, rows: int) -> None:
        """The terminal's new size in characters."""
        await self._write(wire.pack_resize(columns, rows))

    async def _write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as e:
            raise Unavailable(f"the connection to the pod VM agent broke: {e}") from e

    async def receive(self) -> Frame:
        """The next frame.

        :raises Unavailable: the connection ended
        :raises ProtocolError: the agent broke the protocol
        """
        try:
            kind, length = wire.parse_header(await self._reader.readexactly(wire.HEADER.size))
            return Frame(kind, await self._reader.readexactly(length) if length else b"")
        except wire.WireError as e:
            raise ProtocolError(f"pod VM agent: {e}") from e
        except (asyncio.IncompleteReadError, OSError) as e:
            raise Unavailable("the pod VM agent closed the connection (VM stopped, or device process replaced)") from e

    async def request(self, call: str, args: dict[str, Any]) -> dict[str, Any]:
        """Sends a request and gives its result.

        :raises HvError: the agent refused; the class says why (see `error_from`)
        """
        await self.ask(call, args)
        return await self._answer(call)

    async def ask(self, call: str, args: dict[str, Any]) -> None:
        """Sends a streaming call's request without waiting for the answer, which `frames` does. What is sent until then
        is dropped if the agent refuses."""
        try:
            data = wire.pack_json(FrameType.REQUEST, {"v": wire.VERSION, "call": call, "args": args})
        except wire.WireError as e:
            raise InvalidInput(f"{call}: the request is too long for the agent: {e}") from e
        self._unanswered = call
        await self._write(data)

    async def accepted(self) -> None:
        """Waits until the call that was asked for has begun; raises as `request`."""
        if (call := self._unanswered) is None:
            return
        try:
            async with asyncio.timeout(BEGIN_TIMEOUT):
                await self._answer(call)
        except TimeoutError as e:
            raise Timeout(f"the pod VM agent did not answer {call} within {BEGIN_TIMEOUT:g} s") from e

    async def _answer(self, call: str) -> dict[str, Any]:
        self._unanswered = None
        frame = await self.receive()
        if frame.type is not FrameType.RESPONSE:
            raise ProtocolError(f"pod VM agent: {call} was answered with a {frame.type.name} frame")
        body = parse_object(frame.payload)
        if not body.get("ok"):
            raise error_from(body.get("error") or {})
        result = body.get("result")
        return result if isinstance(result, dict) else {}

    async def frames(self) -> AsyncIterator[Frame]:
        """Every frame up to, not including, END; afterwards `ending` is set. Raises as `request` if the call was not
        accepted yet and is refused."""
        await self.accepted()
        while True:
            frame = await self.receive()
            if frame.type is FrameType.END:
                self.ending = Ending.of(parse_object(frame.payload))
                return
            yield frame

    @property
    def alive(self) -> bool:
        """Nothing has been seen of the agent's side closing it."""
        return not (self._writer.is_closing() or self._reader.at_eof())

    def abort(self) -> None:
        """As `close`, without waiting until it has happened."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Ends the connection at once: what the agent has not taken (a process may never read its input) is dropped.
        Never raises for a peer that has gone."""
        self.abort()
        with suppress(OSError):
            await self._writer.wait_closed()


def parse_object(payload: bytes) -> dict[str, Any]:
    """A JSON frame's object; a broken one is a `ProtocolError`."""
    try:
        return wire.parse_json(payload)
    except wire.WireError as e:
        raise ProtocolError(f"pod VM agent: {e}") from e


class AgentClient:
    """The agent of one VM. Holds no connection of its own; safe to share between tasks.

    :param kept: where connections that unary calls are done with wait for the next one; None: they are closed
    """

    def __init__(self, address: VsockAddress, kept: KeptConnections | None = None) -> None:
        self.address = address
        self._kept = kept

    @asynccontextmanager
    async def open(self) -> AsyncIterator[AgentStream]:
        """A connection, closed on the way out.

        :raises Unavailable: the agent does not listen (yet); `Timeout` within `CONNECT_TIMEOUT` seconds
        """
        stream = await self._connect()
        try:
            yield stream
        finally:
            await stream.close()

    async def _connect(self) -> AgentStream:
        return AgentStream(*await connect(self.address, wire.AGENT_PORT, timeout=CONNECT_TIMEOUT))

    async def call(
        self, call: str, args: dict[str, Any] | None = None, *, timeout: float = CALL_TIMEOUT
    ) -> dict[str, Any]:
        """A unary call.

        :param timeout: seconds for the whole call, the connection included
        :raises Timeout: no answer in time; whether the call took effect is unknown
        """
        try:
            async with asyncio.timeout(timeout):
                return await self._ask(call, args or {})
        except TimeoutError as e:
            raise Timeout(f"the pod VM agent did not answer {call} within {timeout:g} s") from e

    async def _ask(self, call: str, args: dict[str, Any]) -> dict[str, Any]:
        stream = self._kept.take(self.address) if self._kept is not None else None
        stream = stream or await self._connect()
        answered = False
        try:
            result = await stream.request(call, args)
            answered = True
        finally:
            if answered and self._kept is not None:
                self._kept.give(self.address, stream)
            else:
                await stream.close()
        return result

    @asynccontextmanager
    async def stream(self, call: str, args: dict[str, Any]) -> AsyncIterator[AgentStream]:
        """A streaming call that the agent has accepted; refused ones raise as `AgentStream.request`."""
        async with self.asked(call, args) as stream:
            await stream.accepted()
            yield stream

    @asynccontextmanager
    async def asked(self, call: str, args: dict[str, Any]) -> AsyncIterator[AgentStream]:
        """A streaming call that the agent may still refuse (see `AgentStream.ask`)."""
        async with self.open() as stream:
            await stream.ask(call, args)
            yield stream

    async def hello(self, *, timeout: float = CALL_TIMEOUT) -> dict[str, Any]:
        """Version, kernel, boot id, uptime and clock of the guest."""
        return await self.call("hello", timeout=timeout)

    async def setup(self, settings: dict[str, Any]) -> None:
        """Clock, entropy, host name, network, disks and volumes; once per boot."""
        await self.call("setup", settings)

    async def start(self, spec: dict[str, Any], *, timeout: float = 60.0) -> dict[str, Any]:
        """Creates and starts a container; see docs/wire-protocol.md for `spec`."""
        return await self.call("container.start", spec, timeout=timeout)

    async def stop(self, name: str, grace_s: float) -> dict[str, Any]:
        """SIGTERM (or the image's stop signal), `grace_s` seconds, SIGKILL; answers when the container has ended."""
        return await self.call("container.stop", {"name": name, "grace_s": grace_s}, timeout=grace_s + CALL_TIMEOUT)

    async def remove(self, name: str) -> None:
        """Forgets an ended container and its writable layer."""
        await self.call("container.remove", {"name": name})

    async def list(self) -> list[dict[str, Any]]:
        """Every container with its state."""
        found = (await self.call("container.list")).get("containers", [])
        return [c for c in found if isinstance(c, dict)]

    async def stats(self) -> dict[str, Any]:
        """CPU, memory, processes and disk of each container and of the guest."""
        return await self.call("container.stats")

    async def shutdown(self, grace_s: float) -> None:
        """Stops the containers, syncs, unmounts, powers off; answers before the power goes."""
        await self.call("shutdown", {"grace_s": grace_s}, timeout=grace_s + CALL_TIMEOUT)

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """A snapshot, then every change, until the connection ends (which raises `Unavailable`)."""
        async with self.stream("events", {}) as stream:
            async for frame in stream.frames():
                yield parse_object(frame.payload)
