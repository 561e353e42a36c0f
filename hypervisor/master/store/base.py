"""The interface of every store.

Revisions are positive integers; each change of any key gets the next one (or a later one), and all clients see them in
that order. A write that was acknowledged is on stable storage. Methods may be called from several tasks of one loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from hypervisor.errors import HvError


class KeyExists(HvError):
    """`create` of a key that is there."""

    reason = "AlreadyExists"
    code = 409


class StaleRevision(HvError):
    """`update` or `delete` of a key whose revision is not the expected one, or that is not there (``current`` 0)."""

    reason = "Conflict"
    code = 409

    def __init__(self, key: str, expected: int, current: int) -> None:
        super().__init__(f"{key} is at revision {current or 'none'}, not {expected}")
        self.current = current


class Compacted(HvError):
    """The revision asked for is older than what the store keeps."""

    reason = "Expired"
    code = 410

    def __init__(self, revision: int, oldest: int) -> None:
        super().__init__(f"revision {revision} has been compacted; the oldest is {oldest}")
        self.oldest = oldest


class CorruptStore(HvError):
    """The store's file is damaged, or is not one of this program's; nothing was written to it."""

    reason = "InternalError"
    code = 500


@dataclass(frozen=True, slots=True)
class Item:
    """A key as some revision left it. `created` and `modified` are revisions."""

    key: str
    value: bytes
    created: int
    modified: int


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a range, in the order of keys.

    :ivar revision: of the store, at which all pages of this range are read
    :ivar more: how many keys of the range come after this page
    """

    items: Sequence[Item]
    revision: int
    more: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """One change. For a delete, `item` is what was there, with `modified` the revision of the delete.

    :ivar previous: the value before, None for a create
    """

    type: Literal["create", "update", "delete"]
    item: Item
    previous: bytes | None


class Store(Protocol):
    """:raises Unavailable: from every method: the storage does not answer, or is full; nothing was changed"""

    async def revision(self) -> int:
        """The newest."""

    async def get(self, key: str) -> Item | None:
        """The key as it is now; a write acknowledged before the call is seen."""

    async def range(self, prefix: str, *, limit: int = 0, after: str = "", revision: int = 0) -> Page:
        """Keys that begin with `prefix`.

        :param limit: at most so many; 0: all
        :param after: only keys greater than this one
        :param revision: as of this revision; 0: now
        :raises Compacted: the revision is too old
        """

    async def create(self, key: str, value: bytes) -> int:
        """The revision of the change.

        :raises KeyExists:
        """

    async def update(self, key: str, value: bytes, *, expected: int) -> int:
        """Replaces the value if its `modified` is `expected`.

        :raises StaleRevision:
        """

    async def delete(self, key: str, *, expected: int) -> int:
        """Removes the key if its `modified` is `expected`.

        :raises StaleRevision:
        """

    def watch(self, prefix: str, *, after: int) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Change]]]:
        """Batches of changes below `prefix` whose revision is greater than `after`: each once, in order, none left out.

        :raises Compacted: `after` is too old, at the start or because the reader was too slow
        """

    async def compact(self, revision: int) -> None:
        """Forgets what was overwritten or deleted before `revision`."""

    async def close(self) -> None:
        """Ends everything the store owns. Writes under way are finished or refused."""
