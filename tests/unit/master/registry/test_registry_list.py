"""Lists: order, pages, revisions, selectors."""

from __future__ import annotations

import json

import pytest
from registry_objects import KINDS, MAP, POD, pod

from hypervisor.kube.errors import ApiError
from hypervisor.kube.selectors import parse_fields, parse_labels
from hypervisor.master.registry.listing import Listing
from hypervisor.master.registry.registry import Registry
from hypervisor.master.store.sqlite import SqliteStore


def names(listing: Listing) -> list[str]:
    return [entry.key for entry in listing.entries]


@pytest.fixture
async def ten(registry: Registry) -> Registry:
    for n in range(10):
        await registry.create(POD, pod(f"p{n}", labels={"odd": str(n % 2)}), "ns" if n < 7 else "ns-2")
    return registry


async def test_order_and_namespaces(ten: Registry) -> None:
    assert names(await ten.list(POD)) == [f"ns-2/p{n}" for n in range(7, 10)] + [f"ns/p{n}" for n in range(7)]
    assert names(await ten.list(POD, "ns-2")) == ["ns-2/p7", "ns-2/p8", "ns-2/p9"]
    assert names(await ten.list(POD, "n")) == [] and names(await ten.list(MAP)) == []


async def test_encoded_list_is_what_its_items_are(ten: Registry) -> None:
    listing = await ten.list(POD, limit=4)
    whole = json.loads(listing.encode(POD))
    assert whole["items"] == listing.items and whole["kind"] == "PodList" and whole["apiVersion"] == "v1"
    assert whole["metadata"]["remainingItemCount"] == 6 and whole["metadata"]["continue"] == listing.continuation
    assert whole["metadata"]["resourceVersion"] == listing.resource_version == str(ten.revision)
    assert json.loads((await ten.list(MAP)).encode(MAP))["items"] == []


@pytest.mark.parametrize("selected", [False, True])
async def test_pages_are_of_one_revision_whatever_happens_meanwhile(ten: Registry, selected: bool) -> None:
    label = parse_labels("odd=1") if selected else None
    before = names(await ten.list(POD, label=label))
    page = await ten.list(POD, label=label, limit=2)
    seen, version = names(page), page.resource_version
    n = 0
    while page.continuation:
        await ten.delete(POD, *before[-1 - n].split("/"))
        await ten.create(POD, pod(f"p5{n}", labels={"odd": "1"}), "ns")
        page = await ten.list(POD, label=label, limit=2, continuation=page.continuation)
        assert page.resource_version == version
        assert (page.remaining is None) == (selected or not page.continuation)
        seen += names(page)
        n += 1
    assert seen == before


async def test_a_quiet_kind_is_paged_from_memory(ten: Registry, store: SqliteStore) -> None:
    page = await ten.list(POD, limit=6)
    await ten.create(MAP, {"metadata": {"name": "m"}}, "ns")
    await store.compact(await store.revision())
    rest = await ten.list(POD, limit=6, continuation=page.continuation)
    assert len(rest.entries) == 4 and rest.resource_version == page.resource_version and not rest.continuation


async def test_an_expired_token_brings_one_that_goes_on(ten: Registry, store: SqliteStore) -> None:
    page = await ten.list(POD, limit=4)
    await ten.delete(POD, "ns", "p6")
    await store.compact(await store.revision())
    with pytest.raises(ApiError) as error:
        await ten.list(POD, limit=4, continuation=page.continuation)
    status = error.value.status()
    assert status["code"] == 410 and status["reason"] == "Expired"
    rest = await ten.list(POD, continuation=status["metadata"]["continue"])
    assert names(page) + names(rest) == names(await ten.list(POD))


async def test_versions(ten: Registry) -> None:
    old = await ten.list(POD)
    await ten.delete(POD, "ns", "p0")
    assert len((await ten.list(POD, resource_version="0")).entries) in (9, 10)
    assert len((await ten.list(POD, resource_version=old.resource_version, match="NotOlderThan")).entries) == 9
    exact = await ten.list(POD, resource_version=old.resource_version, match="Exact")
    assert names(exact) == names(old) and exact.items == old.items
    assert exact.resource_version == old.resource_version
    legacy = await ten.list(POD, resource_version=old.resource_version, limit=3)
    assert legacy.resource_version == old.resource_version


@pytest.mark.parametrize(
    "query",
    [
        {"limit": -1},
        {"continuation": "nonsense"},
        {"continuation": "eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6MX0"},
        {"resource_version": "abc"},
        {"resource_version": "-1"},
        {"match": "Exact"},
        {"match": "Exact", "resource_version": "0"},
        {"match": "Sometimes", "resource_version": "5"},
    ],
)
async def test_refused_parameters(ten: Registry, query: dict[str, str]) -> None:
    with pytest.raises(ApiError) as error:
        await ten.list(POD, **query)  # type: ignore[arg-type]
    assert error.value.code in (400, 422)


async def test_selectors(ten: Registry) -> None:
    assert len((await ten.list(POD, label=parse_labels("odd=1"))).entries) == 5
    assert names(await ten.list(POD, "ns", field=parse_fields("metadata.name=p3"))) == ["ns/p3"]
    with pytest.raises(ApiError, match="field label not supported"):
        await ten.list(POD, field=parse_fields("spec.hostname=x"))


async def test_objects_are_there_after_a_restart(ten: Registry, store: SqliteStore) -> None:
    before = await ten.list(POD)
    again = await Registry.open(store, KINDS)
    after = await again.list(POD)
    assert after.items == before.items and after.resource_version == before.resource_version
    await again.close()


async def test_what_an_older_version_wrote_is_read(registry: Registry, store: SqliteStore) -> None:
    """Whatever the order of its fields."""
    await store.create("/registry/core/pods/ns/a", b'{"metadata":{"resourceVersion":"3","name":"a"},"kind":"Pod"}')
    entry = await registry.entry(POD, "ns", "a")
    assert json.loads(entry.body) == entry.obj
    assert entry.obj["apiVersion"] == "v1" and entry.obj["metadata"]["resourceVersion"] == str(entry.revision)


async def test_what_is_no_object_costs_only_itself(registry: Registry, store: SqliteStore) -> None:
    await store.create("/registry/core/pods/ns/bad", b"garbage")
    await store.create("/registry/core/pods/ns/worse", b"[1]")
    await registry.create(POD, pod("a"), "ns")
    again = await Registry.open(store, KINDS)
    assert names(await registry.list(POD)) == names(await again.list(POD)) == ["ns/a"]
    await again.close()
