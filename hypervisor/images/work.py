"""Runs jobs in worker processes, and programs in general: started, watched, and ended with whoever waits for them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import hypervisor
from hypervisor import errors
from hypervisor.errors import HvError
from hypervisor.images import worker
from hypervisor.images.build import BuildJob, ExpandJob
from hypervisor.images.model import Progress, ProgressEvent

_LINE_LIMIT = 1 << 20
_LAST_WORDS = 5


@asynccontextmanager
async def child(
    *argv: str, env: dict[str, str] | None = None, stderr: int = asyncio.subprocess.PIPE
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program with pipes for stdin, stdout and stderr; dead and reaped when the block is left, however it is.

    :param stderr: as asyncio has it; a pipe that nobody reads would stop the program when it is full
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
    last_words: deque[str] = deque(maxlen=_LAST_WORDS)
    argv = (sys.executable, "-P", "-m", worker.__name__)
    async with child(*argv, env=_worker_environment(), stderr=asyncio.subprocess.STDOUT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(worker.encode(job))
        process.stdin.close()
        async for line in process.stdout:
            message = _message(line)
            if message is None:
                last_words.append(line.decode(errors="replace").strip())
            elif "progress" in message:
                progress(ProgressEvent(**message["progress"]))
            elif "error" in message:
                raise _error(message["error"])
            else:
                return
        await process.wait()
    told = " | ".join(last_words) or "it said nothing"
    raise HvError(f"the process that builds images died (exit status {process.returncode}): {told}")


def _worker_environment() -> dict[str, str]:
    """The worker imports this very package, installed or not."""
    places = [str(Path(hypervisor.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}


def _message(line: bytes) -> dict[str, Any] | None:
    """A line of the worker's protocol, or None: then it is what a dying interpreter says."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _error(value: dict[str, Any]) -> HvError:
    kind = getattr(errors, value["kind"], HvError)
    error: HvError = kind(value["message"])
    return error
