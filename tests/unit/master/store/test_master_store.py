"""What every store promises, on each of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from hypervisor.errors import Unavailable
from hypervisor.master.store.base import Change, Compacted, KeyExists, StaleRevision, Store


async def take(changes: AsyncIterator[Sequence[Change]], count: int) -> list[Change]:
    """The next `count` changes of a watch."""
    taken: list[Change] = []
    async with asyncio.timeout(10):
        while len(taken) < count:
            taken += await anext(changes)
    return taken


async def test_create_then_get(store: Store) -> None:
    revision = await store.create("/r/a", b"1")
    item = await store.get("/r/a")
    assert item is not None
    assert (item.key, item.value, item.created, item.modified) == ("/r/a", b"1", revision, revision)
    assert await store.revision() == revision
    assert await store.get("/r/b") is None


async def test_an_empty_store_has_a_revision_to_watch_from(store: Store) -> None:
    empty = await store.range("/r/")
    assert empty.items == [] and empty.revision >= 1
    async with store.watch("/r/", after=empty.revision) as changes:
        await store.create("/r/a", b"1")
        assert [c.item.key for c in await take(changes, 1)] == ["/r/a"]


async def test_create_of_a_key_that_exists_changes_nothing(store: Store) -> None:
    revision = await store.create("/r/a", b"1")
    with pytest.raises(KeyExists):
        await store.create("/r/a", b"2")
    assert await store.revision() == revision
    assert (await store.get("/r/a")).value == b"1"  # type: ignore[union-attr]


async def test_update_compares_and_swaps(store: Store) -> None:
    first = await store.create("/r/a", b"1")
    second = await store.update("/r/a", b"2", expected=first)
    assert second > first
    with pytest.raises(StaleRevision) as stale:
        await store.update("/r/a", b"3", expected=first)
    assert stale.value.current == second
    item = await store.get("/r/a")
    assert item is not None and (item.value, item.created, item.modified) == (b"2", first, second)


async def test_delete_compares_too(store: Store) -> None:
    first = await store.create("/r/a", b"1")
    with pytest.raises(StaleRevision):
        await store.delete("/r/a", expected=first + 1)
    await store.delete("/r/a", expected=first)
    assert await store.get("/r/a") is None
    with pytest.raises(StaleRevision) as stale:
        await store.update("/r/a", b"2", expected=first)
    assert stale.value.current == 0
    again = await store.create("/r/a", b"3")
    item = await store.get("/r/a")
    assert item is not None and item.created == again


async def test_of_many_updates_at_once_one_wins(store: Store) -> None:
    first = await store.create("/r/a", b"0")
    tries = [store.update("/r/a", b"%d" % n, expected=first) for n in range(20)]
    outcomes = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(isinstance(o, int) for o in outcomes) == 1
    assert sum(isinstance(o, StaleRevision) for o in outcomes) == 19


async def test_revisions_grow_in_the_order_of_acknowledgement(store: Store) -> None:
    revisions = await asyncio.gather(*(store.create(f"/r/{n}", b"") for n in range(100)))
    assert len(set(revisions)) == 100


async def test_range_is_ordered_and_paged_at_one_revision(store: Store) -> None:
    for name in ("b", "a", "d", "c", "e"):
        await store.create(f"/r/{name}", name.encode())
    await store.create("/s/x", b"")
    first = await store.range("/r/", limit=2)
    assert [i.key for i in first.items] == ["/r/a", "/r/b"] and first.more == 3
    item = await store.get("/r/c")
    assert item is not None
    await store.delete("/r/c", expected=item.modified)
    await store.create("/r/cc", b"")
    second = await store.range("/r/", limit=2, after="/r/b", revision=first.revision)
    assert [i.key for i in second.items] == ["/r/c", "/r/d"] and second.more == 1
    last = await store.range("/r/", limit=2, after="/r/d", revision=first.revision)
    assert [i.key for i in last.items] == ["/r/e"] and last.more == 0
    now = await store.range("/r/")
    assert [i.key for i in now.items] == ["/r/a", "/r/b", "/r/cc", "/r/d", "/r/e"]


async def test_range_of_values_as_they_were(store: Store) -> None:
    first = await store.create("/r/a", b"old")
    second = await store.update("/r/a", b"new", expected=first)
    assert (await store.range("/r/", revision=first)).items[0].value == b"old"
    page = await store.range("/r/", revision=second)
    assert (page.items[0].value, page.items[0].modified, page.items[0].created) == (b"new", second, first)


async def test_watch_tells_every_change_once_and_in_order(store: Store) -> None:
    first = await store.create("/r/a", b"1")
    async with store.watch("/r/", after=first) as changes:
        second = await store.update("/r/a", b"2", expected=first)
        await store.create("/other", b"")
        third = await store.delete("/r/a", expected=second)
        fourth = await store.create("/r/a", b"3")
        told = await take(changes, 3)
    assert [(c.type, c.item.modified, c.item.value, c.previous) for c in told] == [
        ("update", second, b"2", b"1"),
        ("delete", third, b"2", b"2"),
        ("create", fourth, b"3", None),
    ]
    assert [c.item.created for c in told] == [first, first, fourth]


async def test_watch_from_the_past(store: Store) -> None:
    start = await store.create("/r/0", b"0")
    for n in range(1, 50):
        await store.create(f"/r/{n}", b"%d" % n)
    async with store.watch("/r/", after=start) as changes:
        told = await take(changes, 49)
        await store.create("/r/live", b"")
        told += await take(changes, 1)
    assert [c.item.key for c in told] == [f"/r/{n}" for n in range(1, 50)] + ["/r/live"]


async def test_watch_across_writes_under_way(store: Store) -> None:
    """What is written while a watch begins is neither missed nor doubled."""
    start = await store.revision()
    writes = [asyncio.create_task(store.create(f"/r/{n}", b"")) for n in range(200)]
    await asyncio.wait(writes, return_when=asyncio.FIRST_COMPLETED)
    async with store.watch("/r/", after=start) as changes:
        told = await take(changes, 200)
    revisions = [c.item.modified for c in told]
    assert revisions == sorted(set(revisions))
    assert {c.item.key for c in told} == {f"/r/{n}" for n in range(200)}
    await asyncio.gather(*writes)


async def test_compaction_forgets_the_past_and_nothing_else(store: Store) -> None:
    revision = first = await store.create("/r/a", b"0")
    gone = await store.create("/r/gone", b"")
    await store.delete("/r/gone", expected=gone)
    for n in range(1, 10):
        revision = await store.update("/r/a", b"%d" % n, expected=revision)
    await store.compact(revision)
    with pytest.raises(Compacted):
        await store.range("/r/", revision=first)
    with pytest.raises(Compacted):
        async with store.watch("/r/", after=first) as changes:
            await take(changes, 100)
    page = await store.range("/r/", revision=revision)
    assert [(i.key, i.value, i.created) for i in page.items] == [("/r/a", b"9", first)]
    async with store.watch("/r/", after=revision) as changes:
        later = await store.update("/r/a", b"10", expected=revision)
        assert [(c.item.modified, c.previous) for c in await take(changes, 1)] == [(later, b"9")]


async def test_compaction_up_to_a_delete_keeps_the_count(store: Store) -> None:
    revision = await store.create("/r/a", b"0")
    revision = await store.delete("/r/a", expected=revision)
    await store.compact(revision)
    assert (await store.range("/r/")).revision == revision
    assert await store.create("/r/a", b"1") > revision


async def test_a_cancelled_caller_leaves_the_store_whole(store: Store) -> None:
    task = asyncio.create_task(store.create("/r/a", b"1"))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    revision = await store.create("/r/b", b"2")
    assert {i.key for i in (await store.range("/r/")).items} - {"/r/a"} == {"/r/b"}
    assert await store.revision() == revision


async def test_values_are_bytes_of_any_kind(store: Store) -> None:
    value = bytes(range(256)) * 100
    await store.create("/r/ü/\u4e2d", value)
    item = await store.get("/r/ü/\u4e2d")
    assert item is not None and item.value == value
    assert [i.key for i in (await store.range("/r/ü/")).items] == ["/r/ü/\u4e2d"]


async def test_after_close_everything_is_refused(store: Store) -> None:
    await store.create("/r/a", b"1")
    await store.close()
    with pytest.raises(Unavailable):
        await store.get("/r/a")
    with pytest.raises(Unavailable):
        await store.create("/r/b", b"1")
    await store.close()
