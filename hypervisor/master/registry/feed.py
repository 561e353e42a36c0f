"""What keeps the caches in step with the store.

Theory of operation: *prime* reads all objects at one revision, *follow* applies every later change to its kind's
cache, in the order of revisions, and then tells whoever waits for that revision. If the store cannot say what happened
since (compacted while it was away), the caches are made anew and all watchers sent away to list again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import structlog

from hypervisor.errors import HvError, Unavailable
from hypervisor.kube.errors import ApiError
from hypervisor.master.kinds.kind import Kind
from hypervisor.master.registry.cache import KindCache
from hypervisor.master.store.base import Change, Compacted, Item, Store

ROOT = "/registry/"
PAGE = 1000
RETRY_S = 1.0
HISTORY = 2000
"""So many revisions are read again at the start, so that a watcher of the master before can go on where it was."""
FRESH_WITHIN_S = 3.0
Name = tuple[str, str]
"""Group and plural."""

_log = structlog.get_logger()


def prefix_of(kind: Kind) -> str:
    """Where a kind's objects lie in the store."""
    return f"{ROOT}{kind.resource.group or 'core'}/{kind.resource.plural}/"


class Feed:
    """The caches of all kinds, and the task that feeds them.

    :ivar revision: everything up to it is in the caches
    :ivar generation: grows when the caches were made anew
    """

    def __init__(self, store: Store, kinds: Iterable[Kind]) -> None:
        self._store = store
        self._kinds = {(k.resource.group, k.resource.plural): k for k in kinds if k.stored}
        self._caches: dict[Name, KindCache] = {}
        self._waiting: set[tuple[int, asyncio.Future[None]]] = set()
        self._task: asyncio.Task[None] | None = None
        self._joining: tuple[Name, list[Change]] | None = None
        self._joining_lock = asyncio.Lock()
        self.revision = 0
        self.generation = 0

    async def start(self) -> None:
        """Fills the caches, then keeps them so until `close`."""
        newest = await self._store.revision()
        await self._prime(max(newest - HISTORY, 1))
        self._task = asyncio.create_task(self._run())
        while self.revision < newest:
            await self.reach(min(newest, self.revision + 1))

    async def close(self) -> None:
        """Ends the task."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def cache(self, kind: Kind) -> KindCache:
        """The cache of a kind.

        :raises ApiError: NotFound: the kind is served no more
        """
        found = self._caches.get((kind.resource.group, kind.resource.plural))
        if found is None:
            raise ApiError("NotFound", "the server could not find the requested resource")
        return found

    async def put(self, kind: Kind) -> None:
        """Reads the objects of one more kind, or anew those of a changed one, whose listeners are sent away."""
        name = (kind.resource.group, kind.resource.plural)
        async with self._joining_lock:
            self._joining = (name, [])
            try:
                cache = await self._read_one(kind)
                for change in self._joining[1]:
                    if change.item.modified > cache.changed:
                        self._apply_one(cache, change)
            finally:
                self._joining = None
            self._kinds[name] = kind
            old, self._caches[name] = self._caches.get(name), cache
        _end(old)

    def drop(self, kind: Kind) -> None:
        """The kind is kept in memory no longer; what is stored stays."""
        name = (kind.resource.group, kind.resource.plural)
        self._kinds.pop(name, None)
        _end(self._caches.pop(name, None))

    async def _read_one(self, kind: Kind) -> KindCache:
        """All objects of a kind at one revision; changes after it are collected meanwhile."""
        prefix = prefix_of(kind)
        page = await self._store.range(prefix, limit=PAGE)
        cache = KindCache(kind, page.revision)
        while True:
            for item in page.items:
                with _unreadable_is_logged(item):
                    cache.load(_split(item.key)[1], item)
            if not page.more:
                await self.reach(page.revision)
                return cache
            page = await self._store.range(prefix, limit=PAGE, after=page.items[-1].key, revision=page.revision)

    async def newest(self) -> None:
        """Waits until the caches have everything that was acknowledged before the call."""
        await self.reach(await self._store.revision())

    async def reach(self, revision: int) -> None:
        """Waits until the caches are as new as `revision`.

        :raises ApiError: Timeout: the revision is not there within three seconds
        """
        if self.revision >= revision:
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.add((revision, future))
        try:
            async with asyncio.timeout(FRESH_WITHIN_S):
                await future
        except TimeoutError:
            raise _too_large(revision, self.revision) from None
        finally:
            self._waiting.discard((revision, future))

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
            except Compacted:
                await self._again()
            except Unavailable as error:
                _log.warning("the store does not answer", error=str(error))
                await asyncio.sleep(RETRY_S)
            except Exception:
                _log.exception("following the store failed")
                await asyncio.sleep(RETRY_S)
                await self._again()

    async def _follow(self) -> None:
        async with self._store.watch(ROOT, after=self.revision) as batches:
            async for batch in batches:
                self._apply(batch)

    async def _again(self) -> None:
        _log.warning("changes were missed: reading everything anew", revision=self.revision)
        try:
            await self._prime()
        except HvError as error:
            _log.warning("the store cannot be read", error=str(error))
            await asyncio.sleep(RETRY_S)

    async def _prime(self, revision: int = 0) -> None:
        """Reads everything as of `revision`, or as near to it as the store still has; 0 or less: now."""
        while True:
            try:
                caches, at = await self._load(max(revision, 0))
                break
            except Compacted as compacted:
                revision = compacted.oldest if revision < compacted.oldest else 0
        old, self._caches = self._caches, caches
        self.generation += 1
        self._advance(at)
        for cache in old.values():
            _end(cache)

    async def _load(self, revision: int) -> tuple[dict[Name, KindCache], int]:
        """All objects at one revision; :raises Compacted: the store has lost it, perhaps meanwhile."""
        page = await self._store.range(ROOT, limit=PAGE, revision=revision)
        caches = {name: KindCache(kind, page.revision) for name, kind in self._kinds.items()}
        while True:
            for item in page.items:
                name, key = _split(item.key)
                if name in caches:
                    with _unreadable_is_logged(item):
                        caches[name].load(key, item)
            if not page.more:
                return caches, page.revision
            page = await self._store.range(ROOT, limit=PAGE, after=page.items[-1].key, revision=page.revision)

    def _apply(self, batch: Sequence[Change]) -> None:
        for change in batch:
            name, _ = _split(change.item.key)
            if self._joining is not None and self._joining[0] == name:
                self._joining[1].append(change)
            cache = self._caches.get(name)
            if cache is not None:
                self._apply_one(cache, change)
        self._advance(batch[-1].item.modified)

    @staticmethod
    def _apply_one(cache: KindCache, change: Change) -> None:
        with _unreadable_is_logged(change.item):
            cache.apply(_split(change.item.key)[1], change)

    def _advance(self, revision: int) -> None:
        self.revision = revision
        for wanted, future in self._waiting:
            if wanted <= revision and not future.done():
                future.set_result(None)


def _end(cache: KindCache | None) -> None:
    for listener in tuple(cache.listeners) if cache is not None else ():
        listener.end()


def _split(key: str) -> tuple[Name, str]:
    """Group and plural, and ``namespace/name``, of a key in the store."""
    _, _, group, plural, rest = key.split("/", 4)
    return ("" if group == "core" else group, plural), rest


@contextmanager
def _unreadable_is_logged(item: Item) -> Iterator[None]:
    """One value that is no object must not cost the others."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _log.error("an object in the store cannot be read", key=item.key, revision=item.modified, error=str(error))


def _too_large(revision: int, current: int) -> ApiError:
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    message = f"Too large resource version: {revision}, current: {current}"
    return ApiError("Timeout", message, details={"causes": [cause], "retryAfterSeconds": 1})
