"""Blocking work in a thread that a cancellation cannot leave half done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def uncut(work: Callable[[], T], undo: Callable[[], object]) -> T:
    """Run `work` in a thread. Cancelled, it waits for the end of `work`, undoes it if it succeeded, and raises then.

    :param undo: quick; not called when `work` raised
    """
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):  # the first one is raised below
                await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None:
            undo()
        raise
