"""What quotas tell: how much of what they allow is used. Source: Kubernetes, "Resource Quotas"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import RESOURCE_QUOTAS
from hypervisor.master.admission.usage import concerns, hard_of, shown, usage_of
from hypervisor.master.controllers.base import Context, own_key, unless_gone
from hypervisor.master.scheduler.requests import Amounts, add


class QuotaController:
    """Every change in a namespace puts its quotas to work; admission does not wait for what is told here."""

    name = "resourcequota"

    def __init__(self, context: Context) -> None:
        self._context = context
        counted = [r for r in context.caches if r.namespaced and r != RESOURCE_QUOTAS]
        self.watches = {RESOURCE_QUOTAS: own_key, **dict.fromkeys(counted, self._quotas_of)}

    def _quotas_of(self, obj: Mapping[str, Any]) -> Iterable[Key]:
        namespace = meta.key_of(obj)[0]
        return [key for q in self._context.all(RESOURCE_QUOTAS) if (key := meta.key_of(q))[0] == namespace]

    async def sync(self, key: Key) -> float | None:
        """One turn for one quota."""
        quota = self._context.cached(RESOURCE_QUOTAS, *key)
        if quota is None or meta.is_deleting(quota):
            return None
        used, hard = self._used(quota), meta.get(quota, "spec", "hard", default={})
        status = {"hard": dict(hard), "used": {name: shown(name, used.get(name, 0)) for name in hard_of(quota)}}
        if quota.get("status") != status:
            patch = {"status": {"hard": None, "used": None} | status}
            await unless_gone(self._context.client.patch(RESOURCE_QUOTAS, key[1], key[0], patch, subresource="status"))
        return None

    def _used(self, quota: Mapping[str, Any]) -> Amounts:
        namespace, total = meta.key_of(quota)[0], Amounts()
        for resource in tuple(self._context.caches):
            if not resource.namespaced:
                continue
            for obj in self._context.all(resource):
                if meta.key_of(obj)[0] == namespace and concerns(quota, resource, obj):
                    add(total, usage_of(resource, obj))
        return total
