"""The warm pool: clones that are through their start before anybody needs them.

Theory of operation
-------------------
One task (`run`) keeps `wanted` clones of one kind. Each goes through::

    (memory promised as a spare) --> STARTING: template, vmx, QEMU, rehearsal --> READY --> taken: it is a pod's
              |                         |                                           |
              v                         v                                           +--> died by itself
         memory short: later      failed: later, after a back-off                   +--> stale: its kind has changed
                                                                                    +--> given up: memory is short
                                                                                    |
                                                                  ended, removed, promise released

Only READY ones are taken; `take` is synchronous, so no two pods get the same one. Whatever leaves READY wakes the task,
which starts the next one: one at a time, and not while pods' own starts are under way (`starting`) or were a moment
ago, for on a busy host a clone that nobody waits for must not take their time. Clones that are given up are ended by a
task of their own, since the ledger, which says so, cannot wait.

A daemon that ends takes its pool with it (`close`); one that is killed leaves folders that no pod's link leads to, and
the next one sweeps them (`hypervisor.controller.warmvm`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import structlog

from hypervisor.controller.backoff import BackoffPolicy
from hypervisor.controller.concurrency import Topic
from hypervisor.controller.sizing import MemoryLedger, VmSize
from hypervisor.errors import HvError, ResourceExhausted

QUIET_S = 1.0
"""After the last start of a pod, before a clone is started for the pool."""
LOOK_S = 5.0
"""Between two looks at memory and at whether clones have gone stale."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a pod's VM must be to be taken from the pool. `guest` is the digest of the guest image."""

    vcpus: int
    memory_bytes: int
    disk_bytes: int
    network: str
    guest: str


class Warm(Protocol):
    """A clone of the pool."""

    @property
    def uid(self) -> str:
        """Names it."""

    @property
    def kind(self) -> Kind:
        """What it is."""

    def memory_used(self) -> int:
        """Bytes of host memory."""

    async def wait_dead(self) -> str:
        """Waits for its end; why."""

    async def end(self) -> None:
        """Ends and removes it. Never raises."""


W = TypeVar("W", bound=Warm)
W_co = TypeVar("W_co", bound=Warm, covariant=True)


class Source(Protocol[W_co]):
    """Where clones come from."""

    @property
    def size(self) -> VmSize:
        """What each is promised."""

    def new_uid(self) -> str:
        """Of the next clone."""

    async def start(self, uid: str) -> W_co:
        """A clone that is ready. :raises HvError: it could not be had; nothing of it is left"""

    async def current(self) -> Kind:
        """What a clone that is started now would be."""


