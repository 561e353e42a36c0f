"""File locks (flock) that exclude other processes, other tasks of this one, and leftovers of dead ones alike."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

_RETRY_S = 0.02


def try_lock(path: Path, *, shared: bool = False) -> int | None:
    """Lock a file, which is made if need be; its descriptor, or None if someone else has the lock.

    A file that was removed or replaced while we waited locks nothing: then None too, and FileNotFoundError if its
    folder is gone.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that is only ever held for moments; waits for it."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@asynccontextmanager
async def locked_long(path: Path) -> AsyncIterator[None]:
    """Hold a lock that may be held for minutes; the file goes with it.

    Waiting is asking again and again, because a thread that blocks in ``flock`` could not be cancelled.
    """
    while (descriptor := try_lock(path)) is None:  # noqa: ASYNC110
        await asyncio.sleep(_RETRY_S)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # noqa: ASYNC240
        os.close(descriptor)
