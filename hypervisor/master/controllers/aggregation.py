"""ClusterRoles with an ``aggregationRule`` hold the rules of those that it selects.

Decisions do not wait for it: the authorizer aggregates by itself. This is for those who read roles.
Source: Kubernetes, "Using RBAC Authorization" (aggregated ClusterRoles).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import CLUSTER_ROLES
from hypervisor.master.auth.rbac import expanded
from hypervisor.master.controllers.base import Context, unless_gone


class AggregationController:
    """Writes the rules where they differ."""

    name = "clusterrole-aggregation"

    def __init__(self, context: Context) -> None:
        self._context = context
        self.watches = {CLUSTER_ROLES: self._all_that_aggregate}

    def _all_that_aggregate(self, changed: Mapping[str, Any]) -> Iterable[Key]:
        return [meta.key_of(r) for r in self._context.all(CLUSTER_ROLES) if r.get("aggregationRule")]

    async def sync(self, key: Key) -> float | None:
        """One turn for one role."""
        role = self._context.cached(CLUSTER_ROLES, *key)
        if role is None or not role.get("aggregationRule") or meta.is_deleting(role):
            return None
        wanted = next(r for r in expanded(self._context.all(CLUSTER_ROLES)) if meta.key_of(r) == key)["rules"]
        if list(wanted) != list(role.get("rules") or ()):
            patch = {"metadata": {"resourceVersion": meta.version_of(role)}, "rules": list(wanted)}
            await unless_gone(self._context.client.patch(CLUSTER_ROLES, key[1], None, patch))
        return None
