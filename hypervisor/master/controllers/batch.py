"""Doing a thing many times without doing it many times in vain."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from hypervisor.errors import HvError


async def slow_start(count: int, work: Callable[[], Awaitable[None]], *, first: int = 1) -> HvError | None:
    """Calls `work` `count` times: one, then two at once, then four...; after a batch with an error no other begins.

    Pods that a quota or a webhook refuses are all refused for the same reason: one error tells it, not hundreds.

    :returns: the first error; None: all went well
    """
    left, size = count, first
    while left > 0:
        size = min(size, left)
        results = await asyncio.gather(*(work() for _ in range(size)), return_exceptions=True)
        for result in results:
            if isinstance(result, HvError):
                return result
            if isinstance(result, BaseException):
                raise result
        left -= size
        size *= 2
    return None