class WarmPool(Generic[W]):
    """Belongs to one event loop. `run` is to be run as a task; `close` afterwards."""

    def __init__(
        self, wanted: int, source: Source[W], ledger: MemoryLedger, backoff: BackoffPolicy | None = None,
        *, quiet_s: float = QUIET_S, look_s: float = LOOK_S,
    ) -> None:  # fmt: skip
        self.wanted = wanted
        self.taken = self.missed = self.given_up = 0
        self._source = source
        self._ledger = ledger
        self._backoff = backoff or BackoffPolicy()
        self._quiet_s, self._look_s = quiet_s, look_s
        self._ready: dict[str, W] = {}
        self._deaths: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._starts = 0
        self._quiet_from = 0.0
        self._changed = Topic()
        self._closing = False

    # ---- what pods' starts use ---------------------------------------------------------------------------------------

    @contextmanager
    def starting(self) -> Iterator[None]:
        """While it is open, and for a moment after, no clone is started."""
        self._starts += 1
        try:
            yield
        finally:
            self._starts -= 1
            self._quiet_from = time.monotonic() + self._quiet_s
            self._changed.publish()

    def take(self, kind: Kind) -> W | None:
        """A clone of exactly this kind, the caller's from now on; its promise is released, for the pod has one."""
        if not self.wanted:
            return None
        for uid, warm in self._ready.items():
            if warm.kind == kind:
                self._leave(uid)
                self._ledger.release(uid)
                self.taken += 1
                return warm
        if kind.memory_bytes == self._source.size.memory_bytes:
            self.missed += 1
        return None

    def usage(self) -> dict[str, int]:
        """For ``hv top`` and ``/metrics``."""
        used = sum(warm.memory_used() for warm in self._ready.values())
        return {
            "wanted": self.wanted, "ready": len(self._ready), "memory_bytes": used, "taken": self.taken,
            "missed": self.missed, "given_up": self.given_up,
        }  # fmt: skip

    # ---- its own life ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keeps the pool for ever."""
        delay: float | None = None
        while True:
            await self._drop_stale()
            self._ledger.relieve()
            if len(self._ready) >= self.wanted:
                await self._wait(self._look_s)
                continue
            await self._wait_quiet()
            try:
                await self._start_one()
                delay = None
            except ResourceExhausted as e:
                log.info("warm pool waits for memory", reason=str(e))
                await self._wait(self._look_s)
            except HvError as e:
                delay = self._backoff.next(delay, 0.0)
                log.warning("no clone for the warm pool", reason=str(e), again_s=delay)
                await asyncio.sleep(delay)

    async def _start_one(self) -> None:
        uid = self._source.new_uid()
        dropped = asyncio.Event()
        self._ledger.promise_spare(uid, self._source.size, lambda: self._drop(uid, dropped))
        warm: W | None = None
        try:
            warm = await self._source.start(uid)
        finally:
            if warm is None:
                self._ledger.release(uid)
        if dropped.is_set():  # while it was starting
            await self._end(warm)
            return
        self._ready[uid] = warm
        self._ledger.measure(uid, warm.memory_used)
        self._deaths[uid] = asyncio.create_task(self._watch(uid, warm), name=f"warm VM {uid[:8]}")
        log.info("warm VM is ready", uid=uid, ready=len(self._ready))

    async def _watch(self, uid: str, warm: W) -> None:
        reason = await warm.wait_dead()
        if self._ready.pop(uid, None) is not None:
            self._deaths.pop(uid, None)
            log.warning("warm VM has ended", uid=uid, reason=reason)
            await self._end(warm)
            self._changed.publish()

    def _leave(self, uid: str) -> W:
        self._deaths.pop(uid).cancel()
        self._changed.publish()
        return self._ready.pop(uid)

    def _drop(self, uid: str, dropped: asyncio.Event) -> None:
        """The ledger needs its memory, whether it is ready or still starting."""
        dropped.set()
        if uid in self._ready:
            self._discard(uid, "memory is short")

    def _discard(self, uid: str, reason: str) -> None:
        self.given_up += 1
        log.info("warm VM is given up", uid=uid, reason=reason)
        task = asyncio.create_task(self._end(self._leave(uid)))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end(self, warm: W) -> None:
        try:
            await warm.end()
        finally:
            self._ledger.release(warm.uid)

    async def _drop_stale(self) -> None:
        if not self._ready:
            return
        try:
            current = await self._source.current()
        except HvError as e:
            log.warning("warm pool cannot be checked", reason=str(e))
            return
        for uid in [uid for uid, warm in self._ready.items() if warm.kind != current]:
            self._discard(uid, "the guest image has changed")

    async def _wait_quiet(self) -> None:
        while self._starts or (left := self._quiet_from - time.monotonic()) > 0:
            await self._wait(self._look_s if self._starts else left)

    async def _wait(self, seconds: float) -> None:
        """Until something has changed, at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait_newer(self._changed.version)

    async def close(self) -> None:
        """Ends all clones. `run` must have ended."""
        for uid in list(self._ready):
            task = asyncio.create_task(self._end(self._leave(uid)))
            self._ending.add(task)
        await asyncio.gather(*self._ending, return_exceptions=True)
