"""What is wanted of a pod, run, stop or delete: how it grows, and what waits for it or is interrupted by it.

It is on disk before the caller hears of it, and never becomes less: a stop cannot undo a delete, nor lengthen the
grace period of an earlier one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from hypervisor.controller.concurrency import first
from hypervisor.controller.journal import Journal
from hypervisor.controller.record import Intent

_STRENGTH = {"run": 0, "stop": 1, "delete": 2}


class Wanted:
    """Of one pod. `intend` is called by anybody, the rest by the pod's own task."""

    def __init__(self, journal: Journal, grace_s: float) -> None:
        """:param grace_s: the pod's own grace period"""
        self._journal = journal
        self._grace_s = grace_s
        self._unwanted = asyncio.Event()
        if self.kind != "run":
            self._unwanted.set()

    @property
    def kind(self) -> str:
        """``run``, ``stop`` or ``delete``."""
        return self._journal.record.intent.kind

    async def intend(self, kind: Any, grace_s: float | None) -> None:
        """At least this is wanted from now on. On disk on return.

        :param grace_s: None: the pod's own
        """
        grace = float(self._grace_s if grace_s is None else grace_s)
        before = self._journal.record.intent
        if _STRENGTH[kind] < _STRENGTH[before.kind]:
            kind = before.kind
        if before.kind != "run":
            grace = min(grace, before.grace_s)
        same = before.kind == kind and before.grace_s == grace
        intent = Intent(kind, grace, before.at if same else time.time())
        await self._journal.intend(intent)
        self._unwanted.set()

    async def interruptible(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of `work`; None, and `work` cancelled, as soon as the pod is no longer wanted."""
        return await first(work, self._wait_unwanted())

    async def _wait_unwanted(self) -> None:
        await self._unwanted.wait()

    async def wait_stop(self) -> float:
        """Waits until the pod is no longer wanted; its grace period."""
        await self._unwanted.wait()
        return self._journal.record.intent.grace_s

    async def wait_killed(self) -> None:
        """Waits until the pod is to go at once."""
        await wait_record(self._journal, self._killed)

    def _killed(self) -> bool:
        intent = self._journal.record.intent
        return intent.kind == "delete" and intent.grace_s <= 0

    async def wait_deleted(self) -> None:
        """Waits until the pod is to be removed."""
        await wait_record(self._journal, lambda: self.kind == "delete")


async def wait_record(journal: Journal, met: Callable[[], bool]) -> None:
    """Waits until a condition holds that is looked at whenever the journal has news."""
    version = 0
    while not met():
        version = await journal.topic.wait_newer(version)
