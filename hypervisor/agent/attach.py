"""``attach``: a client on the streams of a container's first process; ``logs`` and ``logs.archive``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from typing import Any

from . import logs
from .container import Client, Container
from .engine import Engine
from .errors import invalid, not_found
from .exec import resize
from .fields import Fields
from .logs import EntryReader, Formatter, Selection
from .server import Connection
from .spec import parse_name
from .storage import LOGS
from .wire import Frame, FrameType

_FRAMES = {b"stdout": FrameType.STDOUT, b"stderr": FrameType.STDERR}


# ---- attach ----------------------------------------------------------------------------------------------------------


class Attachment(Client):
    """A client attached to a container.

    With `replay` the log is sent first, and meanwhile the output waits (`deliver` returns the end of the replay). So
    nothing is doubled and nothing is missed: each chunk is in the log before it is delivered, and the log is replayed
    up to where it ended when this object joined the clients.
    """

    def __init__(self, connection: Connection, container: Container, streams: tuple[bool, bool], stdin: bool) -> None:
        self._connection = connection
        self._container = container
        self._wanted = {b"stdout": streams[0], b"stderr": streams[1]}
        self._stdin = stdin
        self._caught_up: asyncio.Future[None] | None = None

    def deliver(self, stream: bytes, data: bytes) -> Awaitable[None] | None:
        """A chunk of live output."""
        if not self._wanted[stream] or self._connection.lost:
            return None
        if self._caught_up is not None:
            return self._deliver_later(_FRAMES[stream], data, self._caught_up)
        return self._connection.send(_FRAMES[stream], data)

    async def _deliver_later(self, kind: FrameType, data: bytes, caught_up: asyncio.Future[None]) -> None:
        await asyncio.shield(caught_up)
        room = self._connection.send(kind, data)
        if room is not None:
            await asyncio.shield(room)

    def join(self, replay: bool) -> list[EntryReader]:
        """Joins the container's clients; gives what there is to replay."""
        self._container.streams.clients.append(self)
        if not replay:
            return []
        self._caught_up = asyncio.get_running_loop().create_future()
        return logs.open_files(self._container.log_directory, self._container.attempt)

    async def replay(self, readers: list[EntryReader]) -> None:
        """Sends the log as it was at `join`."""
        try:
            ends = [size_of(reader) for reader in readers]
            for reader, end in zip(readers, ends, strict=True):
                while entries := reader.read(end):
                    for entry in entries:
                        if self._wanted[entry.stream]:
                            await self._connection.send_all(_FRAMES[entry.stream], entry.content)
        finally:
            for reader in readers:
                reader.close()
            if self._caught_up is not None:
                self._caught_up.set_result(None)
                self._caught_up = None

    def leave(self) -> None:
        """The client has gone, or the container has."""
        self._container.streams.clients.remove(self)
        stdin = self._container.streams.stdin
        if self._stdin and self._container.spec.stdin_once and stdin is not None:
            stdin.close()

    def consume(self, frame: Frame) -> Awaitable[None] | None:
        """One frame of the client."""
        if frame.type is FrameType.STDIN:
            return self._take_input(frame.payload)
        if frame.type is FrameType.RESIZE:
            resize(self._container.streams.terminal, frame.payload)
            return None
        raise invalid(f"{frame.type.name} frame in an attach")

    def _take_input(self, data: bytes) -> Awaitable[None] | None:
        stdin = self._container.streams.stdin
        if not self._stdin or stdin is None:
            return None
        if data:
            return stdin.write(data)
        if self._container.spec.stdin_once and not self._container.spec.tty:
            stdin.close()
        return None


def size_of(reader: EntryReader) -> int:
    """The length of a reader's file now."""
    return os.fstat(reader.file.fileno()).st_size


