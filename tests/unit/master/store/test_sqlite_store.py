"""What only the SQLite store has: its file, a full disk, history in the background."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor.errors import Conflict, InvalidInput, Unavailable
from hypervisor.master.store.base import Compacted, CorruptStore
from hypervisor.master.store.history import Keep
from hypervisor.master.store.sqlite import SqliteStore


async def fill(store: SqliteStore) -> list[str]:
    """Creates until the store refuses; the keys that it acknowledged."""
    made: list[str] = []
    with pytest.raises(Unavailable, match="full"):
        while True:
            key = f"/r/{len(made)}"
            await store.create(key, os.urandom(20_000))
            made.append(key)
    return made


async def check_full(store: SqliteStore, path: Path) -> None:
    """A full store: nothing changed by what is refused, reads go on, room helps."""
    made = await fill(store)
    revision = await store.revision()
    outcomes = await asyncio.gather(*(store.create(f"/x/{n}", b"y" * 50_000) for n in range(8)), return_exceptions=True)
    assert all(isinstance(o, Unavailable) for o in outcomes)
    assert await store.revision() == revision
    assert [i.key for i in (await store.range("/r/")).items] == sorted(made)
    assert (await store.range("/x/")).items == []


async def test_full_by_page_limit(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db", max_pages=100)
    await check_full(store, tmp_path)
    await store.close()
    store = await SqliteStore.open(tmp_path / "store.db")
    await store.create("/x/0", b"y" * 50_000)
    await store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "small", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.root
async def test_full_disk_and_room_again(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * (1 << 20))
    store = await SqliteStore.open(small_disk / "store.db")
    await check_full(store, small_disk)
    ballast.unlink()
    revision = await store.create("/x/0", b"y" * 50_000)
    assert await store.revision() == revision
    await store.close()
    store = await SqliteStore.open(small_disk / "store.db")
    assert (await store.get("/x/0")).modified == revision  # type: ignore[union-attr]
    await store.close()


async def test_two_masters_on_one_file(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db")
    with pytest.raises(Conflict, match="in use by another master"):
        await SqliteStore.open(tmp_path / "store.db")
    await store.close()
    await (await SqliteStore.open(tmp_path / "store.db")).close()


async def test_the_files_are_for_the_owner_only(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "master" / "store.db")
    await store.create("/r/secret", b"s")
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "master").iterdir()}
    assert modes == {f"store.db{end}": "0o600" for end in ("", "-wal", "-shm", ".lock")}
    assert (tmp_path / "master").stat().st_mode & 0o777 == 0o700
    await store.close()


@pytest.mark.parametrize(
    "content", [b"no database at all, but long enough to be read as one" * 20, b"SQLite format 3\0" + b"\xff" * 5000]
)
async def test_a_file_that_is_no_store_is_refused_unchanged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "store.db").write_bytes(content)
    with pytest.raises(CorruptStore, match="nothing was changed"):
        await SqliteStore.open(tmp_path / "store.db")
    assert (tmp_path / "store.db").read_bytes() == content


async def test_another_programs_or_versions_database(tmp_path: Path) -> None:
    for name, statement in (("a.db", "CREATE TABLE t (x)"), ("b.db", "PRAGMA user_version = 99")):
        connection = sqlite3.connect(tmp_path / name)
        connection.execute(statement)
        connection.close()
    with pytest.raises(CorruptStore, match="another program"):
        await SqliteStore.open(tmp_path / "a.db")
    with pytest.raises(InvalidInput, match="newer"):
        await SqliteStore.open(tmp_path / "b.db")


async def compacted_to(store: SqliteStore, revision: int) -> None:
    async with asyncio.timeout(10):
        while store._compacted < revision:  # noqa: ASYNC110 -- the janitor works by time and tells nobody
            await asyncio.sleep(0.01)


async def test_history_is_compacted_by_count(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db", keep=Keep(age_s=1000, changes=10, check_s=0.01))
    revision = first = await store.create("/r/a", b"0")
    for n in range(100):
        revision = await store.update("/r/a", b"%d" % n, expected=revision)
    await compacted_to(store, revision - 10)
    with pytest.raises(Compacted):
        await store.range("/r/", revision=first)
    assert (await store.range("/r/", revision=revision - 5)).items[0].modified == revision - 5
    await store.close()


async def test_history_is_compacted_by_age(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db", keep=Keep(age_s=0.05, changes=10_000, check_s=0.01))
    revision = await store.create("/r/a", b"0")
    revision = await store.update("/r/a", b"1", expected=revision)
    await compacted_to(store, revision)
    await store.close()


async def test_a_watcher_far_behind_reads_from_the_log(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db")
    store._window._max_changes = 10
    start = await store.revision()
    async with store.watch("/r/", after=start) as changes:
        for n in range(200):
            await store.create(f"/r/{n}", b"")
        assert len(store._window._changes) <= 10
        told = [c.item.key async for batch in _until(changes, 200) for c in batch]
    assert told == [f"/r/{n}" for n in range(200)]
    await store.close()


async def _until(changes, count):  # type: ignore[no-untyped-def]
    while count > 0:
        batch = await anext(changes)
        count -= len(batch)
        yield batch


async def test_a_watcher_that_compaction_passed_is_refused(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db")
    store._window._max_changes = 10
    async with store.watch("/r/", after=await store.revision()) as changes:
        for n in range(100):
            await store.create(f"/r/{n}", b"")
        await store.compact(await store.revision())
        with pytest.raises(Compacted):
            await anext(changes)
    await store.close()
