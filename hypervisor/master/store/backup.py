"""Backups of the SQLite store: taken while it is in use, and brought back in one step.

A backup is a SQLite database of its own; beside it, ``<file>.sha256`` in the format of sha256sum. A restore checks the
sum and the database, keeps the file that it replaces, and leaves everything as it was if anything is wrong.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound, ResourceExhausted, Unavailable
from hypervisor.master.store import tables

SIDE_FILES = ("-wal", "-shm")
PAGES_PER_STEP = 1000


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup holds.

    :ivar revision: of the store, when it was taken
    :ivar keys: how many objects
    """

    path: Path
    revision: int
    keys: int
    sha256: str


def backup(database: Path, target: Path) -> Backup:
    """Copies the store as it is at one moment; a master may be writing to it meanwhile. Blocks: call it in a thread.

    The file appears under its name (0600) when it is whole and on the disk.

    :raises InvalidInput: `target` is there already
    :raises NotFound: there is no store
    """
    if not database.exists():
        raise NotFound(f"{database}: there is no store to back up")
    if target.exists():
        raise InvalidInput(f"{target} exists already: choose another name")
    part = target.with_name(target.name + ".part")
    with _readable_errors(target), _removed_on_failure(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        os.close(os.open(part, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        with closing(tables.open_reader(database)) as source, closing(sqlite3.connect(part)) as copy:
            source.backup(copy, pages=PAGES_PER_STEP)
            copy.execute("PRAGMA journal_mode = DELETE")
        found = _inspect(part)
        _write_sum(target, found.sha256)
        _sync(part)
        part.rename(target)
        _sync(target.parent)
    return Backup(target, found.revision, found.keys, found.sha256)


def verify(path: Path) -> Backup:
    """What the backup holds, after all of it was checked.

    :raises NotFound: no such file, or its ``.sha256`` is missing
    :raises InvalidInput: the sum does not match, or it is no store
    """
    if not path.exists():
        raise NotFound(f"{path}: no such backup")
    sum_file = _sum_file(path)
    if not sum_file.exists():
        raise NotFound(f"{sum_file}: missing; a backup is two files, bring both")
    found = _inspect(path)
    if sum_file.read_text().split()[:1] != [found.sha256]:
        raise InvalidInput(f"{path} does not match {sum_file.name}: it was damaged or changed; use another backup")
    return found


def restore(path: Path, database: Path) -> Path | None:
    """Puts a backup in the place of the store, whose master must not run. Blocks: call it in a thread.

    :return: where the store that was there is now; None: there was none
    :raises NotFound, InvalidInput: as `verify`; nothing was changed
    :raises Conflict: a master has the store open; nothing was changed
    """
    database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(database), _readable_errors(database):
        verify(path)
        part = database.with_name(database.name + ".part")
        with _removed_on_failure(part):
            shutil.copyfile(path, part)
            part.chmod(0o600)
            if _sha256(part) != verify(path).sha256:
                raise Unavailable(f"{part}: the copy is not what was read; nothing was changed")
            _sync(part)
            kept = _set_aside(database)
            part.rename(database)
            _sync(database.parent)
        return kept


def _set_aside(database: Path) -> Path | None:
    """Renames the store and what belongs to it: an older write-ahead log must never meet a restored file."""
    kept = database.with_name(f"{database.name}.replaced-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
    existed = database.exists()
    for suffix in ("", *SIDE_FILES):
        file = Path(f"{database}{suffix}")
        if file.exists():
            file.rename(f"{kept}{suffix}")
    return kept if existed else None


def _inspect(path: Path) -> Backup:
    """Checks all of a closed database file.

    :raises InvalidInput: it is damaged, or is no store
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
            verdict = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if verdict != "ok" or version != tables.FORMAT:
                raise InvalidInput(f"{path} is no sound backup of a store ({verdict}, format {version})")
            keys = connection.execute("SELECT count(*) FROM current").fetchone()[0]
            revision = tables.newest(connection)
    except sqlite3.Error as error:
        raise InvalidInput(f"{path} is no sound backup of a store ({error})") from error
    return Backup(path, revision, keys, _sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _write_sum(target: Path, digest: str) -> None:
    with _sum_file(target).open("w") as file:
        file.write(f"{digest}  {target.name}\n")
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(database: Path) -> Iterator[None]:
    descriptor = os.open(f"{database}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Conflict(f"{database} is in use: stop the master first (`hv cluster down`)") from None
    finally:
        os.close(descriptor)


@contextmanager
def _removed_on_failure(part: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for suffix in ("", "-journal", *SIDE_FILES):
            Path(f"{part}{suffix}").unlink(missing_ok=True)
        raise


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except HvError:
        raise
    except sqlite3.OperationalError as error:
        raise ResourceExhausted(f"{path}: cannot be written ({error}); nothing was changed") from error
    except sqlite3.DatabaseError as error:
        raise InvalidInput(f"{path}: the store is damaged ({error}); nothing was changed") from error
    except OSError as error:
        raise ResourceExhausted(f"{path}: {error.strerror}; nothing was changed") from error