async def run_attach(args: dict[str, Any], connection: Connection, engine: Engine) -> None:
    """The call."""
    fields = Fields(args, "attach")
    container = engine.get(parse_name(fields, "container"))
    stdin, replay = fields.flag("stdin"), fields.flag("replay")
    streams = fields.flag("stdout"), fields.flag("stderr")
    fields.done()
    if stdin and not container.spec.stdin:
        raise invalid(f"container {container.name}: was started without stdin, so nothing can be written to it")
    attachment = Attachment(connection, container, streams, stdin)
    connection.accept({})
    readers = attachment.join(replay)
    try:
        await attachment.replay(readers)
        connection.consume(attachment.consume)
        await container.exited.wait()
        connection.end(exit_code=container.exit_code, signal=container.signal, error=None)
    finally:
        attachment.leave()


# ---- logs ------------------------------------------------------------------------------------------------------------


async def run_logs(args: dict[str, Any], connection: Connection, engine: Engine) -> None:
    """The call."""
    fields = Fields(args, "logs")
    container = engine.get(parse_name(fields, "container"))
    previous, follow = fields.flag("previous"), fields.flag("follow")
    selection = Selection(
        tail=fields.integer("tail", None),
        since_ns=fields.integer("since_ns", None, high=2**62),
        limit_bytes=fields.integer("limit_bytes", None),
        timestamps=fields.flag("timestamps"),
    )
    fields.done()
    attempt = _attempt(container, previous)
    reader = LogReading(container, attempt, selection)
    connection.accept({})
    try:
        await reader.send(connection, follow and not previous)
        connection.end()
    finally:
        reader.close()


def _attempt(container: Container, previous: bool) -> int:
    if not previous:
        return container.attempt
    older = [a for a in logs.attempts(container.log_directory) if a < container.attempt]
    if not older:
        raise not_found(f"container {container.name}: no log of a previous instance")
    return older[-1]


class LogReading:
    """One reading of a log: what is there, and, when following, what comes until the container has ended."""

    def __init__(self, container: Container, attempt: int, selection: Selection) -> None:
        self._container = container
        self._formatter = Formatter(selection)
        self._generation = container.streams.log.generation
        try:
            self._readers = logs.open_files(container.log_directory, attempt)
        except OSError:
            self._readers = []
        if selection.tail is not None:
            logs.seek_tail(self._readers, selection.tail)

    def close(self) -> None:
        """Closes the files."""
        for reader in self._readers:
            reader.close()

    async def send(self, connection: Connection, follow: bool) -> None:
        """Sends the text to `connection`."""
        while not self._formatter.done:
            changed = self._container.streams.changed
            ended = self._container.exited.is_set()
            if await self._send_present(connection) or self._advance():
                continue
            if ended or not follow:
                return
            await changed.wait()

    async def _send_present(self, connection: Connection) -> bool:
        """One block of the oldest file that still has one; False at the end of the newest."""
        while self._readers:
            if entries := self._readers[0].read():
                await connection.send_all(FrameType.STDOUT, self._formatter.format(entries))
                return True
            if len(self._readers) == 1:
                return False
            self._readers.pop(0).close()
        return False

    def _advance(self) -> bool:
        """After the end of the newest file known: opens the one that the writer has gone on in, if it has."""
        log = self._container.streams.log
        if self._readers and log.generation == self._generation:
            return False
        fresh = logs.open_files(log.directory, log.attempt) if log.generation or not self._readers else []
        missed = log.generation - self._generation if self._readers else len(fresh)
        for stale in fresh[:-missed] if missed < len(fresh) else []:
            stale.close()
        fresh = fresh[-missed:] if missed else []
        self._generation = log.generation
        if fresh:
            self.close()
            self._readers = fresh
        return bool(fresh)


# ---- archive of all logs ---------------------------------------------------------------------------------------------


async def run_logs_archive(args: dict[str, Any], connection: Connection, engine: Engine) -> None:
    """The call: a tar of every log file, for the host to keep when the VM goes."""
    Fields(args, "logs.archive").done()
    from .archive import send_tree

    connection.accept({})
    await send_tree(LOGS, connection, engine.reaper)
    connection.end()
