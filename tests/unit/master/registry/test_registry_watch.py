"""Watches: initial events, selectors, bookmarks, slow readers, expiry."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from registry_objects import KINDS, MAP, POD, pod

from hypervisor.kube.errors import ApiError
from hypervisor.kube.selectors import parse_fields, parse_labels
from hypervisor.master.registry.entry import Event
from hypervisor.master.registry.registry import Registry
from hypervisor.master.registry.watch import Watch
from hypervisor.master.store.sqlite import SqliteStore

Object = dict[str, Any]


async def take(watch: Watch, count: int) -> list[Event]:
    taken: list[Event] = []
    async with asyncio.timeout(10):
        while len(taken) < count:
            taken += await watch.batch()
    return taken


def told(events: list[Event]) -> list[tuple[str, str]]:
    return [(e.type, e.object["metadata"].get("name", "")) for e in events]


def labelled(**labels: str) -> Any:
    def change(obj: Object) -> Object:
        obj["metadata"]["labels"] = labels
        return obj

    return change


async def test_events_carry_the_object_and_its_version(registry: Registry) -> None:
    async with registry.watch(POD, resource_version=str(registry.revision)) as watch:
        made = await registry.create(POD, pod("a"), "ns")
        changed = await registry.update(POD, "ns", "a", labelled(a="b"))
        deleted = await registry.delete(POD, "ns", "a")
        events = await take(watch, 3)
    assert [e.type for e in events] == ["ADDED", "MODIFIED", "DELETED"]
    assert [e.object for e in events] == [made, changed, deleted.object]
    lines = [json.loads(e.line) for e in events]
    assert lines == [{"type": e.type, "object": e.object} for e in events]
    assert int(deleted.object["metadata"]["resourceVersion"]) > int(changed["metadata"]["resourceVersion"])


async def test_without_a_version_first_what_there_is(registry: Registry) -> None:
    for name in ("b", "a"):
        await registry.create(POD, pod(name), "ns")
    async with registry.watch(POD) as watch:
        assert told(await take(watch, 2)) == [("ADDED", "a"), ("ADDED", "b")]
        await registry.create(POD, pod("c"), "ns")
        assert told(await take(watch, 1)) == [("ADDED", "c")]


async def test_initial_events_end_with_a_bookmark(registry: Registry) -> None:
    await registry.create(POD, pod("a"), "ns")
    async with registry.watch(POD, send_initial_events=True, bookmarks=True) as watch:
        events = await take(watch, 2)
    assert told(events) == [("ADDED", "a"), ("BOOKMARK", "")]
    line = json.loads(events[1].line)["object"]
    assert line["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
    assert line["metadata"]["resourceVersion"] == str(registry.revision) and line["kind"] == "Pod"


async def test_only_news_when_initial_events_are_not_wanted(registry: Registry) -> None:
    await registry.create(POD, pod("a"), "ns")
    async with registry.watch(POD, send_initial_events=False) as watch:
        await registry.create(POD, pod("b"), "ns")
        assert told(await take(watch, 1)) == [("ADDED", "b")]


async def test_namespace_and_kind_are_kept_apart(registry: Registry) -> None:
    async with registry.watch(POD, "ns") as watch:
        await registry.create(MAP, {"metadata": {"name": "m"}}, "ns")
        await registry.create(POD, pod("a"), "ns-2")
        await registry.create(POD, pod("b"), "ns")
        assert told(await take(watch, 1)) == [("ADDED", "b")]


async def test_entering_and_leaving_a_selector(registry: Registry) -> None:
    async with registry.watch(POD, label=parse_labels("app=web")) as watch:
        await registry.create(POD, pod("a"), "ns")
        await registry.update(POD, "ns", "a", labelled(app="web"))
        await registry.update(POD, "ns", "a", labelled(app="web", more="1"))
        left = await registry.update(POD, "ns", "a", labelled(app="db"))
        await registry.delete(POD, "ns", "a")
        await registry.create(POD, pod("b", labels={"app": "web"}), "ns")
        events = await take(watch, 4)
    assert told(events) == [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a"), ("ADDED", "b")]
    gone = json.loads(events[2].line)["object"]["metadata"]
    assert gone["labels"] == {"app": "web", "more": "1"}, "the last state that fitted"
    assert gone["resourceVersion"] == left["metadata"]["resourceVersion"]


async def test_field_selector(registry: Registry) -> None:
    async with registry.watch(POD, field=parse_fields("spec.nodeName=n1")) as watch:
        await registry.create(POD, pod("a"), "ns")
        await registry.update(POD, "ns", "a", lambda o: o | {"spec": {"nodeName": "n2"}})
        await registry.create(POD, pod("b") | {"spec": {"nodeName": "n1"}}, "ns")
        await registry.delete(POD, "ns", "b")
        assert told(await take(watch, 1))[0] == ("ADDED", "b")
    with pytest.raises(ApiError, match=r"field label not supported: spec\.x"):
        async with registry.watch(POD, field=parse_fields("spec.x=1")):
            pass


async def test_bookmarks_come_by_time_and_are_a_place_to_go_on_from(store: SqliteStore) -> None:
    registry = await Registry.open(store, KINDS, bookmark_s=0.05)
    async with registry.watch(POD, bookmarks=True) as watch:
        await registry.create(MAP, {"metadata": {"name": "m"}}, "ns")
        bookmark = (await take(watch, 1))[0]
    assert bookmark.type == "BOOKMARK"
    async with registry.watch(POD, resource_version=bookmark.object["metadata"]["resourceVersion"]) as watch:
        await registry.create(POD, pod("a"), "ns")
        assert told(await take(watch, 1)) == [("ADDED", "a")]
    await registry.close()


async def test_a_version_before_the_start_is_expired(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "s.db")
    registry = await Registry.open(store, KINDS)
    early = (await registry.create(POD, pod("a"), "ns"))["metadata"]["resourceVersion"]
    late = (await registry.create(POD, pod("b"), "ns"))["metadata"]["resourceVersion"]
    await registry.close()
    await store.compact(int(late))
    registry = await Registry.open(store, KINDS)
    with pytest.raises(ApiError) as error:
        async with registry.watch(POD, resource_version=early):
            pass
    assert error.value.code == 410
    async with registry.watch(POD, resource_version=late) as watch:
        await registry.create(POD, pod("c"), "ns")
        assert told(await take(watch, 1)) == [("ADDED", "c")]
    await registry.close()
    await store.close()


async def test_a_version_of_the_future(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypervisor.master.registry.feed.FRESH_WITHIN_S", 0.05)
    with pytest.raises(ApiError, match="Too large resource version") as error:
        async with registry.watch(POD, resource_version="999999"):
            pass
    assert error.value.code == 504


async def test_fifty_watchers_share_one_line(registry: Registry) -> None:
    async with registry.watch(POD) as one, registry.watch(POD) as two:
        await registry.create(POD, pod("a"), "ns")
        first, second = await take(one, 1), await take(two, 1)
    assert first[0].line is second[0].line


async def test_a_slow_watcher_is_sent_away(registry: Registry) -> None:
    ring = registry._feed.cache(POD).ring
    ring._max_events = 8
    async with registry.watch(POD, resource_version=str(registry.revision)) as slow:
        for n in range(20):
            await registry.create(POD, pod(f"p{n}"), "ns")
        await registry.get(POD, "ns", "p19")
        assert len(ring._events) <= 8
        with pytest.raises(ApiError) as error:
            await slow.batch()
    assert error.value.reason == "Expired"


async def test_a_watcher_that_nothing_concerns_never_falls_behind(registry: Registry) -> None:
    registry._feed.cache(POD).ring._max_events = 8
    async with registry.watch(POD, "quiet") as watch:
        waiting = asyncio.create_task(watch.batch())
        for n in range(50):
            await registry.create(POD, pod(f"p{n}"), "loud")
        await registry.create(POD, pod("a"), "quiet")
        assert told(list(await asyncio.wait_for(waiting, 10))) == [("ADDED", "a")]


async def test_nothing_is_left_of_a_closed_watch(registry: Registry) -> None:
    async with registry.watch(POD, bookmarks=True):
        assert len(registry._feed.cache(POD).listeners) == 1
    assert not registry._feed.cache(POD).listeners


async def test_an_event_is_offered_only_where_it_may_matter(registry: Registry) -> None:
    def on(node: str) -> Callable[[Object], Object]:
        return lambda obj: obj | {"spec": obj["spec"] | {"nodeName": node}}

    registry._feed.cache(POD).ring._max_events = 4
    async with AsyncExitStack() as stack:
        watches = {}
        for name in ("n1", "n2", "n3"):
            opened = registry.watch(POD, field=parse_fields(f"spec.nodeName={name}"), resource_version="1")
            watches[name] = await stack.enter_async_context(opened)
        waiting = {name: asyncio.create_task(watch.batch()) for name, watch in watches.items()}
        await asyncio.sleep(0)
        for n in range(20):  # more than the ring holds
            await registry.create(POD, pod(f"p{n}"), "ns")
        await registry.update(POD, "ns", "p0", on("n1"))
        assert told(list(await waiting["n1"])) == [("ADDED", "p0")]
        await registry.update(POD, "ns", "p0", on("n2"))  # cannot be in a cluster, but both must hear of it
        assert told(list(await watches["n1"].batch())) == [("DELETED", "p0")]
        assert told(list(await waiting["n2"])) == [("ADDED", "p0")]
        event = registry._feed.cache(POD).ring._events[-1]
        assert set(registry._feed.cache(POD).listeners.concerned(event)) == {watches["n1"], watches["n2"]}
        watches["n3"]._bookmark()  # has been told of nothing, and yet has not fallen behind
        assert [e.type for e in await waiting["n3"]] == ["BOOKMARK"]


async def test_watchers_go_on_after_a_restart(store: SqliteStore) -> None:
    registry = await Registry.open(store, KINDS)
    first = await registry.create(POD, pod("a"), "ns")
    await registry.update(POD, "ns", "a", labelled(x="y"))
    await registry.delete(POD, "ns", "a")
    await registry.close()
    registry = await Registry.open(store, KINDS)
    assert registry.peek_all(POD) == []
    async with registry.watch(POD, resource_version=first["metadata"]["resourceVersion"]) as watch:
        assert told(await take(watch, 2)) == [("MODIFIED", "a"), ("DELETED", "a")]
    await registry.close()


async def test_missed_changes_make_the_caches_anew(store: SqliteStore, registry: Registry) -> None:
    await registry.create(POD, pod("old"), "ns")
    feed = registry._feed
    assert feed._task is not None
    async with registry.watch(POD, send_initial_events=False) as watch:
        feed._task.cancel()
        await asyncio.gather(feed._task, return_exceptions=True)
        await store.create("/registry/core/pods/ns/new", b'{"metadata":{"name":"new"}}')
        await store.compact(await store.revision())
        store._window.floor = await store.revision()
        feed._task = asyncio.create_task(feed._run())
        assert (await registry.get(POD, "ns", "new"))["kind"] == "Pod"
        with pytest.raises(ApiError) as error:
            await watch.batch()
    assert error.value.code == 410
    await registry.create(POD, pod("newer"), "ns")
    assert {e.key for e in registry.peek_all(POD)} >= {"ns/old", "ns/new"}
