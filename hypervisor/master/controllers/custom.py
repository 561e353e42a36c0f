"""Kinds that users define take part in garbage collection and in the end of namespaces.

Each gets a cache among the others while its definition is established; other controllers do not look at them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from hypervisor.kube import meta
from hypervisor.kube.informer import Informer
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import CRDS, Resource
from hypervisor.master.controllers.base import Context, indexers, own_key
from hypervisor.master.controllers.garbage import GarbageCollector
from hypervisor.master.custom.definition import resource_of, storage_version


@dataclass(frozen=True, slots=True)
class _Cached:
    resource: Resource
    task: asyncio.Task[None]


class CustomKindsController:
    """One key per definition.

    :param group: ends its caches when the control loops end
    """

    name = "custom-kinds"

    def __init__(self, context: Context, collector: GarbageCollector, group: asyncio.TaskGroup) -> None:
        self._context = context
        self._collector = collector
        self._group = group
        self._cached: dict[str, _Cached] = {}
        self.watches = {CRDS: own_key}

    async def sync(self, key: Key) -> float | None:
        """Makes or drops the cache of one kind."""
        definition = self._context.cached(CRDS, *key)
        wanted = self._wanted(definition) if definition is not None else None
        known = self._cached.get(key[1])
        if known is not None and known.resource != wanted:
            self._leave(key[1])
        if wanted is not None and key[1] not in self._cached:
            self._join(key[1], wanted)
        return None

    @staticmethod
    def _wanted(definition: Mapping[str, object]) -> Resource | None:
        return resource_of(definition, storage_version(definition)) if meta.is_true(definition, "Established") else None

    def _join(self, name: str, resource: Resource) -> None:
        cache = Informer(self._context.client, resource, indexers=indexers(resource))
        queue = self._context.queues[self._collector.name]
        cache.add_handler(self._collector.noting(resource, queue.add))
        self._context.caches[resource] = cache
        self._cached[name] = _Cached(resource, self._group.create_task(cache.run(), name=f"cache {resource.qualified}"))

    def _leave(self, name: str) -> None:
        known = self._cached.pop(name)
        known.task.cancel()
        self._context.caches.pop(known.resource, None)
