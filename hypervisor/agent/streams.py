"""Moving bytes between pipes or terminals and connections, with bounded memory.

A `Pump` reads a descriptor and hands each chunk to a *sink*, a plain function. The sink returns None when it has taken
the chunk, or an awaitable that ends when it has room again; until then the pump does not read, the pipe fills, and the
writing process waits. Nothing is ever thrown away, and nobody buffers more than one chunk a stream.

Both classes own their descriptor.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

CHUNK = 64 * 1024

Sink = Callable[[bytes], Awaitable[None] | None]


class Pump:
    """Reads `fd` (made non-blocking) to its end.

    States: reading -> (waiting for the sink -> reading)* -> ended. `drain` is asked for when the writer has ended: what
    is in the pipe is still delivered, but the pump no longer waits for others who hold the pipe open.
    """

    def __init__(self, fd: int, sink: Sink) -> None:
        os.set_blocking(fd, False)
        self._loop = asyncio.get_running_loop()
        self._fd = fd
        self._sink = sink
        self._draining = False
        self._waiting: asyncio.Task[None] | None = None
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(fd, self._read)

    def fileno(self) -> int:
        """The descriptor while it is open, else -1."""
        return -1 if self.ended.done() else self._fd

    def drain(self) -> None:
        """Ends as soon as the pipe is empty, whoever still holds its other end."""
        self._draining = True
        if self._waiting is None and not self.ended.done():
            self._read()

    def close(self) -> None:
        """Stops at once; harmless when it has ended."""
        if self.ended.done():
            return
        if self._waiting is not None:
            self._waiting.cancel()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self.ended.set_result(None)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._fd, CHUNK)
            except BlockingIOError:
                if self._draining:
                    self.close()
                return None
            except OSError:  # EIO: the terminal's last user has gone
                data = b""
            if not data:
                return self.close()
            room = self._sink(data)
            if room is not None:
                self._loop.remove_reader(self._fd)
                self._waiting = self._loop.create_task(self._wait(room))
                return None
            if not self._draining:
                return None

    async def _wait(self, room: Awaitable[None]) -> None:
        try:
            await asyncio.shield(room)  # others may wait for the same room
        finally:
            self._waiting = None
        if self.ended.done():
            return
        self._loop.add_reader(self._fd, self._read)
        if self._draining:
            self._read()


class PipeWriter:
    """Writes to `fd` (made non-blocking). A reader that has gone is no error: what nobody reads is dropped."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._loop = asyncio.get_running_loop()
        self._fd = fd
        self._busy: asyncio.Task[None] | None = None

    @property
    def closed(self) -> bool:
        """Nothing more can be written."""
        return self._fd < 0

    def write(self, data: bytes) -> Awaitable[None] | None:
        """Writes `data`; returns None when all of it went, else an awaitable of that. One write at a time."""
        rest = self._write_some(data)
        if not rest:
            return None
        self._busy = self._loop.create_task(self._write_rest(rest))
        return self._busy

    def close(self) -> None:
        """End of file for the reader; what a pending `write` still holds is dropped."""
        if self._busy is not None:
            self._busy.cancel()
            self._busy = None
        if self._fd >= 0:
            self._loop.remove_writer(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _write_some(self, data: bytes) -> bytes:
        if self._fd < 0:
            return b""
        try:
            return data[os.write(self._fd, data) :]
        except BlockingIOError:
            return data
        except OSError:  # EPIPE: the reader has gone; EIO: so has the terminal
            self._fd_broken()
            return b""

    def _fd_broken(self) -> None:
        self._loop.remove_writer(self._fd)
        os.close(self._fd)
        self._fd = -1

    async def _write_rest(self, rest: bytes) -> None:
        while rest and self._fd >= 0:
            writable: asyncio.Future[None] = self._loop.create_future()
            self._loop.add_writer(self._fd, _done, writable)
            try:
                await writable
            finally:
                if self._fd >= 0:
                    self._loop.remove_writer(self._fd)
            rest = self._write_some(rest)
        self._busy = None


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
