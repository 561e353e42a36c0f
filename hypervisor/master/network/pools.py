"""Who has which address and port, as the Services in memory tell, and what is held for requests under way.

Theory of operation
-------------------
::

    free --a request takes it--> held --the request is refused--> free
                                  |---it is done---> a Service in memory has it --the Service goes--> free

What is stored says all: after a start nothing else is needed. A hold bridges the time between a request's choice and
the moment when the registry's memory shows what it has written; nothing else runs between choosing and holding (one
event loop), so no two requests choose the same. One whose outcome is unknown keeps its hold for a minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.resources import SERVICES
from hypervisor.master.admission.plugin import Outcome
from hypervisor.master.auth.views import ObjectView

Address = str | int
"""A cluster address, or a node port."""
Owner = tuple[str, str]
"""Namespace and name of a Service (of one without a name yet: its uid)."""
UNKNOWN_S = 60.0


@dataclass(slots=True)
class _Hold:
    owner: Owner
    revision: int | None = None
    until: float | None = None


class Pools:
    """See the module. For one event loop.

    :param revision: gives the revision up to which `view` shows everything
    """

    def __init__(
        self, view: ObjectView, revision: Callable[[], int], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._view = view
        self._revision = revision
        self._now = now
        self._version: Hashable = object()
        self._stored: dict[Address, Owner] = {}
        self._holds: list[tuple[Address, _Hold]] = []

    def taken(self, owner: Owner) -> Mapping[Address, Owner]:
        """What others than `owner` have or hold."""
        self._refresh()
        found = {a: o for a, o in self._stored.items() if o != owner}
        return found | {a: h.owner for a, h in self._holds if h.owner != owner}

    def hold(self, owner: Owner, addresses: Iterable[Address]) -> Callable[[Outcome], None]:
        """Keeps addresses, which nobody else has, for a request; call what comes back when it has ended."""
        hold = _Hold(owner)
        self._holds += [(address, hold) for address in addresses]

        def settle(outcome: Outcome) -> None:
            if outcome == "refused":
                self._holds = [(a, h) for a, h in self._holds if h is not hold]
            elif outcome == "unknown":
                hold.until = self._now() + UNKNOWN_S
            else:
                hold.revision = outcome

        return settle

    def _refresh(self) -> None:
        version = self._view.version(SERVICES)
        if version != self._version:
            self._stored = {a: meta.key_of(s) for s in self._view.list(SERVICES) for a in addresses_of(s)}
            self._version = version
        if self._holds:
            at, now = self._revision(), self._now()
            self._holds = [(a, h) for a, h in self._holds if not _is_over(h, at, now)]


def _is_over(hold: _Hold, at: int, now: float) -> bool:
    if hold.revision is not None:
        return hold.revision <= at
    return hold.until is not None and hold.until <= now


def addresses_of(service: Mapping[str, Any]) -> list[Address]:
    """All that a Service has."""
    spec = service.get("spec") or {}
    found: list[Address] = [a for a in spec.get("clusterIPs") or (spec.get("clusterIP"),) if a and a != "None"]
    found += [p["nodePort"] for p in spec.get("ports") or () if p.get("nodePort")]
    return [*found, spec["healthCheckNodePort"]] if spec.get("healthCheckNodePort") else found
