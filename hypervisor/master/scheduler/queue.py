"""Pods that wait for a node.

Theory of operation
-------------------
::

    add --> active --pop--> (one is being scheduled) --bound--> gone
              ^                   | no node fits
              |                   v
              +-- back-off over  waiting --the cluster changed--> back-off (1 s, doubling to 10 s)

Active pods are popped by priority, then age. A pod that fits nowhere is not tried again before something has changed
that could help it, or `LONGEST_WAIT_S` have passed. A change that comes while a pod is being tried counts for it too
(`version`): it is not put to sleep over news that it has not seen.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hypervisor.master.scheduler.preemption import priority

FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 10.0
LONGEST_WAIT_S = 60.0


@dataclass
class Waiting:
    """One pod in the queue.

    :ivar ticket: of its entry among the active ones; -1: it has none that counts
    """

    pod: Mapping[str, Any]
    attempts: int = 0
    version: int = 0
    since: float = field(default_factory=time.monotonic)
    not_before: float = 0.0
    ticket: int = -1

    @property
    def uid(self) -> str:
        """The pod's."""
        return str(self.pod["metadata"]["uid"])

    def backoff_s(self) -> float:
        """How long to leave it alone after its latest attempt."""
        return float(min(FIRST_BACKOFF_S * 2 ** max(0, self.attempts - 1), LONGEST_BACKOFF_S))


class SchedulingQueue:
    """Not thread-safe: one loop owns it."""

    def __init__(self) -> None:
        self._all: dict[str, Waiting] = {}
        self._active: list[tuple[int, float, int, str]] = []
        self._asleep: dict[str, Waiting] = {}
        self._count = itertools.count()
        self._version = 0
        self._news = asyncio.Event()

    def __len__(self) -> int:
        return len(self._all)

    def put(self, pod: Mapping[str, Any]) -> None:
        """A pod without a node came or changed; a changed one is tried again at once."""
        uid = pod["metadata"]["uid"]
        known = self._all.get(uid)
        if known is None:
            known = self._all[uid] = Waiting(pod)
        elif known.pod["spec"] == pod["spec"] and known.pod["metadata"].get("labels") == pod["metadata"].get("labels"):
            known.pod = pod
            return
        known.pod = pod
        self._asleep.pop(uid, None)
        self._activate(known)

    def drop(self, uid: str) -> None:
        """The pod went, or has a node."""
        self._all.pop(uid, None)
        self._asleep.pop(uid, None)

    def cluster_changed(self) -> None:
        """Something changed that could help a pod which fits nowhere: all are tried again, after their back-off."""
        self._version += 1
        if self._asleep:
            self._news.set()

    def sleep(self, waiting: Waiting) -> None:
        """No node fits it now."""
        if waiting.uid in self._all:
            waiting.attempts += 1
            waiting.not_before = time.monotonic() + waiting.backoff_s()
            self._asleep[waiting.uid] = waiting
            self._news.set()

    async def pop(self) -> Waiting:
        """The next to be tried; waits until there is one."""
        while True:
            self._wake()
            while self._active:
                _, _, ticket, uid = heapq.heappop(self._active)
                waiting = self._all.get(uid)
                if waiting is not None and waiting.ticket == ticket:
                    waiting.ticket = -1
                    waiting.version = self._version
                    return waiting
            await self._wait()

    def _activate(self, waiting: Waiting) -> None:
        waiting.ticket = next(self._count)
        heapq.heappush(self._active, (-priority(waiting.pod), waiting.since, waiting.ticket, waiting.uid))
        self._news.set()

    def _wake(self) -> None:
        now = time.monotonic()
        for uid, waiting in list(self._asleep.items()):
            if now >= self._due(waiting):
                del self._asleep[uid]
                self._activate(waiting)

    def _due(self, waiting: Waiting) -> float:
        return waiting.not_before if waiting.version < self._version else waiting.not_before + LONGEST_WAIT_S

    async def _wait(self) -> None:
        self._news.clear()
        due = min((self._due(w) for w in self._asleep.values()), default=None)
        try:
            async with asyncio.timeout(None if due is None else max(0.0, due - time.monotonic())):
                await self._news.wait()
        except TimeoutError:
            pass
