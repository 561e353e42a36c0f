"""A store in etcd, for clusters that outgrow one master. The etcd must be this cluster's alone: its revision is ours.

Every etcd of version 3.4 and later serves its v3 API as JSON too; that is what is spoken here, over aiohttp (see
`hypervisor.master.store.gateway`).

A write whose connection is lost is sent again: compare-and-swap makes that safe, and a value found there that is ours
says that the first try went through. A watch that loses its connection goes on after the last revision it delivered.
"""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64decode, b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from hypervisor.errors import InvalidInput, Unavailable
from hypervisor.master.store.base import Change, Compacted, Item, KeyExists, Page, StaleRevision
from hypervisor.master.store.gateway import Gateway, Refused
from hypervisor.master.store.history import Keep, forget_in_time

OUT_OF_RANGE = 11
"""gRPC status code of a revision that is compacted, or in the future."""
EVERYTHING = b"\0"


class EtcdStore:
    """`Store` in etcd. `connect` makes it."""

    def __init__(self, gateway: Gateway, keep: Keep) -> None:
        self._gateway = gateway
        self._asking: asyncio.Task[int] | None = None
        self._next: asyncio.Task[int] | None = None
        self._janitor = asyncio.create_task(forget_in_time(self, keep))

    @classmethod
    async def connect(
        cls, endpoints: Sequence[str], *, tls: ssl.SSLContext | None = None, keep: Keep | None = None
    ) -> EtcdStore:
        """Connects to a member of the cluster.

        :param endpoints: URLs of client ports, as ``http://127.0.0.1:2379``; any that answers will do
        :raises Unavailable: none answers
        """
        store = cls(Gateway(endpoints, tls), keep or Keep())
        try:
            await store.revision()
        except BaseException:
            await store.close()
            raise
        return store

    async def revision(self) -> int:
        """The newest, by a read that a majority of the cluster agrees to, begun after the call: it sees all that was
        acknowledged before. All callers that come while one is under way share the next.
        """
        if self._gateway.closed:
            raise Unavailable("the store is closed")
        if self._next is None:
            self._next = asyncio.create_task(self._ask_after(self._asking))
        return await asyncio.shield(self._next)

    async def _ask_after(self, before: asyncio.Task[int] | None) -> int:
        if before is not None:
            await asyncio.wait({before})
        self._asking, self._next = self._next, None
        return _revision(await self._gateway.call("kv/range", {"key": _b64(EVERYTHING), "count_only": True}))

    async def get(self, key: str) -> Item | None:
        """The key as it is now."""
        answer = await self._gateway.call("kv/range", {"key": _key(key)})
        return _item(answer["kvs"][0]) if answer.get("kvs") else None

    async def range(self, prefix: str, *, limit: int = 0, after: str = "", revision: int = 0) -> Page:
        """See `Store.range`."""
        start = max(prefix, after + "\0" if after else "")
        request = {"key": _key(start), "range_end": _end(prefix), "limit": limit, "revision": revision}
        try:
            answer = await self._gateway.call("kv/range", request)
        except Refused as refused:
            if "future revision" in str(refused):
                raise InvalidInput(f"revision {revision} is in the future") from refused
            raise await self._explained(refused, revision) from refused
        items = [_item(kv) for kv in answer.get("kvs", ())]
        return Page(items, revision or _revision(answer), int(answer.get("count", 0)) - len(items))

    async def create(self, key: str, value: bytes) -> int:
        """See `Store.create`."""
        put = {"request_put": {"key": _key(key), "value": _b64(value)}}
        revision, there, again = await self._swap(key, 0, put)
        if revision:
            return revision
        if again and there is not None and there.value == value:
            return there.modified
        raise KeyExists(f"{key} exists already")

    async def update(self, key: str, value: bytes, *, expected: int) -> int:
        """See `Store.update`."""
        put = {"request_put": {"key": _key(key), "value": _b64(value)}}
        revision, there, again = await self._swap(key, expected, put)
        if revision:
            return revision
        if again and there is not None and there.value == value:
            return there.modified
        raise StaleRevision(key, expected, there.modified if there else 0)

    async def delete(self, key: str, *, expected: int) -> int:
        """See `Store.delete`. After a lost connection a key that is gone counts as stale: who deleted it is unknown."""
        revision, there, _ = await self._swap(key, expected, {"request_delete_range": {"key": _key(key)}})
        if revision:
            return revision
        raise StaleRevision(key, expected, there.modified if there else 0)

    @asynccontextmanager
    async def watch(self, prefix: str, *, after: int) -> AsyncIterator[AsyncIterator[Sequence[Change]]]:
        """See `Store.watch`."""
        async with aclosing(self._follow(prefix, after)) as batches:
            yield batches

    async def compact(self, revision: int) -> None:
        """See `Store.compact`."""
        try:
            await self._gateway.call("kv/compaction", {"revision": min(revision, await self.revision())})
        except Refused as refused:
            if refused.grpc != OUT_OF_RANGE:  # another master has compacted that far
                raise

    async def close(self) -> None:
        """See `Store.close`. Idempotent."""
        self._janitor.cancel()
        await self._gateway.close()  # who asks is told Unavailable
        tasks = [task for task in (self._janitor, self._asking, self._next) if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _swap(self, key: str, expected: int, request: Mapping[str, Any]) -> tuple[int, Item | None, bool]:
        """Does `request` if the key's revision is `expected` (0: not there).

        :return: the revision of the change, 0 if there is none; what is there instead; whether it was tried before
        """
        compare = {"key": _key(key), "target": "MOD", "result": "EQUAL", "mod_revision": expected}
        look = {"request_range": {"key": _key(key)}}
        transaction = {"compare": [compare], "success": [request], "failure": [look]}
        answer, tries = await self._gateway.call_again("kv/txn", transaction)
        if answer.get("succeeded"):
            return _revision(answer), None, tries > 1
        kvs = answer["responses"][0]["response_range"].get("kvs", ())
        return 0, _item(kvs[0]) if kvs else None, tries > 1

    async def _follow(self, prefix: str, after: int) -> AsyncGenerator[Sequence[Change], None]:
        while True:
            create = {"key": _key(prefix), "range_end": _end(prefix), "start_revision": after + 1, "prev_kv": True}
            stream = self._gateway.stream("watch", {"create_request": create})
            try:
                async with aclosing(stream) as answers:
                    async for answer in answers:
                        batch = _changes(answer, after)
                        if batch:
                            after = batch[-1].item.modified
                            yield batch
            except Unavailable:
                await self._gateway.reconnect()

    async def _explained(self, refused: Refused, revision: int) -> Exception:
        """Compacted, where etcd says that the revision is out of range; it does not say what the oldest is."""
        return Compacted(revision, await self.revision()) if refused.grpc == OUT_OF_RANGE else refused


def _changes(answer: Mapping[str, Any], after: int) -> list[Change]:
    """The changes in one answer of a watch.

    :raises Compacted: etcd has ended the watch for that
    """
    if answer.get("canceled"):
        oldest = int(answer.get("compact_revision", 0))
        if oldest:
            raise Compacted(after, oldest)
        raise Unavailable(f"etcd ended a watch: {answer.get('cancel_reason', 'it does not say why')}")
    return [_change(event) for event in answer.get("events", ())]


def _change(event: Mapping[str, Any]) -> Change:
    old = _item(event["prev_kv"]) if "prev_kv" in event else None
    if event.get("type") == "DELETE":
        key, revision = b64decode(event["kv"]["key"]).decode(), int(event["kv"]["mod_revision"])
        value = old.value if old else b""
        return Change("delete", Item(key, value, old.created if old else 0, revision), value)
    item = _item(event["kv"])
    made = item.created == item.modified
    return Change("create" if made else "update", item, None if made or old is None else old.value)


def _item(kv: Mapping[str, Any]) -> Item:
    value = b64decode(kv.get("value", ""))
    return Item(b64decode(kv["key"]).decode(), value, int(kv["create_revision"]), int(kv["mod_revision"]))


def _revision(answer: Mapping[str, Any]) -> int:
    return int(answer["header"]["revision"])


def _b64(raw: bytes) -> str:
    return b64encode(raw).decode()


def _key(key: str) -> str:
    return _b64(key.encode())


def _end(prefix: str) -> str:
    """The first key after all that begin with `prefix`: its last byte plus one (UTF-8 never has 0xff)."""
    raw = prefix.encode()
    return _b64(raw[:-1] + bytes([raw[-1] + 1]) if raw else EVERYTHING)
