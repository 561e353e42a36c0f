"""Lists: which revision, which page of it, which objects.

Source: Kubernetes API concepts, "Resource versions" (the table of list semantics) and "Retrieving large results sets
in chunks" (continue tokens).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import orjson

from hypervisor.kube.client import Object
from hypervisor.kube.errors import ApiError, bad_request, expired
from hypervisor.kube.selectors import FieldSelector, LabelSelector
from hypervisor.master.kinds.kind import Kind
from hypervisor.master.registry.entry import Entry
from hypervisor.master.registry.feed import Feed, prefix_of
from hypervisor.master.store.base import Compacted, Store

Match = Literal["", "Exact", "NotOlderThan"]
FROM_NOW = -1
"""Revision in a token that goes on with whatever is newest."""
CHUNK = 500


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked for.

    :ivar match: ``resourceVersionMatch``
    """

    namespace: str
    label: LabelSelector
    field: FieldSelector
    limit: int = 0
    continuation: str = ""
    resource_version: str = ""
    match: Match = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """A page of a list.

    :ivar continuation: token for the next page; empty on the last
    :ivar remaining: how many objects come after this page; None: unknown, as always with selectors
    """

    entries: Sequence[Entry]
    revision: int
    continuation: str = ""
    remaining: int | None = None

    @property
    def resource_version(self) -> str:
        """Where a watch goes on from."""
        return str(self.revision)

    @property
    def items(self) -> list[Object]:
        """Decoded and shared: not to be changed."""
        return [entry.obj for entry in self.entries]

    def encode(self, kind: Kind) -> bytes:
        """The whole ``...List`` as JSON, joined from what is encoded already."""
        resource = kind.resource
        metadata: Object = {"resourceVersion": str(self.revision)}
        if self.continuation:
            metadata["continue"] = self.continuation
        if self.remaining is not None:
            metadata["remainingItemCount"] = self.remaining
        head = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version, "metadata": metadata}
        return b"".join((orjson.dumps(head)[:-1], b',"items":[', b",".join(e.body for e in self.entries), b"]}"))


@dataclass(frozen=True, slots=True)
class Token:
    """A continue token. `start` is the key of the last object that was given."""

    revision: int
    start: str

    def encode(self) -> str:
        """Opaque to clients."""
        raw = orjson.dumps({"v": "meta.k8s.io/v1", "rv": self.revision, "start": self.start})
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    @classmethod
    def parse(cls, text: str) -> Token:
        """:raises ApiError: BadRequest"""
        try:
            raw = orjson.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
            if raw["v"] != "meta.k8s.io/v1" or "/" not in raw["start"]:
                raise ValueError(text)
            return cls(int(raw["rv"]), str(raw["start"]))
        except (ValueError, KeyError, TypeError, binascii.Error) as error:
            raise bad_request("continue key is not valid: list again without it") from error


def parse_version(text: str) -> int:
    """A resourceVersion; 0 where there is none.

    :raises ApiError: Invalid
    """
    if text and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ApiError("Invalid", f'resourceVersion: Invalid value: "{text}": it must be a number that the server gave')
    return int(text or 0)


class Lister:
    """Answers lists from the caches, and from the store where an older revision is asked for."""

    def __init__(self, store: Store, feed: Feed) -> None:
        self._store = store
        self._feed = feed

    async def list(self, kind: Kind, query: Query) -> Listing:
        """See `Registry.list`."""
        check(query)
        if query.continuation:
            token = Token.parse(query.continuation)
            if token.revision != FROM_NOW:
                return await self._exactly(kind, query, token.revision, token.start)
            await self._feed.newest()
            return self._from_cache(kind, query, token.start)
        version = parse_version(query.resource_version)
        if query.match == "Exact" or (version and query.limit and not query.match):
            return await self._exactly(kind, query, version)
        if query.resource_version == "":
            await self._feed.newest()
        else:
            await self._feed.reach(version)
        return self._from_cache(kind, query)

    async def _exactly(self, kind: Kind, query: Query, revision: int, start: str = "") -> Listing:
        await self._feed.reach(revision)
        if self._feed.cache(kind).changed <= revision:
            return self._from_cache(kind, query, start, revision)
        try:
            return await self._from_store(kind, query, revision, start)
        except Compacted as error:
            raise _too_old(start) from error

    def _from_cache(self, kind: Kind, query: Query, start: str = "", revision: int = 0) -> Listing:
        revision = revision or self._feed.revision
        prefix = f"{query.namespace}/" if query.namespace else ""
        entries = self._feed.cache(kind).select(prefix, start)
        if query.label or query.field:
            entries = [e for e in entries if e.matches(query.label, query.field)]
        return _page(entries, query, revision)

    async def _from_store(self, kind: Kind, query: Query, revision: int, start: str) -> Listing:
        root = prefix_of(kind)
        prefix = f"{root}{query.namespace}/" if query.namespace else root
        after = root + start if start else ""
        found: list[Entry] = []
        chunk = CHUNK if query.label or query.field or not query.limit else query.limit
        while True:
            page = await self._store.range(prefix, limit=chunk, after=after, revision=revision)
            entries = (Entry(kind, i.key[len(root) :], i.modified, i.value) for i in page.items)
            found += [e for e in entries if e.matches(query.label, query.field)]
            if not page.more or (query.limit and len(found) >= query.limit):
                return _page(found, query, revision, more=page.more)
            after = page.items[-1].key


def _page(entries: list[Entry], query: Query, revision: int, *, more: int = 0) -> Listing:
    """The first `limit` of these, of which `more` follow in the store."""
    if not query.limit or (len(entries) <= query.limit and not more):
        return Listing(entries, revision)
    page = entries[: query.limit]
    remaining = None if query.label or query.field else len(entries) - len(page) + more
    return Listing(page, revision, Token(revision, page[-1].key).encode(), remaining)


def check(query: Query) -> None:
    """:raises ApiError: parameters that do not go together"""
    if query.limit < 0:
        raise bad_request(f"limit: Invalid value: {query.limit}: must be greater than or equal to 0")
    if query.continuation and query.resource_version not in ("", "0"):
        raise bad_request("specifying resource version is not allowed when using continue")
    if not query.match:
        return
    wrong = ""
    if query.match not in ("Exact", "NotOlderThan"):
        wrong = f'supported values: "Exact", "NotOlderThan"; not "{query.match}"'
    elif query.continuation:
        wrong = "resourceVersionMatch is forbidden when continue is provided"
    elif not query.resource_version:
        wrong = "resourceVersionMatch is forbidden unless resourceVersion is provided"
    elif query.match == "Exact" and query.resource_version == "0":
        wrong = 'resourceVersionMatch "Exact" is forbidden for resourceVersion "0"'
    if wrong:
        raise ApiError("Invalid", f"resourceVersionMatch: {wrong}")


def _too_old(start: str) -> ApiError:
    """410; with a token that goes on where the list broke off, at the newest revision."""
    if not start:
        return expired("The resourceVersion for the provided list is too old.")
    error = expired(
        "The provided continue parameter is too old to display a consistent list result. You can start a new list "
        "without the continue parameter, or use the continue token in this response to retrieve the remainder of the "
        "results. Continuing with the provided token results in an inconsistent list - objects that were created, "
        "modified, or deleted between the time the first chunk was returned and now may show up in the list."
    )
    error.metadata["continue"] = Token(FROM_NOW, start).encode()
    return error
