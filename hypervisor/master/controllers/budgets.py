"""PodDisruptionBudgets: how many of the selected pods may be missing just now.

The status that this controller writes is what eviction and preemption go by. Source: Kubernetes, "Specifying a
Disruption Budget for your Application".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import DEPLOYMENTS, POD_DISRUPTION_BUDGETS, PODS, REPLICA_SETS
from hypervisor.kube.selectors import LabelSelector
from hypervisor.master.controllers import pods as podctl
from hypervisor.master.controllers.base import Context, own_key, unless_gone
from hypervisor.master.controllers.deployment.rollout import resolve
from hypervisor.master.controllers.pods import Pod


class BudgetController:
    """Keeps the status of each budget."""

    name = "disruption"

    def __init__(self, context: Context) -> None:
        self._context = context
        self.watches = {POD_DISRUPTION_BUDGETS: own_key, PODS: self._budgets_of}

    def _budgets_of(self, pod: Pod) -> Iterable[Key]:
        for budget in self._context.all(POD_DISRUPTION_BUDGETS):
            if meta.key_of(budget)[0] == meta.key_of(pod)[0] and _selects(budget, pod):
                yield meta.key_of(budget)

    async def sync(self, key: Key) -> float | None:
        """One turn for one budget."""
        budget = self._context.cached(POD_DISRUPTION_BUDGETS, *key)
        if budget is None:
            return None
        pods = [
            p
            for p in self._context.all(PODS)
            if meta.key_of(p)[0] == key[0] and _selects(budget, p) and podctl.phase(p) not in ("Succeeded", "Failed")
        ]
        expected = self._expected(pods)
        healthy = sum(1 for p in pods if podctl.is_ready(p) and not meta.is_deleting(p))
        desired = _desired(budget, expected)
        status = {
            "currentHealthy": healthy,
            "desiredHealthy": desired,
            "expectedPods": expected,
            "disruptionsAllowed": max(0, healthy - desired) if expected else 0,
            "observedGeneration": int(meta.get(budget, "metadata", "generation", default=0)),
        }
        await self._tell(budget, status)
        return None

    def _expected(self, pods: list[Pod]) -> int:
        """Pods that there should be: what their owners ask for; pods without one count themselves."""
        owners: dict[str, int] = {}
        alone = 0
        for pod in pods:
            owner = meta.controller_of(pod)
            if owner is None:
                alone += 1
                continue
            owners[str(owner["uid"])] = self._asked(pod, owner)
        return alone + sum(owners.values())

    def _asked(self, pod: Pod, owner: Mapping[str, Any]) -> int:
        rs = self._context.cached(REPLICA_SETS, meta.key_of(pod)[0], str(owner["name"]))
        if rs is None:
            return 1
        above = meta.controller_of(rs)
        deployment = self._context.cached(DEPLOYMENTS, meta.key_of(pod)[0], str(above["name"])) if above else None
        return int(meta.get(deployment or rs, "spec", "replicas", default=1))

    async def _tell(self, budget: Mapping[str, Any], status: dict[str, int]) -> None:
        old = budget.get("status") or {}
        if all(old.get(k) == v for k, v in status.items()):
            return
        namespace, name = meta.key_of(budget)
        await unless_gone(
            self._context.client.patch(
                POD_DISRUPTION_BUDGETS, name, namespace, {"status": status}, subresource="status"
            )
        )


def _selects(budget: Mapping[str, Any], pod: Pod) -> bool:
    return LabelSelector.of(meta.get(budget, "spec", "selector")).matches(meta.labels_of(pod))


def _desired(budget: Mapping[str, Any], expected: int) -> int:
    spec = budget.get("spec") or {}
    if spec.get("maxUnavailable") is not None:
        return max(0, expected - resolve(spec["maxUnavailable"], expected, up=True))
    return resolve(spec.get("minAvailable", 1), expected, up=True)
