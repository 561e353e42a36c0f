"""A store in one SQLite file: what a single master uses."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from hypervisor.errors import Conflict, Unavailable
from hypervisor.master.store import tables
from hypervisor.master.store.base import Change, Compacted, Item, Page
from hypervisor.master.store.history import Keep, forget_in_time
from hypervisor.master.store.window import Window
from hypervisor.master.store.writer import Writer

T = TypeVar("T")
READERS = 2
WATCH_BATCH = 500
COMPACT_STEP = 500


class SqliteStore:
    """`Store` in a SQLite file in WAL mode, fsynced at every commit; see `hypervisor.master.store.writer`.

    Watchers read from a window in memory, and from the log where they are further behind, so that a slow one costs no
    memory; it is refused when compaction has passed it.
    """

    def __init__(self, path: Path, lock: int, connection: sqlite3.Connection, keep: Keep) -> None:
        self._path = path
        self._lock = lock
        self._compacted = tables.compacted(connection)
        self._window = Window(tables.newest(connection))
        self._news: set[asyncio.Future[None]] = set()
        self._closed = False
        self._compacting = asyncio.Lock()
        self._writer = Writer(connection, self._publish)
        self._idle: list[sqlite3.Connection] = []
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        self._janitor = asyncio.create_task(forget_in_time(self, keep))

    @classmethod
    async def open(cls, path: Path, *, keep: Keep | None = None, max_pages: int = 0) -> SqliteStore:
        """Opens the file, or makes it (0600).

        :param max_pages: see `tables.open_writer`
        :raises CorruptStore: the file is damaged
        :raises Conflict: another process has it open
        :raises Unavailable: it cannot be opened
        """
        lock, connection = await asyncio.to_thread(_open, path, max_pages)
        return cls(path, lock, connection, keep or Keep())

    async def revision(self) -> int:
        """The newest."""
        return self._window.revision

    async def get(self, key: str) -> Item | None:
        """The key as it is now."""
        return await self._read(lambda connection: tables.get(connection, key))

    async def range(self, prefix: str, *, limit: int = 0, after: str = "", revision: int = 0) -> Page:
        """See `Store.range`; one read transaction."""
        return await self._read(lambda connection: tables.scan(connection, prefix, limit, after, revision))

    async def create(self, key: str, value: bytes) -> int:
        """See `Store.create`."""
        return await self._writer.submit(lambda c, revision: tables.create(c, revision, key, value))

    async def update(self, key: str, value: bytes, *, expected: int) -> int:
        """See `Store.update`."""
        return await self._writer.submit(lambda c, revision: tables.update(c, revision, key, value, expected))

    async def delete(self, key: str, *, expected: int) -> int:
        """See `Store.delete`."""
        return await self._writer.submit(lambda c, revision: tables.delete(c, revision, key, expected))

    @asynccontextmanager
    async def watch(self, prefix: str, *, after: int) -> AsyncIterator[AsyncIterator[Sequence[Change]]]:
        """See `Store.watch`."""
        if after < self._compacted:
            raise Compacted(after, self._compacted)
        async with aclosing(self._follow(prefix, after)) as batches:
            yield batches

    async def compact(self, revision: int) -> None:
        """See `Store.compact`; in steps, so that writes are not held up for long."""
        async with self._compacting:
            revision = min(revision, self._window.revision)
            while self._compacted < revision:
                start, end = self._compacted, min(revision, self._compacted + COMPACT_STEP)
                await self._writer.submit(partial(_compact_step, start=start, end=end))
                self._compacted = end

    async def close(self) -> None:
        """See `Store.close`. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._janitor.cancel()
        await asyncio.gather(self._janitor, return_exceptions=True)
        await self._writer.close()
        self._wake()
        await asyncio.to_thread(self._readers.shutdown)
        for connection in self._idle:
            connection.close()
        os.close(self._lock)

    def _publish(self, changes: Sequence[Change]) -> None:
        self._window.publish(changes)
        self._wake()

    def _wake(self) -> None:
        waiting, self._news = self._news, set()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def _wait(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._news.add(future)
        try:
            await future
        finally:
            self._news.discard(future)

    async def _follow(self, prefix: str, after: int) -> AsyncGenerator[Sequence[Change], None]:
        while not self._closed:
            recent = self._window.after(after, WATCH_BATCH)
            if recent is None:
                batch, after = await self._replay(prefix, after)
            elif recent:
                after = recent[-1].item.modified
                batch = [change for change in recent if change.item.key.startswith(prefix)]
            else:
                await self._wait()
                continue
            if batch:
                yield batch
        raise Unavailable("the store was closed")

    async def _replay(self, prefix: str, after: int) -> tuple[Sequence[Change], int]:
        return await self._read(lambda connection: tables.changes(connection, prefix, after, WATCH_BATCH))

    async def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        if self._closed:
            raise Unavailable("the store is closed")
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read_in_thread, query)

    def _read_in_thread(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """One read transaction on a connection that no other thread uses meanwhile."""
        try:
            connection = self._idle.pop() if self._idle else tables.open_reader(self._path)
            connection.execute("BEGIN")
            try:
                return query(connection)
            finally:
                connection.execute("ROLLBACK")
                self._idle.append(connection)
        except sqlite3.Error as error:
            way_back = f". {tables.WAY_BACK}" if tables.is_damage(error) else ""
            raise Unavailable(f"{self._path}: the master's store cannot be read ({error}){way_back}") from error


def _compact_step(connection: sqlite3.Connection, revision: int, *, start: int, end: int) -> None:
    tables.compact(connection, start, end)


def _open(path: Path, max_pages: int) -> tuple[int, sqlite3.Connection]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"{path} is in use by another master: stop that one first") from None
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))  # -wal and -shm get its mode
        return lock, tables.open_writer(path, max_pages=max_pages)
    except sqlite3.Error as error:
        os.close(lock)
        raise Unavailable(f"{path}: the master's store cannot be opened ({error})") from error
    except BaseException:
        os.close(lock)
        raise
