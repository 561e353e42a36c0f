"""Backup of a store in use, and the way back."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound
from hypervisor.master.store.backup import backup, restore, verify
from hypervisor.master.store.base import CorruptStore
from hypervisor.master.store.sqlite import SqliteStore


async def filled(path: Path, count: int, value: bytes = b"x" * 500) -> SqliteStore:
    store = await SqliteStore.open(path)
    await asyncio.gather(*(store.create(f"/r/{n}", value) for n in range(count)))
    return store


def contents(folder: Path, prefix: str = "store.db") -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name.startswith(prefix)}


async def keys(path: Path) -> set[str]:
    store = await SqliteStore.open(path)
    found = {item.key for item in (await store.range("/r/")).items}
    await store.close()
    return found


async def test_backup_under_writes_holds_all_that_was_acknowledged_before(tmp_path: Path) -> None:
    store = await filled(tmp_path / "store.db", 300)
    stream = asyncio.create_task(asyncio.wait([asyncio.create_task(store.create(f"/s/{n}", b"")) for n in range(300)]))
    taken = await asyncio.to_thread(backup, tmp_path / "store.db", tmp_path / "out" / "b1")
    await stream
    await store.close()
    assert taken.keys >= 300 and taken.revision >= 301
    assert (tmp_path / "out" / "b1").stat().st_mode & 0o777 == 0o600
    assert verify(tmp_path / "out" / "b1") == taken
    command = ["sha256sum", "-c", "b1.sha256"]
    await asyncio.to_thread(subprocess.run, command, cwd=tmp_path / "out", check=True, capture_output=True)
    assert restore(tmp_path / "out" / "b1", tmp_path / "new" / "store.db") is None
    assert await keys(tmp_path / "new" / "store.db") == {f"/r/{n}" for n in range(300)}


async def test_restore_keeps_what_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = await filled(path, 3)
    backup(path, tmp_path / "b1")
    await store.create("/r/later", b"")
    await store.close()
    kept = restore(tmp_path / "b1", path)
    assert kept is not None
    assert await keys(path) == {"/r/0", "/r/1", "/r/2"}
    assert "/r/later" in await keys(kept)


async def test_a_damaged_store_is_refused_and_can_be_brought_back(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = await filled(path, 500)
    backup(path, tmp_path / "b1")
    await store.close()
    raw = bytearray(path.read_bytes())
    raw[4096 * 3 : 4096 * 6] = b"\xff" * (4096 * 3)
    path.write_bytes(raw)
    with pytest.raises(CorruptStore, match="hv cluster restore"):
        await SqliteStore.open(path)
    assert path.read_bytes() == raw, "nothing was written to it"
    kept = restore(tmp_path / "b1", path)
    assert kept is not None and kept.read_bytes() == raw
    assert len(await keys(path)) == 500


@pytest.mark.parametrize("damage", ["flip", "cut", "no sum", "other", "missing"])
async def test_a_bad_backup_is_refused_and_nothing_changed(tmp_path: Path, damage: str) -> None:
    path, bad = tmp_path / "store.db", tmp_path / "b1"
    await (await filled(path, 100)).close()
    backup(path, bad)
    raw = bytearray(bad.read_bytes())
    match damage:
        case "flip":
            raw[-10] ^= 1
            bad.write_bytes(raw)
        case "cut":
            bad.write_bytes(raw[: len(raw) // 2])
        case "no sum":
            (tmp_path / "b1.sha256").unlink()
        case "other":
            bad.write_text("no database")
        case "missing":
            bad.unlink()
    before = contents(tmp_path)
    with pytest.raises((InvalidInput, NotFound)):
        restore(bad, path)
    assert contents(tmp_path) == before


async def test_restore_under_a_running_master_is_refused(tmp_path: Path) -> None:
    store = await filled(tmp_path / "store.db", 1)
    backup(tmp_path / "store.db", tmp_path / "b1")
    with pytest.raises(Conflict, match="stop the master"):
        restore(tmp_path / "b1", tmp_path / "store.db")
    await store.create("/r/more", b"")
    await store.close()


async def test_backup_overwrites_nothing(tmp_path: Path) -> None:
    await (await filled(tmp_path / "store.db", 1)).close()
    (tmp_path / "b1").write_text("mine")
    with pytest.raises(InvalidInput, match="exists already"):
        backup(tmp_path / "store.db", tmp_path / "b1")
    with pytest.raises(NotFound):
        backup(tmp_path / "none.db", tmp_path / "b2")
    assert (tmp_path / "b1").read_text() == "mine"


async def test_backup_of_a_damaged_store_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await (await filled(path, 500)).close()
    raw = bytearray(path.read_bytes())
    raw[4096 * 3 : 4096 * 6] = b"\xff" * (4096 * 3)
    path.write_bytes(raw)
    with pytest.raises(HvError):
        backup(path, tmp_path / "b1")
    assert set(contents(tmp_path, "")) == {"store.db", "store.db.lock"}
