"""Logs of a pod whose VM is off, from the files that were taken out of it before it was stopped.

The files come from a guest and are read as such: a line that is no entry is passed over, nothing is executed or
followed, and reading is bounded by what the host let the guest hand over.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from hypervisor.agent import logs
from hypervisor.errors import InvalidInput
from hypervisor.introspect.commands import LogsCommand


async def read_archived(folder: Path, command: LogsCommand) -> AsyncIterator[bytes]:
    """The log's text in chunks, as the agent would have given it; nothing when the container never wrote any.

    :param folder: holds ``<container>/<attempt>.log`` and its rotated files
    :raises InvalidInput: `command` asks for the previous instance and there was none
    """
    directory = str(folder / command.container)
    attempts = await asyncio.to_thread(logs.attempts, directory)
    if command.previous and len(attempts) < 2:
        raise InvalidInput(f"container {command.container} has no previous instance", where="previous")
    if not attempts:
        return
    selection = logs.Selection(command.tail, command.since_ns, command.limit_bytes, command.timestamps)
    chunks = logs.read_log(directory, attempts[-2 if command.previous else -1], selection)
    try:
        while chunk := await asyncio.to_thread(next, chunks, b""):
            yield chunk
    finally:
        await asyncio.to_thread(chunks.close)  # type: ignore[attr-defined]  # a generator
