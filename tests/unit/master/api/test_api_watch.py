"""Watches over HTTP, and answers that are compressed."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

from masterkit import Api


async def watched(api: Api, query: str) -> list[Any]:
    """All that a watch of the test's config maps says within a second."""
    answer = await api.get(f"{api.maps}?watch=true&timeoutSeconds=1&{query}")
    assert answer.status == 200, answer.body
    return [json.loads(line) for line in answer.body.splitlines()]


def told(events: list[Any]) -> list[tuple[str, str]]:
    return [(e["type"], e["object"]["metadata"].get("name", "")) for e in events]


async def test_a_watch_goes_on_from_a_version(api: Api) -> None:
    first = await api.make_map("a")
    await api.make_map("b")
    await api.send("DELETE", f"{api.maps}/a")
    events = await watched(api, f"resourceVersion={first['metadata']['resourceVersion']}")
    assert told(events) == [("ADDED", "b"), ("DELETED", "a")]


async def test_a_watch_that_wants_all_first_is_told_where_that_ends(api: Api) -> None:
    await api.make_map("a")
    await api.make_map("b")
    wanted = "sendInitialEvents=true&allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan"
    events = await watched(api, wanted)
    assert told(events) == [("ADDED", "a"), ("ADDED", "b"), ("BOOKMARK", "")]
    metadata = events[-1]["object"]["metadata"]
    assert metadata["annotations"] == {"k8s.io/initial-events-end": "true"}
    assert events[-1]["object"]["kind"] == "ConfigMap"
    assert told(await watched(api, f"resourceVersion={metadata['resourceVersion']}")) == []


async def test_a_watch_that_wants_nothing_of_before_gets_nothing_of_it(api: Api) -> None:
    await api.make_map("a")
    watch = asyncio.create_task(watched(api, "sendInitialEvents=false&resourceVersionMatch=NotOlderThan"))
    assert told(await watch) == []


async def test_large_lists_are_compressed_for_those_who_take_it(api: Api) -> None:
    for n in range(3):
        await api.make_map(f"m{n}", text="x" * 60_000)
    api.session._auto_decompress = False  # the bytes as they went over the wire
    packed = await api.get(api.maps, Accept_Encoding="gzip")
    assert (packed.headers.get("Content-Encoding"), packed.headers.get("Vary")) == ("gzip", "Accept-Encoding")
    plain = await api.get(api.maps, Accept_Encoding="identity")
    assert "Content-Encoding" not in plain.headers
    assert len(packed.body) < len(plain.body) // 10
    assert gzip.decompress(packed.body) == plain.body
    small = await api.get(f"{api.maps}?limit=1", Accept_Encoding="gzip")
    assert "Content-Encoding" not in small.headers


async def test_a_version_of_before_the_servers_memory_is_410(api: Api) -> None:
    first = await api.make_map("first")
    for n in range(12):  # 16 MiB of events are kept, with their encoded lines
        await api.make_map(f"m{n}", text="x" * 900_000)
    answer = await api.get(f"{api.maps}?watch=true&resourceVersion={first['metadata']['resourceVersion']}")
    assert (answer.status, answer.json["reason"], answer.json["code"]) == (410, "Expired", 410)
    assert "too old resource version" in answer.json["message"]
