"""What is still read from the VM of a pod that has ended, before it goes: its logs, and what sessions have open."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import structlog

from hypervisor.controller.archive import archive_logs
from hypervisor.controller.concurrency import first
from hypervisor.controller.journal import Journal
from hypervisor.controller.machine import Machine
from hypervisor.controller.paths import PodPaths
from hypervisor.controller.services import Services
from hypervisor.controller.spec import PodSpec
from hypervisor.controller.wanted import wait_record
from hypervisor.errors import HvError

LOG_BYTES = 48 * 1024 * 1024
"""More than the log files of one container can have: two instances of two files of 10 MiB, and tar around them."""


class Closing:
    """Of one pod."""

    def __init__(self, services: Services, journal: Journal, paths: PodPaths, pod: PodSpec, uid: str) -> None:
        self._sessions = 0
        self._services = services
        self._journal = journal
        self._paths = paths
        self._containers = len(pod.init_containers) + len(pod.containers)
        self._log = structlog.get_logger().bind(pod=f"{pod.namespace}/{pod.name}", uid=uid)

    @contextmanager
    def session(self) -> Iterator[None]:
        """While it is open the VM of a pod that has ended waits for a while, so that the reader gets all."""
        self._sessions += 1
        try:
            yield
        finally:
            self._sessions -= 1
            self._journal.topic.publish()

    async def read_out(self, machine: Machine) -> None:
        """Takes the logs out of the VM and waits for its readers, as long as anybody wants them."""
        if not self._discard:
            await first(self._archive(machine), self._wait_discard())

    @property
    def _discard(self) -> bool:
        """Nobody wants the logs: the pod is being deleted, and nobody reads them (or it is to go at once)."""
        intent = self._journal.record.intent
        return intent.kind == "delete" and (self._sessions == 0 or intent.grace_s <= 0)

    async def _wait_discard(self) -> None:
        await wait_record(self._journal, lambda: self._discard)

    async def _archive(self, machine: Machine) -> None:
        times = self._services.times
        agent = self._services.connect(machine.address)
        try:
            async with asyncio.timeout(times.archive_s):
                await archive_logs(agent, self._paths, LOG_BYTES * self._containers)
        except (HvError, TimeoutError, OSError) as e:
            self._log.warning("logs could not be archived", error=str(e))
        with suppress(TimeoutError):
            async with asyncio.timeout(times.linger_s):
                await self._wait_no_sessions()

    async def _wait_no_sessions(self) -> None:
        await wait_record(self._journal, lambda: self._sessions == 0)
