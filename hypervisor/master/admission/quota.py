"""ResourceQuota: no more in a namespace than its quotas allow.

What is used is counted from the objects in memory, and from requests under way whose objects do not show there yet;
nothing else runs between counting and noting (one event loop), so that many creates at once do not get past a quota.
Source: Kubernetes, "Resource Quotas".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypervisor.kube.errors import forbidden
from hypervisor.kube.resources import PODS, RESOURCE_QUOTAS
from hypervisor.master.admission.plugin import AdmissionRequest, Operation, Outcome
from hypervisor.master.admission.usage import concerns, hard_of, shown, unsaid, usage_of
from hypervisor.master.auth.views import ObjectView
from hypervisor.master.scheduler.requests import Amounts, add

UNKNOWN_S = 60.0


@dataclass(slots=True, eq=False)
class _UnderWay:
    qualified: str
    namespace: str
    uid: str
    object: Mapping[str, Any]
    revision: int | None = None
    until: float | None = None


class ResourceQuota:
    """See the module.

    :param revision: gives the revision up to which `view` shows everything
    """

    operations: frozenset[Operation] = frozenset(("CREATE",))
    plurals: frozenset[str] = frozenset()

    def __init__(
        self, view: ObjectView, revision: Callable[[], int], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._view = view
        self._revision = revision
        self._now = now
        self._under_way: list[_UnderWay] = []

    async def admit(self, request: AdmissionRequest) -> None:
        """:raises ApiError: Forbidden: a quota would be exceeded, or wants to know more of a pod"""
        resource = request.kind.resource
        if request.subresource or not request.namespace or not request.kind.stored or request.kind.kept_as is not None:
            return
        quotas = list(self._view.list(RESOURCE_QUOTAS, request.namespace))
        if not quotas:
            return
        wanted = usage_of(resource, request.object)
        for quota in quotas:
            hard = hard_of(quota)
            if concerns(quota, resource, request.object) and (wanted.keys() & hard.keys() or resource == PODS):
                self._check(request, quota, hard, wanted)
        if not request.dry_run:
            self._hold(request)

    def _check(self, request: AdmissionRequest, quota: Mapping[str, Any], hard: Amounts, wanted: Amounts) -> None:
        resource, name = request.kind.resource, quota["metadata"]["name"]
        lacking = unsaid(hard, request.object) if resource == PODS else []
        if lacking:
            why = f"failed quota: {name}: must specify {'; '.join(lacking)}"
            raise forbidden(resource.group, resource.plural, request.name, why)
        used = self._used(request, quota)
        over = sorted(k for k in wanted.keys() & hard.keys() if wanted[k] and used.get(k, 0) + wanted[k] > hard[k])
        if over:
            parts = (
                ("requested", {k: wanted[k] for k in over}),
                ("used", {k: used.get(k, 0) for k in over}),
                ("limited", {k: hard[k] for k in over}),
            )
            told = ", ".join(f"{word}: {','.join(f'{k}={shown(k, v)}' for k, v in of.items())}" for word, of in parts)
            raise forbidden(resource.group, resource.plural, request.name, f"exceeded quota: {name}, {told}")

    def _used(self, request: AdmissionRequest, quota: Mapping[str, Any]) -> Amounts:
        resource = request.kind.resource
        there = list(self._view.list(resource, request.namespace))
        seen = {str(o["metadata"].get("uid")) for o in there}
        total: Amounts = {}
        for obj in (*there, *(u.object for u in self._pending(request) if u.uid not in seen)):
            if concerns(quota, resource, obj):
                add(total, usage_of(resource, obj))
        return total

    def _pending(self, request: AdmissionRequest) -> list[_UnderWay]:
        at, now = self._revision(), self._now()
        self._under_way = [u for u in self._under_way if not _is_over(u, at, now)]
        place = (request.kind.resource.qualified, request.namespace)
        return [u for u in self._under_way if (u.qualified, u.namespace) == place]

    def _hold(self, request: AdmissionRequest) -> None:
        uid = str(request.object["metadata"]["uid"])
        made = _UnderWay(request.kind.resource.qualified, request.namespace, uid, request.object)
        self._under_way.append(made)

        def settle(outcome: Outcome) -> None:
            if outcome == "refused":
                self._under_way = [u for u in self._under_way if u is not made]
            elif outcome == "unknown":
                made.until = self._now() + UNKNOWN_S
            else:
                made.revision = outcome

        request.holds.append(settle)


def _is_over(made: _UnderWay, at: int, now: float) -> bool:
    if made.revision is not None:
        return made.revision <= at
    return made.until is not None and made.until <= now
