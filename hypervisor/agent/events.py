"""Who wants to hear what happens to containers."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

MAX_PENDING = 1024


class Subscriber:
    """One listener's queue. One that does not keep up is marked `lost` and gets nothing more."""

    def __init__(self) -> None:
        self._pending: deque[dict[str, Any]] = deque()
        self._some = asyncio.Event()
        self.lost = False

    def put(self, event: dict[str, Any]) -> None:
        """Adds an event."""
        if len(self._pending) >= MAX_PENDING:
            self.lost = True
        else:
            self._pending.append(event)
        self._some.set()

    async def get(self) -> dict[str, Any] | None:
        """The next event; None once the listener has fallen too far behind."""
        while not self._pending:
            if self.lost:
                return None
            self._some.clear()
            await self._some.wait()
        return self._pending.popleft()


class Hub:
    """Hands events to every subscriber."""

    def __init__(self) -> None:
        self.subscribers: set[Subscriber] = set()

    def publish(self, kind: str, container: dict[str, Any]) -> None:
        """Tells everybody."""
        for subscriber in self.subscribers:
            subscriber.put({"type": kind, "container": container})
