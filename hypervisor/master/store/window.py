"""The newest changes of a store, kept in memory for its watchers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from hypervisor.master.store.base import Change


class Window:
    """Changes in the order of their revisions; the oldest are dropped when there are too many.

    :ivar floor: all changes later than this revision, up to `revision`, are here
    :ivar revision: the newest that was published
    """

    def __init__(self, revision: int, *, max_changes: int = 2000, max_bytes: int = 8 << 20) -> None:
        self.floor = revision
        self.revision = revision
        self._max_changes = max_changes
        self._max_bytes = max_bytes
        self._bytes = 0
        self._changes: list[Change] = []
        self._revisions: list[int] = []

    def publish(self, changes: Sequence[Change]) -> None:
        """Appends; drops a quarter of the oldest when full, so that the cost per change stays constant."""
        self._changes += changes
        self._revisions += [c.item.modified for c in changes]
        self._bytes += sum(map(_size, changes))
        self.revision = self._revisions[-1]
        while len(self._changes) > self._max_changes or (self._bytes > self._max_bytes and len(self._changes) > 1):
            self._drop(max(1, len(self._changes) // 4))

    def after(self, revision: int, limit: int) -> Sequence[Change] | None:
        """Up to `limit` changes later than `revision`; None: some of them are no longer here."""
        if revision < self.floor:
            return None
        start = bisect_right(self._revisions, revision)
        return self._changes[start : start + limit]

    def _drop(self, count: int) -> None:
        self.floor = self._revisions[count - 1]
        self._bytes -= sum(map(_size, self._changes[:count]))
        del self._changes[:count], self._revisions[:count]


def _size(change: Change) -> int:
    return len(change.item.value) + 200  # the previous value is another change's, or soon garbage
