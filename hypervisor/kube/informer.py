"""A local copy of a server's objects that follows it for ever, and tells about each change.

Theory of operation
-------------------
::

    list, page by page --> replace the cache, tell what differs --> synced --> watch from the list's version
        ^                                                                            |
        +-- back-off with jitter <-- 410 Gone, an error, or a version that is gone <-+
                                     (a watch that just ended goes on from the last version seen: no list)

A handler therefore never misses an object for good: what happened while nobody watched is found by the next list,
deletes included. It hears of an object's states in their order, though not of each; an object that was deleted and made
again under its name is told as deleted and added. The cache only ever has states that the server had.

Source: the reflector and informer of Kubernetes' client-go, whose contract this keeps.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import structlog

from hypervisor.errors import HvError
from hypervisor.kube.client import ApiClient, Object, ObjectList, WatchEvent
from hypervisor.kube.errors import ApiError
from hypervisor.kube.meta import Key, key_of, uid_of, version_of
from hypervisor.kube.resources import Resource
from hypervisor.kube.workqueue import WorkQueue as WorkQueue

PAGE = 500
BACKOFF_S = (0.2, 30.0)
"""Seconds before the first relist after an error, and at most."""

Indexer = Callable[[Object], Iterable[str]]
"""The values of an index under which an object is found."""


@dataclass(frozen=True, slots=True)
class Handler:
    """Whom to tell; called in the event loop, and must neither block nor change the objects. An error is logged."""

    added: Callable[[Object], None] | None = None
    updated: Callable[[Object, Object], None] | None = None
    deleted: Callable[[Object], None] | None = None


class Store:
    """Objects by key, with indexes. The objects are shared: do not change them."""

    def __init__(self, indexers: Mapping[str, Indexer] | None = None) -> None:
        self._objects: dict[Key, Object] = {}
        self._indexers = dict(indexers or {})
        self._indexes: dict[str, dict[str, dict[Key, None]]] = {name: {} for name in self._indexers}

    def __len__(self) -> int:
        return len(self._objects)

    def __iter__(self) -> Iterator[Object]:
        return iter(list(self._objects.values()))

    def __contains__(self, key: Key) -> bool:
        return key in self._objects

    def get(self, key: Key) -> Object | None:
        """The object of that key."""
        return self._objects.get(key)

    def keys(self) -> Collection[Key]:
        """Of all objects."""
        return list(self._objects)

    def by_index(self, index: str, value: str) -> Sequence[Object]:
        """The objects that `index` has under `value`, oldest first."""
        return [self._objects[key] for key in self._indexes[index].get(value, ())]

    def put(self, obj: Object) -> Object | None:
        """Takes an object in; gives the one that it replaces."""
        key = key_of(obj)
        old = self.drop(key)
        self._objects[key] = obj
        for name, indexer in self._indexers.items():
            for value in indexer(obj):
                self._indexes[name].setdefault(value, {})[key] = None
        return old

    def drop(self, key: Key) -> Object | None:
        """Takes an object out and gives it."""
        old = self._objects.pop(key, None)
        if old is not None:
            for name, indexer in self._indexers.items():
                self._unindex(self._indexes[name], indexer(old), key)
        return old

    @staticmethod
    def _unindex(index: dict[str, dict[Key, None]], values: Iterable[str], key: Key) -> None:
        for value in values:
            keys = index.get(value, {})
            keys.pop(key, None)
            if not keys:
                index.pop(value, None)


class Informer:
    """Follows one kind. `run` is to be run as a task; everything else may be called at any time in the same loop.

    :param resync_s: handlers hear `updated(obj, obj)` of everything so often; None is never
    """

    def __init__(
        self,
        client: ApiClient,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        indexers: Mapping[str, Indexer] | None = None,
        resync_s: float | None = None,
        backoff_s: tuple[float, float] = BACKOFF_S,
    ) -> None:
        self.resource = resource
        self.store = Store(indexers)
        self._client = client
        self._namespace = namespace
        self._selectors = {"label_selector": label_selector, "field_selector": field_selector}
        self._resync_s = resync_s
        self._backoff_s = backoff_s
        self._handlers: list[Handler] = []
        self._synced = asyncio.Event()
        self._version = ""
        self._failures = 0
        self._log = structlog.get_logger().bind(informer=resource.qualified)

    @property
    def synced(self) -> bool:
        """The cache has been filled once."""
        return self._synced.is_set()

    async def wait_synced(self) -> None:
        """Waits until the cache has been filled once."""
        await self._synced.wait()

    def add_handler(self, handler: Handler) -> None:
        """Has `handler` told from now on; it hears of what is there already at once."""
        self._handlers.append(handler)
        for obj in self.store:
            self._tell(handler.added, obj)

    async def run(self) -> None:
        """Follows the server for ever; whatever fails is tried again."""
        async with asyncio.TaskGroup() as group:
            if self._resync_s is not None:
                group.create_task(self._resync(self._resync_s))
            await self._follow()

    async def _follow(self) -> None:
        while True:
            try:
                if not self._version:
                    await self._relist()
                await self._watch()
            except (HvError, OSError) as e:
                await self._recover(e)

    async def _recover(self, error: Exception) -> None:
        """A version that is too old is forgotten; then a while passes, longer with each failure in a row."""
        if isinstance(error, ApiError) or self._failures:
            self._version = ""
        if isinstance(error, ApiError) and error.code == 410 and not self._failures:
            self._failures = 1
            await asyncio.sleep(random.uniform(0, self._backoff_s[0]))
            return
        low, high = self._backoff_s
        delay = min(high, low * 2 ** min(self._failures, 16)) * random.uniform(0.5, 1.5)
        self._failures += 1
        self._log.info("lost the server", error=str(error), again_in_s=round(delay, 2))
        await asyncio.sleep(delay)

    # ---- list --------------------------------------------------------------------------------------------------------

    async def _relist(self) -> None:
        found: dict[Key, Object] = {}
        page = await self._page("")
        found |= {key_of(obj): obj for obj in page.items}
        while page.continuation:
            page = await self._page(page.continuation)
            found |= {key_of(obj): obj for obj in page.items}
        for key in map(key_of, self.store):
            if key not in found:
                self._remove(key)
        for obj in found.values():
            self._put(obj)
        self._version = page.resource_version
        self._synced.set()

    async def _page(self, continuation: str) -> ObjectList:
        return await self._client.list(
            self.resource, self._namespace, limit=PAGE, continuation=continuation, **self._selectors
        )

    # ---- watch -------------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        watch = self._client.watch(self.resource, self._namespace, resource_version=self._version, **self._selectors)
        began = asyncio.get_running_loop().time()
        count = 0
        async with watch as events:
            async for event in events:
                self._take(event)
                self._failures = 0
                count += 1
        if not count and asyncio.get_running_loop().time() - began < 1.0:
            raise ApiError("Timeout", "the watch ended at once and brought nothing")

    def _take(self, event: WatchEvent) -> None:
        if event.type == "DELETED":
            self._remove(key_of(event.object), event.object)
        elif event.type != "BOOKMARK":
            self._put(event.object)
        self._version = version_of(event.object) or self._version

    # ---- changes -----------------------------------------------------------------------------------------------------

    def _put(self, obj: Object) -> None:
        old = self.store.get(key_of(obj))
        if old is not None and uid_of(old) != uid_of(obj):
            self._remove(key_of(obj))
            old = None
        if old is not None and version_of(old) == version_of(obj):
            return
        self.store.put(obj)
        for handler in list(self._handlers):
            if old is None:
                self._tell(handler.added, obj)
            else:
                self._tell(handler.updated, old, obj)

    def _remove(self, key: Key, last: Object | None = None) -> None:
        """`last` is the state in which the server deleted it, where that is known."""
        old = self.store.drop(key)
        if old is None:
            return
        for handler in list(self._handlers):
            self._tell(handler.deleted, last or old)

    async def _resync(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s * random.uniform(0.9, 1.1))
            for obj in self.store:
                for handler in list(self._handlers):
                    self._tell(handler.updated, obj, obj)

    def _tell(self, call: Callable[..., None] | None, *objects: Object) -> None:
        if call is None:
            return
        try:
            call(*objects)
        except Exception:
            self._log.exception("a handler failed", object=str(key_of(objects[-1])))
