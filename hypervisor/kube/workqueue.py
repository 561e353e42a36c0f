"""Keys to work on: each at most once at a time, again when it changed meanwhile, later and later when it fails.

Source: the work queue of Kubernetes' client-go: a key is *dirty* when there is work for it and *processing* while
somebody does it; one that becomes dirty while it is processing is queued when it is done.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import structlog

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """One event loop. Memory is bounded by the number of distinct keys.

    :param backoff_s: before the first retry of a key, and at most; it doubles with each failure in a row
    """

    def __init__(self, *, backoff_s: tuple[float, float] = (0.05, 60.0)) -> None:
        self._backoff_s = backoff_s
        self._ready: deque[K] = deque()
        self._dirty: set[K] = set()
        self._processing: set[K] = set()
        self._failures: dict[K, int] = {}
        self._later: dict[K, asyncio.TimerHandle] = {}
        self._news = asyncio.Event()
        self._log = structlog.get_logger()

    def __len__(self) -> int:
        """Keys that wait to be taken now."""
        return len(self._ready)

    def add(self, key: K) -> None:
        """There is work for `key`."""
        timer = self._later.pop(key, None)
        if timer is not None:
            timer.cancel()
        if key in self._dirty:
            return
        self._dirty.add(key)
        if key not in self._processing:
            self._ready.append(key)
            self._news.set()

    def add_after(self, key: K, delay_s: float) -> None:
        """There will be work for `key`; the sooner of two times holds."""
        if delay_s <= 0:
            self.add(key)
            return
        if key in self._dirty:
            return
        loop = asyncio.get_running_loop()
        timer = self._later.get(key)
        if timer is not None:
            if timer.when() <= loop.time() + delay_s:
                return
            timer.cancel()
        self._later[key] = loop.call_later(delay_s, self.add, key)

    def retry(self, key: K) -> float:
        """`key` failed: it comes again after its back-off, whose seconds are returned."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        low, high = self._backoff_s
        delay = min(high, low * 2.0 ** min(failures, 30)) * random.uniform(0.75, 1.25)
        self.add_after(key, delay)
        return delay

    def forget(self, key: K) -> None:
        """`key` succeeded: its next failure is its first."""
        self._failures.pop(key, None)

    async def get(self) -> K:
        """Waits for a key and gives it; nobody else gets it until `done`."""
        while not self._ready:
            self._news.clear()
            await self._news.wait()
        key = self._ready.popleft()
        self._dirty.discard(key)
        self._processing.add(key)
        return key

    def done(self, key: K) -> None:
        """The work on `key` that `get` handed out has ended, well or not."""
        self._processing.discard(key)
        if key in self._dirty:
            self._ready.append(key)
            self._news.set()

    def close(self) -> None:
        """Forgets what was to come later."""
        for timer in self._later.values():
            timer.cancel()
        self._later.clear()

    async def run(self, work: Callable[[K], Awaitable[None]], *, workers: int = 1) -> None:
        """Works for ever, on `workers` keys at a time. What raises is logged and tried again after its back-off."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(self._worker(work))
        finally:
            self.close()

    async def _worker(self, work: Callable[[K], Awaitable[None]]) -> None:
        while True:
            key = await self.get()
            try:
                await work(key)
                self.forget(key)
            except Exception as e:
                delay = self.retry(key)
                self._log.warning("will be tried again", key=str(key), error=str(e), after_s=round(delay, 2))
            finally:
                self.done(key)
