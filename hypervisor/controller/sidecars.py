"""Sidecars: init containers that run beside the main ones. Started in order, each once the one before has started;
ended in the opposite order when the main containers have, whatever their own restart policy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from hypervisor.controller.journal import Journal
from hypervisor.controller.spec import ContainerSpec

Keep = Callable[[ContainerSpec], Awaitable[Any]]
Stop = Callable[[str], Awaitable[None]]


class Sidecars:
    """The running ones, each with the task that keeps it. `close` is to be called on every way out."""

    def __init__(self, journal: Journal, keep: Keep) -> None:
        self._journal = journal
        self._keep = keep
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self, container: ContainerSpec) -> None:
        """It is kept running from now on; one that runs already is joined."""
        self._tasks[container.name] = asyncio.create_task(self._guard(container), name=f"sidecar {container.name}")

    async def _guard(self, container: ContainerSpec) -> None:
        try:
            await self._keep(container)
        except Exception as e:
            if not self._failure.done():
                self._failure.set_exception(e)

    async def raise_failure(self) -> None:
        """Waits for what ends a keeper other than its container, and raises it: the VM was lost, or a bug."""
        await asyncio.shield(self._failure)

    async def wait_started(self, container: ContainerSpec) -> None:
        """Waits until it has started, by its startup probe if it has one."""
        version = 0
        while not self._journal.record.container(container.name).started:
            version = await self._journal.topic.wait_newer(version)

    async def end(self, stop: Stop) -> None:
        """Ends them by `stop`, the one that was started last first; none is started again."""
        for name, task in reversed(self._tasks.items()):
            await _cancel(task)
            await stop(name)
        self._tasks.clear()

    async def close(self) -> None:
        """Lets go of them; they run on."""
        for task in self._tasks.values():
            await _cancel(task)
        self._failure.cancel()
        with suppress(Exception):  # seen by now, or of no interest any more
            self._failure.exception() if not self._failure.cancelled() else None


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
