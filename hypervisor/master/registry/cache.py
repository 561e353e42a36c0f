"""All objects of one kind in memory, and their latest changes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from typing import Protocol

from hypervisor.master.kinds.kind import Kind
from hypervisor.master.registry.entry import Entry, Event
from hypervisor.master.store.base import Change, Item

Place = tuple[str, str]
"""A field that can be selected by, and its value."""


class Listener(Protocol):
    """A watcher, told of each event that may concern it as it is published."""

    def offer(self, event: Event, number: int) -> None:
        """`number` counts the events of the kind; must not block."""

    def end(self) -> None:
        """The cache is no longer fed."""


class Listeners:
    """Watchers of one kind. Most ask for one value of one field (a node for its own pods, its own Node, a
    secret by name): they are found by it, so that an event costs nothing to the others.
    """

    def __init__(self) -> None:
        self._places: dict[Listener, Place | None] = {}
        self._everywhere: dict[Listener, None] = {}
        self._by_field: dict[str, dict[str, dict[Listener, None]]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Listener]:
        return iter(tuple(self._places))

    def add(self, listener: Listener, place: Place | None) -> None:
        """`place`: hears only of events of objects that have (or had) this value of this field; None: of all."""
        self._places[listener] = place
        self._among(place)[listener] = None

    def discard(self, listener: Listener) -> None:
        """Is told no more."""
        if listener not in self._places:
            return
        place = self._places.pop(listener)
        there = self._among(place)
        del there[listener]
        if place is not None and not there:
            del self._by_field[place[0]][place[1]]
            if not self._by_field[place[0]]:
                del self._by_field[place[0]]

    def concerned(self, event: Event) -> list[Listener]:
        """Those that may care for an event, each once."""
        found = list(self._everywhere)
        previous = event.previous
        for name, by_value in self._by_field.items():
            value = event.entry.fields[name]
            found += by_value.get(value, ())
            if previous is not None and previous.fields[name] != value:
                found += by_value.get(previous.fields[name], ())
        return found

    def _among(self, place: Place | None) -> dict[Listener, None]:
        if place is None:
            return self._everywhere
        return self._by_field.setdefault(place[0], {}).setdefault(place[1], {})


class Ring:
    """The latest events of one kind, for all its watchers together.

    :ivar floor: events later than this revision are here
    :ivar first: the number of the oldest that is kept
    """

    def __init__(self, floor: int, *, max_events: int = 10_000, max_bytes: int = 16 << 20) -> None:
        self.floor = floor
        self.first = 0
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._bytes = 0
        self._events: list[Event] = []

    @property
    def end(self) -> int:
        """The number that the next event gets."""
        return self.first + len(self._events)

    def append(self, event: Event) -> None:
        """Adds the newest; drops a quarter of the oldest when there are too many, which costs little per event."""
        self._events.append(event)
        self._bytes += _size(event)
        while len(self._events) > self._max_events or (self._bytes > self._max_bytes and len(self._events) > 1):
            self._drop(max(1, len(self._events) // 4))

    def number_after(self, revision: int) -> int | None:
        """The number of the first event later than `revision`; None: some of those are gone."""
        if revision < self.floor:
            return None
        return self.first + bisect_right(self._events, revision, key=_revision)

    def since(self, number: int, limit: int) -> Sequence[Event] | None:
        """Up to `limit` events from that number on; None: some of them are gone."""
        if number < self.first:
            return None
        return self._events[number - self.first : number - self.first + limit]

    def _drop(self, count: int) -> None:
        gone = self._events[:count]
        del self._events[:count]
        self.first += count
        self.floor = gone[-1].entry.revision
        self._bytes -= sum(map(_size, gone))


def _size(event: Event) -> int:
    return 2 * len(event.entry.body) + 500  # the body, and the line made of it


def _revision(event: Event) -> int:
    return event.entry.revision


class KindCache:
    """Objects by ``namespace/name`` and in that order.

    :ivar changed: the revision of the newest change of this kind
    """

    def __init__(self, kind: Kind, floor: int) -> None:
        self.kind = kind
        self.changed = floor
        self.ring = Ring(floor)
        self.listeners = Listeners()
        self._entries: dict[str, Entry] = {}
        self._keys: list[str] = []

    def __len__(self) -> int:
        return len(self._keys)

    def load(self, key: str, item: Item) -> None:
        """An object of the first listing, which comes in the order of keys."""
        self._entries[key] = Entry(self.kind, key, item.modified, item.value)
        self._keys.append(key)

    def get(self, key: str) -> Entry | None:
        """One object."""
        return self._entries.get(key)

    def select(self, prefix: str, after: str = "") -> list[Entry]:
        """Objects whose key begins with `prefix` and is greater than `after`, in order."""
        low = bisect_right(self._keys, after) if after >= prefix and after else bisect_left(self._keys, prefix)
        high = bisect_left(self._keys, prefix + "\U0010ffff") if prefix else len(self._keys)
        entries = self._entries
        return [entries[key] for key in self._keys[low:high]]

    def apply(self, key: str, change: Change) -> None:
        """A change from the store: becomes the state and an event."""
        entry = Entry(self.kind, key, change.item.modified, change.item.value)
        previous = self._entries.get(key)
        if change.type == "delete":
            self._remove(key)
            event = Event("DELETED", entry, previous or entry)
        else:
            if previous is None:
                insort(self._keys, key)
            self._entries[key] = entry
            event = Event("MODIFIED" if previous else "ADDED", entry, previous)
        self.changed = entry.revision
        number = self.ring.end
        self.ring.append(event)
        for listener in self.listeners.concerned(event):
            listener.offer(event, number)
        if previous is not None:
            previous.forget()
        if change.type == "delete":
            entry.forget()

    def _remove(self, key: str) -> None:
        if self._entries.pop(key, None) is not None:
            del self._keys[bisect_left(self._keys, key)]
