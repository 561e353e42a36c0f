"""A file lock that is waited for without a thread."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from hypervisor.vmm.directory import disk_error

_LOOK_S = 0.01


@asynccontextmanager
async def locked(path: Path, what: str) -> AsyncIterator[None]:
    """Holds the lock of the file `path`, which is made, its folder (mode 0700) too, where it is missing.

    It excludes other processes and other calls in this one, and ends with the process that has it.

    :param what: begins the message of an error, as "cannot make a template in /x"
    :raises HvError: as `disk_error` has it, if the file cannot be made or opened
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise disk_error(e, what) from e
    try:
        # Tried again and again: a thread that waits for a file lock for ever could not be cancelled.
        while not _try_lock(fd):  # noqa: ASYNC110 -- no event tells of another process's lock
            await asyncio.sleep(_LOOK_S)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
