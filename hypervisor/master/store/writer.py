"""The thread that writes to a SQLite store.

Theory of operation: the thread sleeps on a queue. It takes everything queued into one transaction (group commit: while
one commit waits for the disk, the writes that arrive form the next), commits, then hands the outcomes to the event loop
in one call: futures are resolved in the order of the queue, and changes published, before any waiter runs on.

A write that fails by itself (the key exists, the revision is stale) takes no revision and leaves the others in. When
SQLite fails (the disk is full), the whole transaction is rolled back and every write in it refused with `Unavailable`:
nothing was changed, and the next transaction tries afresh.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hypervisor.errors import HvError, Unavailable
from hypervisor.master.store import tables
from hypervisor.master.store.base import Change

MOST_IN_ONE_COMMIT = 512
Apply = Callable[[sqlite3.Connection, int], Change | None]
"""Does the work of one write as the given revision; None: it takes none."""


@dataclass(slots=True)
class Write:
    """A write on its way through the queue."""

    apply: Apply
    done: asyncio.Future[int]
    revision: int = 0
    error: HvError | None = None


@dataclass(slots=True)
class _Batch:
    writes: list[Write]
    changes: list[Change] = field(default_factory=list)


class Writer:
    """Owns the connection that writes. All methods belong to the event loop.

    :param publish: is called on the loop with each transaction's changes
    """

    def __init__(self, connection: sqlite3.Connection, publish: Callable[[Sequence[Change]], None]) -> None:
        self._connection = connection
        self._publish = publish
        self._loop = asyncio.get_running_loop()
        self._revision = tables.newest(connection)
        self._queue: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, apply: Apply) -> asyncio.Future[int]:
        """Queues a write; the future gives its revision (that of the store, if it takes none of its own)."""
        done: asyncio.Future[int] = self._loop.create_future()
        if self._closed:
            done.set_exception(Unavailable("the store is closed"))
        else:
            self._queue.put(Write(apply, done))
        return done

    async def close(self) -> None:
        """Finishes what is queued, then ends the thread and closes the connection."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        await asyncio.sleep(0)  # outcomes that the thread handed over last

    def _run(self) -> None:
        going = True
        while going:
            writes, going = self._take()
            if writes:
                batch = self._commit(writes)
                self._loop.call_soon_threadsafe(self._resolve, batch)
        self._connection.close()

    def _take(self) -> tuple[list[Write], bool]:
        """Waits for one write and takes what else is there; False: the last ones."""
        writes: list[Write] = []
        write = self._queue.get()
        while write is not None:
            writes.append(write)
            if len(writes) == MOST_IN_ONE_COMMIT:
                return writes, True
            try:
                write = self._queue.get_nowait()
            except queue.Empty:
                return writes, True
        return writes, False

    def _commit(self, writes: list[Write]) -> _Batch:
        batch = _Batch(writes)
        before = self._revision
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for write in writes:
                self._apply(write, batch)
            self._connection.execute("COMMIT")
        except Exception as error:
            self._revision = before
            self._undo()
            batch.changes.clear()
            for write in writes:
                write.error = _refusal(error)
        return batch

    def _apply(self, write: Write, batch: _Batch) -> None:
        try:
            change = write.apply(self._connection, self._revision + 1)
        except HvError as error:
            write.error = error
            return
        if change is not None:
            self._revision += 1
            batch.changes.append(change)
        write.revision = self._revision

    def _undo(self) -> None:
        try:
            if self._connection.in_transaction:  # SQLite rolls back by itself after some errors
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            pass  # the next BEGIN will tell

    def _resolve(self, batch: _Batch) -> None:
        if batch.changes:
            self._publish(batch.changes)
        for write in batch.writes:
            if write.done.done():
                continue  # its caller was cancelled; the write stands all the same
            if write.error is not None:
                write.done.set_exception(write.error)
            else:
                write.done.set_result(write.revision)


def _refusal(error: Exception) -> Unavailable:
    if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
        return Unavailable("the disk of the master's store is full: nothing was changed; make room and try again")
    if tables.is_damage(error):
        return Unavailable(f"the master's store is damaged ({error}); nothing was changed. {tables.WAY_BACK}")
    return Unavailable(f"the master's store cannot be written ({error}); nothing was changed")
