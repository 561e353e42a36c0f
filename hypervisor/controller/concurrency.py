"""Three ways of running coroutines side by side; each ends what it started before it returns."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def first(*coroutines: Coroutine[Any, Any, Any]) -> Any:
    """Runs all until one ends, ends the others, and gives that one's result or raises its error.

    Of several that ended in the same step, the one that comes first in the arguments wins.
    """
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await next(task for task in tasks if task.done())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def together(*coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
    """Runs all to their ends and gives their results; an error ends the others and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(c) for c in coroutines]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


class Topic:
    """Wakes everybody who waits for news. `version` grows by one with each."""

    def __init__(self) -> None:
        self.version = 0
        self._event = asyncio.Event()

    def publish(self) -> None:
        """There is news."""
        self.version += 1
        self._event.set()
        self._event = asyncio.Event()

    async def wait_newer(self, version: int) -> int:
        """Waits until there is news later than `version`; gives the version now."""
        while self.version <= version:
            await self._event.wait()
        return self.version
