"""A store against a model: a dictionary for every revision."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.master.store.base import Compacted, Item, KeyExists, StaleRevision, Store
from hypervisor.master.store.sqlite import SqliteStore

KEYS = ("/r/a", "/r/a/b", "/r/b", "/r/c", "/s/a")
STEP = st.tuples(
    st.sampled_from(("create", "update", "delete", "compact", "reopen")), st.sampled_from(KEYS), st.booleans()
)


@dataclass
class Model:
    """What there was at each revision."""

    states: dict[int, dict[str, Item]] = field(default_factory=lambda: {1: {}})
    oldest: int = 0

    @property
    def newest(self) -> int:
        return max(self.states)

    @property
    def now(self) -> dict[str, Item]:
        return self.states[self.newest]

    def write(self, revision: int, key: str, value: bytes | None) -> None:
        assert revision == self.newest + 1
        state = dict(self.now)
        old = state.pop(key, None)
        if value is not None:
            state[key] = Item(key, value, old.created if old else revision, revision)
        self.states[revision] = state


async def step(store: Store, model: Model, what: str, key: str, right: bool) -> None:
    """One call on the store, with the outcome that the model says."""
    there = model.now.get(key)
    expected = (there.modified if there else 0) if right else 12345
    value = b"%d" % model.newest
    try:
        match what:
            case "create":
                model.write(await store.create(key, value), key, value)
                assert there is None
            case "update":
                model.write(await store.update(key, value, expected=expected), key, value)
                assert there is not None and right
            case "delete":
                model.write(await store.delete(key, expected=expected), key, None)
                assert there is not None and right
            case "compact":
                model.oldest = model.newest - 2 if model.newest - 2 > model.oldest else model.oldest
                await store.compact(model.oldest)
    except KeyExists:
        assert there is not None
    except StaleRevision as stale:
        assert there is None or not right
        assert stale.current == (there.modified if there else 0)


async def compare(store: Store, model: Model) -> None:
    """Every range at every revision, and the watch from every revision."""
    for revision, state in model.states.items():
        wanted = [state[key] for key in sorted(state) if key.startswith("/r/")]
        if revision < model.oldest:
            with_error = await asyncio.gather(store.range("/r/", revision=revision), return_exceptions=True)
            assert isinstance(with_error[0], Compacted)
            continue
        assert (await store.range("/r/", revision=revision)).items == wanted
        page = await store.range("/r/", revision=revision, limit=2, after="/r/a")
        assert [*page.items] == [i for i in wanted if i.key > "/r/a"][:2]
        assert page.more == max(0, len([i for i in wanted if i.key > "/r/a"]) - 2)
        await replay(store, model, revision)
    for key in KEYS:
        assert await store.get(key) == model.now.get(key)


async def replay(store: Store, model: Model, after: int) -> None:
    """The changes since `after` lead from the state then to the state now."""
    state = dict(model.states[after])
    steps = model.newest - after
    if not steps:
        return
    async with asyncio.timeout(10), store.watch("/", after=after) as batches:
        while steps:
            for change in await anext(batches):
                steps -= 1
                old = state.pop(change.item.key, None)
                assert change.previous == (old.value if old else None)
                if change.type != "delete":
                    state[change.item.key] = change.item
                assert state == model.states[change.item.modified]


async def scenario(steps: list[tuple[str, str, bool]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Model()
        store = await SqliteStore.open(Path(folder) / "store.db")
        for what, key, right in steps:
            if what == "reopen":
                await store.close()
                store = await SqliteStore.open(Path(folder) / "store.db")
            else:
                await step(store, model, what, key, right)
        await compare(store, model)
        await store.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, max_size=30))
def test_store_is_its_model(steps: list[tuple[str, str, bool]]) -> None:
    asyncio.run(scenario(steps))
