"""The SQLite file of a store: its tables, and every statement that reads or writes them. Nothing here knows asyncio.

``log`` has a row per change; ``current`` says which row of the log is a key's newest, for keys that exist; ``meta`` has
the revision up to which the log has been compacted. All functions work inside the caller's transaction.

Source of the log-of-revisions layout: kine, which serves the etcd interface from SQL databases.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

from hypervisor.errors import InvalidInput
from hypervisor.master.store.base import Change, Compacted, CorruptStore, Item, KeyExists, Page, StaleRevision

FORMAT = 1
"""``user_version`` of the file."""
FIRST_REVISION = 1
"""Of an empty store, as etcd counts: the first change gets 2."""
AFTER_ALL = "\U0010ffff"
"""Sorts after every key that the master makes."""

SCHEMA = f"""
CREATE TABLE log (
    revision INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    created INTEGER NOT NULL,   -- revision at which the key was made
    prev INTEGER NOT NULL,      -- revision that this change replaced; 0 for a create
    deleted INTEGER NOT NULL,
    value BLOB NOT NULL         -- empty for a delete
);
CREATE INDEX log_key ON log (key, revision);
CREATE TABLE current (key TEXT PRIMARY KEY, revision INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE meta (compacted INTEGER NOT NULL);
INSERT INTO meta VALUES (0);
PRAGMA user_version = {FORMAT};
"""


def open_writer(path: Path, *, max_pages: int = 0) -> sqlite3.Connection:
    """The one connection that writes; makes the file where there is none.

    :param max_pages: the file may have so many pages of 4 KiB at most; 0: no limit
    :raises CorruptStore: the file fails SQLite's check
    :raises InvalidInput: it was written by a newer version
    """
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
    try:
        _prepare(connection, path, max_pages)
    except sqlite3.DatabaseError as error:
        connection.close()
        if isinstance(error, sqlite3.OperationalError):
            raise
        raise damaged(path, str(error)) from error
    except BaseException:
        connection.close()
        raise
    return connection


def open_reader(path: Path) -> sqlite3.Connection:
    """A connection that only reads. Use it from one thread at a time."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
    connection.execute("PRAGMA query_only = ON")
    connection.execute("PRAGMA busy_timeout = 10000")
    return connection


WAY_BACK = "Bring back a backup with `hv cluster restore FILE` (the damaged file is kept beside it)"


def damaged(path: Path, what: str) -> CorruptStore:
    """The error for a file that cannot be trusted, with the way back."""
    return CorruptStore(f"{path}: the store's file is damaged ({what}); nothing was changed. {WAY_BACK}")


def is_damage(error: BaseException) -> bool:
    """SQLite has met something in the file that it did not write."""
    codes = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    return isinstance(error, sqlite3.DatabaseError) and (getattr(error, "sqlite_errorcode", 0) & 0xFF) in codes


def check(connection: sqlite3.Connection, path: Path) -> None:
    """:raises CorruptStore: SQLite's quick check found damage"""
    verdict = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    if verdict != "ok":
        raise damaged(path, verdict)


def _prepare(connection: sqlite3.Connection, path: Path, max_pages: int) -> None:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > FORMAT:
        raise InvalidInput(f"{path} has format {version}, this version knows {FORMAT}: use a newer podvisor")
    if not version and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise damaged(path, "it is another program's database")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # every commit reaches the disk before it is acknowledged
    connection.execute("PRAGMA cache_size = -8000")
    if max_pages:
        connection.execute(f"PRAGMA max_page_count = {max_pages}")
    if version:
        check(connection, path)
    else:
        connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")


def newest(connection: sqlite3.Connection) -> int:
    """The revision of the last change."""
    row = connection.execute("SELECT max((SELECT ifnull(max(revision), 0) FROM log), compacted) FROM meta").fetchone()
    return max(int(row[0]), FIRST_REVISION)


def compacted(connection: sqlite3.Connection) -> int:
    """Revisions before this one are gone."""
    return int(connection.execute("SELECT compacted FROM meta").fetchone()[0])


def end_of(prefix: str) -> str:
    """The first string after all that begin with `prefix`."""
    return prefix + AFTER_ALL


def get(connection: sqlite3.Connection, key: str) -> Item | None:
    """The key as it is now."""
    row = connection.execute(
        "SELECT log.key, value, created, log.revision FROM current JOIN log USING (revision) WHERE current.key = ?",
        (key,),
    ).fetchone()
    return Item(*row) if row else None


def scan(connection: sqlite3.Connection, prefix: str, limit: int, after: str, revision: int) -> Page:
    """`Store.range`, inside a read transaction."""
    now, oldest = newest(connection), compacted(connection)
    if revision and revision < oldest:
        raise Compacted(revision, oldest)
    if revision > now:
        raise InvalidInput(f"revision {revision} is in the future; the newest is {now}")
    revision = revision or now
    low = max(prefix, after)
    past = revision < now
    rows = _past(connection, low, prefix, limit, revision) if past else _present(connection, low, prefix, limit)
    items = [Item(*row) for row in rows if row[0] != after]
    more = 0
    if limit and len(items) >= limit:
        items = items[:limit]
        more = _count(connection, items[-1].key, prefix, revision if past else 0)
    return Page(items, revision, more)


def _present(
    connection: sqlite3.Connection, low: str, prefix: str, limit: int
) -> Iterable[tuple[str, bytes, int, int]]:
    return connection.execute(
        "SELECT log.key, value, created, log.revision FROM current CROSS JOIN log USING (revision)"
        " WHERE current.key >= ? AND current.key < ? ORDER BY current.key LIMIT ?",
        (low, end_of(prefix), limit + 1 if limit else -1),
    )


_OF_THEN = (  # the newest row of each key that is not newer than the revision
    "FROM (SELECT key AS k, max(revision) AS r FROM log WHERE key >= ? AND key < ? AND revision <= ? GROUP BY key)"
    " CROSS JOIN log ON log.revision = r WHERE deleted = 0"
)


def _past(
    connection: sqlite3.Connection, low: str, prefix: str, limit: int, revision: int
) -> Iterable[tuple[str, bytes, int, int]]:
    return connection.execute(
        f"SELECT k, value, created, r {_OF_THEN} ORDER BY k LIMIT ?",
        (low, end_of(prefix), revision, limit + 1 if limit else -1),
    )


def _count(connection: sqlite3.Connection, after: str, prefix: str, revision: int) -> int:
    if revision:
        query, low = f"SELECT count(*) {_OF_THEN}", after + "\0"
        return int(connection.execute(query, (low, end_of(prefix), revision)).fetchone()[0])
    query = "SELECT count(*) FROM current WHERE key > ? AND key < ?"
    return int(connection.execute(query, (after, end_of(prefix))).fetchone()[0])


def changes(connection: sqlite3.Connection, prefix: str, after: int, limit: int) -> tuple[list[Change], int]:
    """Up to `limit` changes later than `after`, and the revision up to which that is all of them.

    :raises Compacted:
    """
    now, oldest = newest(connection), compacted(connection)
    if after < oldest:
        raise Compacted(after, oldest)
    rows = connection.execute(
        "SELECT log.revision, log.key, log.created, log.prev, log.deleted, log.value, p.value FROM log"
        " LEFT JOIN log AS p ON p.revision = log.prev"
        " WHERE log.revision > ? AND log.key >= ? AND log.key < ? ORDER BY log.revision LIMIT ?",
        (after, prefix, end_of(prefix), limit),
    ).fetchall()
    return [_change(*row) for row in rows], rows[-1][0] if len(rows) == limit else now


def _change(
    revision: int, key: str, created: int, prev: int, deleted: int, value: bytes, previous: bytes | None
) -> Change:
    if deleted:
        return Change("delete", Item(key, previous or b"", created, revision), previous)
    return Change("update" if prev else "create", Item(key, value, created, revision), previous)


def create(connection: sqlite3.Connection, revision: int, key: str, value: bytes) -> Change:
    """:raises KeyExists:"""
    if connection.execute("SELECT 1 FROM current WHERE key = ?", (key,)).fetchone():
        raise KeyExists(f"{key} exists already")
    connection.execute("INSERT INTO log VALUES (?, ?, ?, 0, 0, ?)", (revision, key, revision, value))
    connection.execute("INSERT INTO current VALUES (?, ?)", (key, revision))
    return Change("create", Item(key, value, revision, revision), None)


def update(connection: sqlite3.Connection, revision: int, key: str, value: bytes, expected: int) -> Change:
    """:raises StaleRevision:"""
    old = _expect(connection, key, expected)
    connection.execute("INSERT INTO log VALUES (?, ?, ?, ?, 0, ?)", (revision, key, old.created, expected, value))
    connection.execute("UPDATE current SET revision = ? WHERE key = ?", (revision, key))
    return Change("update", Item(key, value, old.created, revision), old.value)


def delete(connection: sqlite3.Connection, revision: int, key: str, expected: int) -> Change:
    """:raises StaleRevision:"""
    old = _expect(connection, key, expected)
    connection.execute("INSERT INTO log VALUES (?, ?, ?, ?, 1, x'')", (revision, key, old.created, expected))
    connection.execute("DELETE FROM current WHERE key = ?", (key,))
    return Change("delete", Item(key, old.value, old.created, revision), old.value)


def _expect(connection: sqlite3.Connection, key: str, expected: int) -> Item:
    old = get(connection, key)
    if old is None or old.modified != expected:
        raise StaleRevision(key, expected, old.modified if old else 0)
    return old


def compact(connection: sqlite3.Connection, start: int, end: int) -> None:
    """Drops what changes later than `start` and not later than `end` have replaced, and their deletes."""
    connection.execute(
        "DELETE FROM log WHERE revision IN (SELECT prev FROM log WHERE revision > ? AND revision <= ? AND prev > 0)",
        (start, end),
    )
    connection.execute("DELETE FROM log WHERE revision > ? AND revision <= ? AND deleted = 1", (start, end))
    connection.execute("UPDATE meta SET compacted = ?", (end,))
