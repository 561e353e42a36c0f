"""Runs jobs in worker processes, and programs in general: started, watched, and ended with whoever waits for them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from hypervisor import errors
from hypervisor.errors import HvError
from hypervisor.images import worker
from hypervisor.images.build import BuildJob, ExpandJob
from hypervisor.images.model import Progress, ProgressEvent

_LINE_LIMIT = 1 << 20


@asynccontextmanager
async def child(
    *argv: str, env: dict[str, str] | None = None, stderr: int = asyncio.subprocess.PIPE
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program with pipes for stdin, stdout and stderr; dead and reaped when the block is left, however it is.

    :param stderr: ``DEVNULL`` where nobody reads it: a full pipe would stop the program
    :raises FileNotFoundError: there is no such program
    """
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=pipe, stdout=pipe, stderr=stderr, env=env, limit=_LINE_LIMIT
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def run_job(job: BuildJob | ExpandJob, progress: Progress) -> None:
    """Do a job in a worker process. Cancelling kills it; the caller removes what it left.

    :raises HvError: as :func:`hypervisor.images.build.run` has it
    """
    async with child(sys.executable, "-P", "-m", worker.__name__, stderr=asyncio.subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(worker.encode(job))
        process.stdin.close()
        async for line in process.stdout:
            message = json.loads(line)
            if "progress" in message:
                progress(ProgressEvent(**message["progress"]))
            elif "error" in message:
                raise _error(message["error"])
            else:
                return
        await process.wait()
    raise HvError(f"the process that builds images died (exit status {process.returncode})")


def _error(value: dict[str, Any]) -> HvError:
    kind = getattr(errors, value["kind"], HvError)
    error: HvError = kind(value["message"])
    return error
