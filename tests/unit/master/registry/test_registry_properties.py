"""List and watch together are the state, whatever is written meanwhile."""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from registry_objects import KINDS, POD, pod

from hypervisor.kube.errors import ApiError
from hypervisor.kube.selectors import LabelSelector, parse_labels
from hypervisor.master.registry.registry import Registry
from hypervisor.master.store.sqlite import SqliteStore

Object = dict[str, Any]
WRITERS = 4
LAST = "zz-last"
SELECTORS = ("", "app=a", "app!=b", "app in (a, b)")


async def write(registry: Registry, rng: random.Random, count: int) -> None:
    """Random creates, updates and deletes of a few names, in competition with others."""
    for _ in range(count):
        name, labels = f"p{rng.randrange(6)}", {"app": rng.choice("abc")}
        try:
            match rng.randrange(3):
                case 0:
                    await registry.create(POD, pod(name, labels=labels), "ns")
                case 1:
                    await registry.update(POD, "ns", name, lambda o, new=labels: relabelled(o, new))
                case _:
                    await registry.delete(POD, "ns", name)
        except ApiError as error:
            assert error.reason in ("NotFound", "AlreadyExists")


def relabelled(obj: Object, labels: dict[str, str]) -> Object:
    obj["metadata"]["labels"] = labels
    return obj


async def follow(registry: Registry, label: LabelSelector, late: int) -> None:
    """Keeps the state by list and watch until the last pod comes; every event must fit the state before it."""
    for _ in range(late):
        await asyncio.sleep(0)
    listing = await registry.list(POD, label=label)
    state = {o["metadata"]["name"]: o for o in listing.items}
    last = listing.revision
    async with registry.watch(POD, label=label, resource_version=listing.resource_version) as watch:
        async for event in watch:
            last = apply(state, event.type, event.object, last)
            if event.object["metadata"]["name"] == LAST:
                break
    assert state == {o["metadata"]["name"]: o for o in (await registry.list(POD, label=label)).items}


def apply(state: dict[str, Object], what: str, obj: Object, last: int) -> int:
    name, revision = obj["metadata"]["name"], int(obj["metadata"]["resourceVersion"])
    assert revision > last, "doubled or out of order"
    assert (name in state) == (what != "ADDED"), f"{what} of {name} does not fit"
    if what == "DELETED":
        del state[name]
    else:
        state[name] = obj
    return revision


async def compete(registry: Registry, rng: random.Random) -> None:
    """Writers and followers side by side."""
    async with asyncio.timeout(30), asyncio.TaskGroup() as followers:
        for _ in range(8):
            followers.create_task(follow(registry, parse_labels(rng.choice(SELECTORS)), rng.randrange(60)))
        async with asyncio.TaskGroup() as writers:
            for _ in range(WRITERS):
                writers.create_task(write(registry, random.Random(rng.random()), 25))
        await registry.create(POD, pod(LAST, labels={"app": "a"}), "ns")


async def scenario(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = await SqliteStore.open(Path(folder) / "store.db")
        registry = await Registry.open(store, KINDS)
        await compete(registry, random.Random(seed))
        await registry.close()
        await store.close()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_list_and_watch_are_the_state(seed: int) -> None:
    asyncio.run(scenario(seed))
