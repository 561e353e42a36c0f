"""The agent's call ``dial`` without a guest: ports of this machine stand for those of a pod."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from hypervisor.agent.wire import Frame, FrameType
from hypervisor.errors import Unavailable
from hypervisor.introspect.agent import Ending


class Dialled:
    """A connection to a port, as `AgentStream` has it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._sent_all = asyncio.Event()
        self.ending: Ending | None = None

    async def frames(self) -> AsyncIterator[Frame]:
        try:
            while data := await self._reader.read(65536):
                yield Frame(FrameType.STDOUT, data)
        except ConnectionResetError as e:
            self.ending = Ending(1, error=Unavailable(str(e)))
            return
        yield Frame(FrameType.STDOUT, b"")
        await self._sent_all.wait()

    async def send_stdin(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def close_stdin(self) -> None:
        self._writer.write_eof()
        self._sent_all.set()


class ThisMachine:
    """As much of `AgentClient` as port-forward needs."""

    @asynccontextmanager
    async def asked(self, call: str, args: dict[str, Any]) -> AsyncIterator[Dialled]:
        assert call == "dial"
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", args["port"])
        except OSError as e:
            raise Unavailable(f"port {args['port']} in the pod: Connection refused") from e
        try:
            yield Dialled(reader, writer)
        finally:
            writer.transport.abort()
