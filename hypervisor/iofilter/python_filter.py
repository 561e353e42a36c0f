"""Filters in Python: a class whose ``request`` is called for each I/O request of a virtual disk.

The class lives in a process of its own and serves a Unix socket; the filter ``python`` of a disk
(``csrc/iofilter/filters/python/``) connects to it. So it is slow (a few thousand requests a second) and safe: what goes
wrong here is EIO there, with the reason in the log, and never a disk that hangs or a crash of the device process.

A class::

    class Upper(Filter):
        async def request(self, r: Request) -> None:
            if r.type is RequestType.READ:
                r.end((await r.below()).upper())

    $ python -m hypervisor.iofilter.python_filter mymodule:Upper /run/upper.sock
    $ hv disk filter add DISK python socket=/run/upper.sock
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import enum
import errno
import importlib
import logging
import os
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from hypervisor.errors import InvalidInput

_log = logging.getLogger(__name__)
_MAGIC = 0x31595650
_HEAD = struct.Struct("<IIQQQIIII")
_LONGEST = 64 << 20
_REQUEST, _PASS, _END, _BELOW, _RESULT = 1, 2, 3, 4, 5


class RequestType(enum.IntEnum):
    """What a request wants."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_ZEROES = 4


class Flag(enum.IntFlag):
    """How it wants it."""

    FUA = 1
    UNMAP = 2


class Request:
    """A request that came to the filter. Exactly one of `pass_on` and `end` ends it; `below` may come before `end`.

    A ``request`` that returns without either passes the request on, or, after `below`, ends it with what came from
    there.

    :ivar offset: bytes, with `length` the range; both 0 for a flush
    :ivar data: a write's bytes (a copy: the guest cannot change them any more); empty for other types
    """

    def __init__(self, connection: _Connection, head: _Head, data: bytes) -> None:
        self._connection, self._head = connection, head
        self.type, self.flags = RequestType(head.type), Flag(head.flags)
        self.offset, self.length, self.data = head.offset, head.length, data
        self._over = False
        self._result: asyncio.Future[bytes] | None = None

    def pass_on(self) -> None:
        """Sends it on as it came. Nothing is heard of it afterwards."""
        self._answer(_PASS)

    def end(self, data: bytes = b"", *, error: int = 0) -> None:
        """It is over.

        :param data: of a read: its bytes, as many as it asked for; b"": what `below` read, or zeroes
        :param error: 0 or a positive errno
        """
        if data and (self.type is not RequestType.READ or len(data) != self.length):
            raise ValueError(f"{len(data)} bytes do not fit a {self.type.name} of {self.length}")
        self._answer(_END, data, error)

    async def below(self, data: bytes = b"") -> bytes:
        """Does it downstream, and returns a read's bytes. Raises `OSError` with what went wrong there.

        :param data: of a write: the bytes to write in place of its own, as many
        """
        if data and (self.type is not RequestType.WRITE or len(data) != self.length):
            raise ValueError(f"{len(data)} bytes do not fit a {self.type.name} of {self.length}")
        if self._result is not None and not self._result.done():
            raise RuntimeError("it is downstream already")
        self._check()
        self._result = asyncio.get_running_loop().create_future()
        self._connection.send(self._head, _BELOW, data, 0)
        return await self._result

    def _check(self) -> None:
        if self._over:
            raise RuntimeError("this request was answered already")

    def _answer(self, verb: int, data: bytes = b"", error: int = 0) -> None:
        self._check()
        if verb == _PASS and self._result is not None:
            raise RuntimeError("what was sent downstream cannot be passed on as well: end it")
        self._over = True
        self._connection.send(self._head, verb, data, error)

    def _came_back(self, head: _Head, data: bytes) -> None:
        if self._result is None or self._result.done():
            raise ConnectionError("a result that nobody asked for")
        if head.error:
            self._result.set_exception(OSError(head.error, os.strerror(head.error)))
        else:
            self._result.set_result(data)

    def _finish(self) -> None:
        if self._over:
            return
        if self._result is None:
            self.pass_on()
        else:
            self.end()

    def _failed(self, error: Exception) -> None:
        if not self._over:
            code = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
            self.end(error=code)


