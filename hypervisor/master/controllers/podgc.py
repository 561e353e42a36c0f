"""Ended pods that nobody collects: beyond `LIMIT` the oldest go. Source: Kubernetes, "Pod garbage collection"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import PODS
from hypervisor.master.controllers import pods as podctl
from hypervisor.master.controllers.base import Context, unless_gone

LIMIT = 12_500
"""Upstream's terminated-pod-gc-threshold."""
LOOK_S = 60.0


class PodCollector:
    """One key for the whole cluster; looks once a minute."""

    name = "podgc"

    def __init__(self, context: Context, *, limit: int = LIMIT) -> None:
        self._context = context
        self._limit = limit
        self._begun = False
        self.watches = {PODS: self._once}

    def _once(self, _: Mapping[str, Any]) -> Iterable[Key]:
        begun, self._begun = self._begun, True
        return [] if begun else [("", "pods")]

    async def sync(self, key: Key) -> float | None:
        """One look."""
        ended = [p for p in self._context.all(PODS) if podctl.phase(p) in ("Succeeded", "Failed")]
        surplus = sorted(ended, key=lambda p: str(meta.get(p, "metadata", "creationTimestamp")))
        for pod in surplus[: max(0, len(ended) - self._limit)]:
            namespace, name = meta.key_of(pod)
            await unless_gone(self._context.client.delete(PODS, name, namespace, uid=meta.uid_of(pod), grace_s=0))
        return LOOK_S
