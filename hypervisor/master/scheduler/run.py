"""The scheduler over informers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.client import ApiClient
from hypervisor.kube.events import EventRecorder
from hypervisor.kube.informer import Handler, Informer
from hypervisor.kube.resources import NAMESPACES, NODES, POD_DISRUPTION_BUDGETS, PODS, Resource
from hypervisor.kube.selectors import LabelSelector
from hypervisor.master.scheduler.scheduler import Scheduler


async def run_scheduler(client: ApiClient, events: EventRecorder, caches: Mapping[Resource, Informer]) -> None:
    """Schedules until cancelled. The caches run already, or are about to."""
    scheduler = Scheduler(client, events)
    _connect(caches[NODES], scheduler.node_changed, scheduler.node_gone)
    _connect(caches[NAMESPACES], scheduler.namespace_changed, lambda _: None)
    _connect(caches[POD_DISRUPTION_BUDGETS], lambda b: _note_budget(scheduler, b), lambda b: _drop_budget(scheduler, b))
    _connect(caches[PODS], scheduler.pod_changed, scheduler.pod_gone)
    # All of them first: a pod must not be told that there are no nodes because their list came later.
    for resource in (NODES, NAMESPACES, POD_DISRUPTION_BUDGETS, PODS):
        await caches[resource].wait_synced()
    await scheduler.run()


def _connect(cache: Informer, changed: Any, gone: Any) -> None:
    cache.add_handler(Handler(added=changed, updated=lambda _, new: changed(new), deleted=gone))


def _note_budget(scheduler: Scheduler, budget: Mapping[str, Any]) -> None:
    selector = LabelSelector.of(meta.get(budget, "spec", "selector"))
    allowed = int(meta.get(budget, "status", "disruptionsAllowed", default=0))
    scheduler.budgets.put(*meta.key_of(budget), selector, allowed)


def _drop_budget(scheduler: Scheduler, budget: Mapping[str, Any]) -> None:
    scheduler.budgets.drop(*meta.key_of(budget))
