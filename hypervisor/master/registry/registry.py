"""Objects over a store: what the API server's handlers and the master's own parts work on.

Reads come from memory: `get` and `list` wait until the caches have every write that was acknowledged before they were
called. Writes go to the store with compare-and-swap; the caches learn of them as everybody does, by watching it.
A resourceVersion is the store's revision.

All methods raise `ApiError`; a store that does not answer (a full disk) makes it `Unavailable`, with nothing changed.
For one event loop; objects that come from `get`, `create`, `update` and `delete` are the caller's own, those of `list`
and `watch` are shared and must not be changed.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from hypervisor.kube.client import Object
from hypervisor.kube.errors import already_exists, bad_request, expired, not_found
from hypervisor.kube.selectors import FieldSelector, LabelSelector
from hypervisor.master.kinds.kind import Kind
from hypervisor.master.registry import deletion, metadata
from hypervisor.master.registry.deletion import BY_DEFAULT, Deleted, DeleteOptions
from hypervisor.master.registry.entry import Entry, Event, encode
from hypervisor.master.registry.feed import Feed, prefix_of
from hypervisor.master.registry.listing import Lister, Listing, Match, Query, parse_version
from hypervisor.master.registry.watch import Bookmark, Watch, initial_events
from hypervisor.master.store.base import KeyExists, StaleRevision, Store

NAME_TRIES = 8
BOOKMARK_S = 60.0
Change = Callable[[Object], Object | Awaitable[Object]]
"""Gets a copy of the object as it is, gives it as it shall be; may be called again if another write came first."""


class Registry:
    """See the module. `open` makes it, `close` ends it; the store stays the caller's."""

    def __init__(self, store: Store, kinds: Iterable[Kind], *, bookmark_s: float = BOOKMARK_S) -> None:
        self._store = store
        self._feed = Feed(store, kinds)
        self._lister = Lister(store, self._feed)
        self._bookmark_s = bookmark_s

    @classmethod
    async def open(cls, store: Store, kinds: Iterable[Kind], *, bookmark_s: float = BOOKMARK_S) -> Registry:
        """Reads everything into memory and follows the store from there.

        :param kinds: all that are stored; others in the store are left alone
        :param bookmark_s: seconds between the bookmarks of a watch that asked for them
        """
        registry = cls(store, kinds, bookmark_s=bookmark_s)
        try:
            await registry._feed.start()
        except BaseException:
            await registry.close()
            raise
        return registry

    async def close(self) -> None:
        """Stops following the store."""
        await self._feed.close()

    @property
    def revision(self) -> int:
        """Everything up to this one is in memory."""
        return self._feed.revision

    async def put_kind(self, kind: Kind) -> None:
        """Keeps one more kind from now on, or a changed one in its new form (whose watchers have to list again)."""
        await self._feed.put(kind)

    def drop_kind(self, kind: Kind) -> None:
        """Keeps a kind no longer."""
        self._feed.drop(kind)

    # ---- reading -----------------------------------------------------------------------------------------------------

    async def entry(self, kind: Kind, namespace: str, name: str, *, resource_version: str = "") -> Entry:
        """An object with its encoded form (`Entry.body`); shared.

        :param resource_version: at least as new as this; ``0``: whatever is in memory; empty: the newest
        :raises ApiError: NotFound
        """
        if resource_version:
            await self._feed.reach(parse_version(resource_version))
        else:
            await self._feed.newest()
        found = self._feed.cache(kind).get(f"{namespace}/{name}")
        if found is None:
            raise not_found(kind.resource.group, kind.resource.plural, name)
        return found

    async def get(self, kind: Kind, namespace: str, name: str, *, resource_version: str = "") -> Object:
        """As `entry`, decoded: the caller's own."""
        return (await self.entry(kind, namespace, name, resource_version=resource_version)).copy()

    def peek(self, kind: Kind, namespace: str, name: str) -> Entry | None:
        """As `entry` for what is in memory now, without waiting: for authorizers and the like."""
        return self._feed.cache(kind).get(f"{namespace}/{name}")

    def changed(self, kind: Kind) -> int:
        """The revision of the newest change of a kind."""
        return self._feed.cache(kind).changed

    def peek_all(self, kind: Kind, namespace: str = "") -> list[Entry]:
        """All objects in memory now, without waiting."""
        return self._feed.cache(kind).select(f"{namespace}/" if namespace else "")

    async def list(
        self,
        kind: Kind,
        namespace: str = "",
        *,
        label: LabelSelector | None = None,
        field: FieldSelector | None = None,
        limit: int = 0,
        continuation: str = "",
        resource_version: str = "",
        match: Match = "",
    ) -> Listing:
        """Objects in the order of namespace and name; of all namespaces where none is given.

        :raises ApiError: BadRequest, Invalid: parameters; Expired: that revision is gone; Timeout: not there yet
        """
        label, field = _selectors(kind, label, field)
        query = Query(namespace, label, field, limit, continuation, resource_version, match)
        return await self._lister.list(kind, query)

    @asynccontextmanager
    async def watch(
        self,
        kind: Kind,
        namespace: str = "",
        *,
        label: LabelSelector | None = None,
        field: FieldSelector | None = None,
        resource_version: str = "",
        bookmarks: bool = False,
        send_initial_events: bool | None = None,
    ) -> AsyncIterator[Watch]:
        """Changes after `resource_version`; with none (or ``0``) first all there is, as ADDED.

        :param send_initial_events: True: first all there is (at least as new as `resource_version`), then a bookmark
            that says so; False: only changes from now on, where no `resource_version` is given
        :raises ApiError: Expired: the revision is too old: list again
        """
        label, field = _selectors(kind, label, field)
        version = parse_version(resource_version)
        await (self._feed.reach(version) if resource_version else self._feed.newest())
        cache = self._feed.cache(kind)
        initial = send_initial_events if send_initial_events is not None else not version
        events: list[Event] = []
        cursor: int | None = cache.ring.end
        if initial:
            entries = cache.select(f"{namespace}/" if namespace else "")
            events = initial_events([e for e in entries if e.matches(label, field)])
            if send_initial_events and bookmarks:
                events.append(Bookmark(kind, self._feed.revision, initial_end=True))
        elif version:
            cursor = cache.ring.number_after(version)
        if cursor is None:
            raise expired(f"too old resource version: {version} ({cache.ring.floor})")
        period = self._bookmark_s if bookmarks else 0
        watch = Watch(
            self._feed, cache, cursor, namespace=namespace, label=label, field=field, initial=events, bookmark_s=period
        )
        try:
            yield watch
        finally:
            watch.close()

    # ---- writing -----------------------------------------------------------------------------------------------------

    async def create(
        self, kind: Kind, obj: Mapping[str, Any], namespace: str = "", *, dry_run: bool = False, uid: str = ""
    ) -> Object:
        """Stores a new object; gives it with uid, creationTimestamp, generation and resourceVersion (unless `dry_run`).

        :param uid: see `metadata.new_object`; what `obj` says itself does not count
        :raises ApiError: AlreadyExists, Invalid, BadRequest
        """
        new = metadata.new_object(kind, obj, namespace, uid)
        for tries_left in reversed(range(NAME_TRIES if not new["metadata"].get("name") else 1)):
            candidate = new if new["metadata"].get("name") else metadata.named(new)
            try:
                return await self._create(kind, candidate, namespace, dry_run)
            except KeyExists:
                if not tries_left:
                    name = candidate["metadata"]["name"]
                    raise already_exists(kind.resource.group, kind.resource.plural, name) from None
        raise AssertionError("unreachable")

    async def _create(self, kind: Kind, obj: Object, namespace: str, dry_run: bool) -> Object:
        name = obj["metadata"]["name"]
        value = encode(kind, obj)
        if dry_run:
            await self._feed.newest()
            if self.peek(kind, namespace, name) is not None:
                raise KeyExists(name)
            return obj
        return _at(obj, await self._store.create(_key(kind, namespace, name), value))

    async def update(self, kind: Kind, namespace: str, name: str, change: Change, *, dry_run: bool = False) -> Object:
        """Replaces an object by what `change` makes of it; again, if another write came first and `change` lets it.

        A result with a resourceVersion or uid other than the object's is a conflict; one that is the same as before is
        not written. If nothing holds the object any longer that is being deleted, it goes.

        :raises ApiError: NotFound, Conflict, Invalid; and what `change` raises
        """
        while True:
            live = await self.entry(kind, namespace, name)
            changed = change(live.copy())
            wanted = await changed if inspect.isawaitable(changed) else changed
            new = metadata.changed_object(kind, wanted, live.obj)
            try:
                return await self._replace(kind, namespace, live, new, dry_run)
            except StaleRevision as stale:
                await self._feed.reach(stale.current)

    async def delete(self, kind: Kind, namespace: str, name: str, options: DeleteOptions = BY_DEFAULT) -> Deleted:
        """Removes an object, or marks it for its finalizers or for the node that runs it.

        :raises ApiError: NotFound, Conflict
        """
        while True:
            live = await self.entry(kind, namespace, name)
            deletion.check_preconditions(kind, live.obj, options)
            marked = deletion.marked(kind, live.copy(), options)
            try:
                if marked is None:
                    return Deleted(await self._remove(kind, namespace, live, options.dry_run), True)
                return Deleted(await self._replace(kind, namespace, live, marked, options.dry_run), False)
            except StaleRevision as stale:
                await self._feed.reach(stale.current)

    async def _replace(self, kind: Kind, namespace: str, live: Entry, new: Object, dry_run: bool) -> Object:
        """Writes `new` over `live`, removes it if it may go, and does nothing if they are the same."""
        if metadata.may_go(new):
            return await self._remove(kind, namespace, live, dry_run)
        if new == live.obj:
            return new
        value = encode(kind, new)
        if dry_run:
            return new
        return _at(new, await self._store.update(prefix_of(kind) + live.key, value, expected=live.revision))

    async def _remove(self, kind: Kind, namespace: str, live: Entry, dry_run: bool) -> Object:
        if dry_run:
            return live.copy()
        return _at(live.copy(), await self._store.delete(prefix_of(kind) + live.key, expected=live.revision))


def _key(kind: Kind, namespace: str, name: str) -> str:
    return f"{prefix_of(kind)}{namespace}/{name}"


def _at(obj: Object, revision: int) -> Object:
    obj["metadata"]["resourceVersion"] = str(revision)
    return obj


def _selectors(
    kind: Kind, label: LabelSelector | None, field: FieldSelector | None
) -> tuple[LabelSelector, FieldSelector]:
    """Both, none left out; only fields that the kind lets select by.

    :raises ApiError: BadRequest
    """
    for requirement in field.requirements if field else ():
        if requirement.field not in ("metadata.name", "metadata.namespace", *kind.selectable):
            raise bad_request(f"field label not supported: {requirement.field}")
    return label or LabelSelector(), field or FieldSelector()
