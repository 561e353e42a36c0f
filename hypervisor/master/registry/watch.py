"""One watcher of one kind.

Theory of operation: a watch is a cursor into the ring of events that all watchers of the kind share, so that a slow one
costs nothing; it is sent away (410) when the ring has dropped what it has not read. States: *initial* (what there is,
as ADDED), then *following*: read from the ring what concerns it; where there is nothing, wait to be woken by `offer`.
A watch that waits has read everything, but for events that it was not told of because they cannot concern it (see
`Listeners`): so its cursor jumps to the event that wakes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson

from hypervisor.kube.client import Object
from hypervisor.kube.errors import expired
from hypervisor.kube.selectors import FieldSelector, LabelSelector
from hypervisor.master.kinds.kind import Kind
from hypervisor.master.registry.cache import KindCache, Place
from hypervisor.master.registry.entry import Entry, Event
from hypervisor.master.registry.feed import Feed

BATCH = 200
INITIAL_END = "k8s.io/initial-events-end"


class Bookmark(Event):
    """Tells a watcher how far it has come."""

    __slots__ = ("_object",)

    def __init__(self, kind: Kind, revision: int, *, initial_end: bool = False) -> None:
        metadata: dict[str, Any] = {"resourceVersion": str(revision), "creationTimestamp": None}
        if initial_end:
            metadata["annotations"] = {INITIAL_END: "true"}
        named = {"apiVersion": kind.resource.api_version, "kind": kind.resource.kind}
        self._object: Object = named | {"metadata": metadata}
        self.type = "BOOKMARK"
        self.previous = None

    @property
    def object(self) -> Object:
        """Only type and resourceVersion (and the annotation that ends the initial events)."""
        return self._object

    @property
    def line(self) -> bytes:
        """As a watch's answer carries it."""
        return b'{"type":"BOOKMARK","object":%s}\n' % orjson.dumps(self._object)


class Watch:
    """Iterate it for single events, or ask for `batch`; for one task at a time. `Registry.watch` makes and ends it.

    :param cursor: number of the first event to read
    :param namespace: of the objects; empty: all
    :param bookmark_s: seconds between bookmarks; 0: none
    """

    def __init__(
        self,
        feed: Feed,
        cache: KindCache,
        cursor: int,
        *,
        namespace: str,
        label: LabelSelector,
        field: FieldSelector,
        initial: Sequence[Event] = (),
        bookmark_s: float = 0,
    ) -> None:
        self._feed = feed
        self._cache = cache
        self._cursor = cursor
        self._prefix = f"{namespace}/" if namespace else ""
        self._label = label
        self._field = field
        self._initial = initial
        self._bookmark_s = bookmark_s
        self._bookmark_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._woken: asyncio.Future[None] | None = None
        cache.listeners.add(self, _place(namespace, field))
        self._arm()

    async def batch(self) -> Sequence[Event]:
        """What happened since the last call, at least one event, in order; waits for it.

        :raises ApiError: Expired: the reader was too slow, or the changes since are unknown: list again
        """
        if self._initial:
            initial, self._initial = self._initial, ()
            return initial
        while True:
            found = self._read()
            if found:
                return found
            if self._bookmark_due:
                self._arm()
                return [Bookmark(self._cache.kind, self._feed.revision)]
            await self._wait()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            for event in await self.batch():
                yield event

    def offer(self, event: Event, number: int) -> None:
        """See `Listener`."""
        if self._woken is None or self._woken.done():
            return
        self._cursor = number  # it waits, so it has read what was before; what it was not told of is not its concern
        if self._seen(event) is None:
            self._cursor += 1
        else:
            self._woken.set_result(None)

    def end(self) -> None:
        """See `Listener`."""
        self._ended = True
        self._wake()

    def close(self) -> None:
        """Lets go of the cache; the watch is of no use afterwards."""
        self._cache.listeners.discard(self)
        if self._timer is not None:
            self._timer.cancel()

    def _read(self) -> list[Event]:
        """Events that concern this watch, from the ring; empty once all is read."""
        while True:
            events = None if self._ended else self._cache.ring.since(self._cursor, BATCH)
            if events is None:
                raise expired(
                    f"too old resource version: the watch of {self._cache.kind.resource.qualified} fell behind"
                )
            self._cursor += len(events)
            seen = [e for e in map(self._seen, events) if e is not None]
            if seen or not events:
                return seen

    def _seen(self, event: Event) -> Event | None:
        if self._prefix and not event.entry.key.startswith(self._prefix):
            return None
        return event.seen_through(self._label, self._field)

    async def _wait(self) -> None:
        self._woken = asyncio.get_running_loop().create_future()
        try:
            await self._woken
        finally:
            self._woken = None

    def _arm(self) -> None:
        self._bookmark_due = False
        if self._bookmark_s:
            self._timer = asyncio.get_running_loop().call_later(self._bookmark_s, self._bookmark)

    def _bookmark(self) -> None:
        self._bookmark_due = True
        if self._woken is not None and not self._woken.done():
            self._cursor = self._cache.ring.end
        self._wake()

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)


def _place(namespace: str, field: FieldSelector) -> Place | None:
    """Where the cache is to look for the watch: the field that says most."""
    for requirement in field.requirements:
        value = field.exact(requirement.field)
        if value is not None:
            return requirement.field, value
    return ("metadata.namespace", namespace) if namespace else None


def initial_events(entries: Sequence[Entry]) -> list[Event]:
    """What there is, as a watch begins."""
    return [Event("ADDED", entry) for entry in entries]