class Filter:
    """A filter; a subclass says what it does. One object serves all disks that connect to it, one task a request."""

    async def request(self, r: Request) -> None:
        """Called for each request, many at a time. An `OSError` ends it with that error, others with EIO."""
        r.pass_on()


class _Head:
    """The head of a message; ``python.h`` has the fields."""

    def __init__(self, raw: bytes) -> None:
        magic, self.verb, self.id, self.offset, self.length, self.type, self.flags, self.error, self.data = (
            _HEAD.unpack(raw)
        )
        if magic != _MAGIC or self.data > _LONGEST or self.verb not in (_REQUEST, _RESULT):
            raise ConnectionError("no message of a filter")


class _Connection:
    """One disk's filter. `serve` reads what it sends until it goes; requests are tasks of a group of its own."""

    def __init__(self, implementation: Filter, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._filter, self._reader, self._writer = implementation, reader, writer
        self._requests: dict[int, Request] = {}

    def send(self, head: _Head, verb: int, data: bytes, error: int) -> None:
        fields = (_MAGIC, verb, head.id, head.offset, head.length, head.type, head.flags, error, len(data))
        self._writer.write(_HEAD.pack(*fields))
        self._writer.write(data)

    async def serve(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            async with asyncio.TaskGroup() as tasks:
                try:
                    while True:
                        await self._receive(tasks)
                finally:
                    for request in self._requests.values():
                        if request._result is not None:
                            request._result.cancel()

    async def _receive(self, tasks: asyncio.TaskGroup) -> None:
        head = _Head(await self._reader.readexactly(_HEAD.size))
        data = await self._reader.readexactly(head.data) if head.data else b""
        if head.verb == _RESULT:
            request = self._requests.get(head.id)
            if request is None:
                raise ConnectionError("a result of an unknown request")
            request._came_back(head, data)
            return
        self._requests[head.id] = request = Request(self, head, data)
        tasks.create_task(self._handle(head.id, request))

    async def _handle(self, number: int, request: Request) -> None:
        try:
            await self._filter.request(request)
            request._finish()
        except Exception as error:  # whatever the user's class does wrong is the request's error, not the disk's end
            if not isinstance(error, OSError):
                _log.exception("%s of %d bytes at %d failed", request.type.name, request.length, request.offset)
            request._failed(error)
        finally:
            del self._requests[number]


@contextlib.asynccontextmanager
async def serving(implementation: Filter, path: Path) -> AsyncIterator[None]:
    """Serves a filter on a new Unix socket (mode 0600) for as long as the block runs.

    :raises InvalidInput: the path is taken or too long
    """
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await _Connection(implementation, reader, writer).serve()
        finally:
            connections.discard(task)
            writer.close()

    previous = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(connected, path=path)
    except OSError as error:
        raise InvalidInput(f"cannot serve on {path}: {error.strerror or error}; choose a free, shorter path") from error
    finally:
        os.umask(previous)
    try:
        async with server:
            yield
    finally:
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await asyncio.to_thread(path.unlink, missing_ok=True)


def load(spec: str) -> Filter:
    """The filter that ``MODULE:CLASS`` names. Raises `InvalidInput`."""
    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInput(f"{spec}: {error}; MODULE:CLASS is wanted") from error
    if not (isinstance(found, type) and issubclass(found, Filter)):
        raise InvalidInput(f"{spec} is no subclass of {__name__}.Filter")
    return found()


async def _forever(implementation: Filter, path: Path) -> None:
    async with serving(implementation, path):
        await asyncio.Event().wait()


def main() -> int:
    """``python -m hypervisor.iofilter.python_filter MODULE:CLASS SOCKET``"""
    parser = argparse.ArgumentParser(description="serves a filter in Python")
    parser.add_argument("filter", metavar="MODULE:CLASS")
    parser.add_argument("socket", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        asyncio.run(_forever(load(arguments.filter), arguments.socket))
    except InvalidInput as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
