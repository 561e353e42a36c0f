"""Probes of one running container: when to look, and what follows from what was seen.

Theory of operation
-------------------
::

                    failureThreshold in a row
    (startup) ---------------------------------------------> Verdict: the container is to be ended
        |  one success (or no startup probe): started
        v
    (liveness) --- failureThreshold in a row -------------->  "
    (readiness) -- successThreshold in a row: ready ----> failureThreshold in a row: not ready ---> ...

Liveness and readiness begin together once the container has started, and look every period, the first time after the
initial delay (counted from the container's start). A look that could not be taken - the agent cannot be reached, as
while the VM's device process is replaced - counts as neither; a VM that stays silent is given up elsewhere (`feed`).
Idle, a probe is one sleeping task; a look is one short connection to the agent.

A new instance of the container begins anew; a daemon that joins a running one goes on from what is on record.
Source: Kubernetes documentation, "Configure Liveness, Readiness and Startup Probes".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, NoReturn

from hypervisor.controller.actions import Actions, Outcome
from hypervisor.controller.concurrency import first
from hypervisor.controller.journal import Journal
from hypervisor.controller.record import NS
from hypervisor.controller.spec import Care, Probe
from hypervisor.errors import Conflict, HvError, Timeout, Unavailable

Kind = Literal["Startup", "Liveness", "Readiness"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The container is to be ended because this probe says so; `grace_s` None means the pod's."""

    kind: Kind
    grace_s: int | None


class Count:
    """Results in a row."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._last: bool | None = None
        self._run = 0

    def take(self, ok: bool) -> bool | None:
        """One more result; what now holds, None while the threshold is not reached."""
        self._run = self._run + 1 if ok is self._last else 1
        self._last = ok
        needed = self._probe.success_threshold if ok else self._probe.failure_threshold
        return ok if self._run >= needed else None


class ContainerProbes:
    """Those of one instance of a container, which the journal has as running.

    :param started_ns: its start, nanoseconds since 1970
    """

    def __init__(self, name: str, care: Care, actions: Actions, journal: Journal, started_ns: int) -> None:
        self._name = name
        self._care = care
        self._actions = actions
        self._journal = journal
        self._started_ns = started_ns

    async def run(self) -> Verdict:
        """Looks for as long as it runs; returns when it is to be ended. Cancel it when it has ended by itself."""
        startup = self._care.startup
        if startup is not None and not self._journal.record.container(self._name).started:
            if not await self._until("Startup", startup, lambda _: True):
                return Verdict("Startup", startup.grace_s)
            self._journal.container(self._name, started=True, ready=self._care.readiness is None)
        verdict: Verdict = await first(self._live(), self._get_ready())
        return verdict

    async def _live(self) -> Verdict:
        probe = self._care.liveness
        if probe is None:
            await asyncio.Event().wait()
            raise AssertionError("unreachable")
        await self._until("Liveness", probe, lambda ok: not ok)
        return Verdict("Liveness", probe.grace_s)

    async def _get_ready(self) -> NoReturn:
        probe = self._care.readiness
        if probe is not None:
            await self._until("Readiness", probe, self._show_ready)
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    def _show_ready(self, ok: bool) -> bool:
        self._journal.container(self._name, ready=ok)
        return False

    async def _until(self, kind: Kind, probe: Probe, enough: Callable[[bool], bool]) -> bool:
        """Looks every period until what holds is `enough`; what that was."""
        loop = asyncio.get_running_loop()
        ran_s = time.time() - self._started_ns / NS
        await asyncio.sleep(min(max(0.0, probe.initial_delay_s - ran_s), probe.initial_delay_s))
        count = Count(probe)
        while True:
            began = loop.time()
            ok = await self._look(kind, probe)
            settled = None if ok is None else count.take(ok)
            if settled is not None and enough(settled):
                return settled
            await asyncio.sleep(max(0.0, began + probe.period_s - loop.time()))

    async def _look(self, kind: Kind, probe: Probe) -> bool | None:
        """One look; None when it could not be taken."""
        outcome = await _tried(self._actions.run(probe.action, probe.timeout_s))
        if outcome is not None and not outcome.ok:
            self._journal.note("Warning", "Unhealthy", f"{kind} probe failed: {outcome.message}", self._name)
        return None if outcome is None else outcome.ok


async def _tried(look: Awaitable[Outcome]) -> Outcome | None:
    try:
        return await look
    except Timeout as e:
        return Outcome(False, str(e))
    except (Unavailable, Conflict):
        return None
    except HvError as e:
        return Outcome(False, str(e))
