"""Files that hold keys: private from their first byte, whole or absent whatever dies when."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

PRIVATE = 0o600
PUBLIC = 0o644


def private_directory(path: Path) -> None:
    """Makes the folder (mode 0700) with its parents; narrows one that is there."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


def write(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Replaces a file. After a crash it has the old content or the new one, on stable storage."""
    temporary = _temporary(path, content, mode)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def create(path: Path, content: bytes, mode: int = PRIVATE) -> bytes:
    """Makes a file unless it is there; of several processes that do so at once, one wins.

    :returns: what the file has now
    """
    temporary = _temporary(path, content, mode)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)
    return path.read_bytes()


def _temporary(path: Path, content: bytes, mode: int) -> Path:
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mkstemp: 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def sweep(directory: Path) -> None:
    """Removes what a process that was killed in `write` or `create` left. Only its one owner may call this."""
    for leftover in directory.glob(".*"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
