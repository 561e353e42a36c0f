"""Formatted disks that data disks are clones of: made once, believed only when they are what was made."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from hypervisor.errors import HostUnfit, NotFound
from hypervisor.vmm.bases import KEEP, DiskBases, checksum, link_base
from hypervisor.vmm.config import MIB, DataDisk

MKE2FS = shutil.which("mke2fs")
needs_mke2fs = pytest.mark.skipif(MKE2FS is None, reason="needs mke2fs (package e2fsprogs)")
DISK = DataDisk(size_bytes=64 * MIB)


def bases(folder: Path) -> DiskBases:
    return DiskBases(folder / "bases", Path(MKE2FS or "/none"))


@needs_mke2fs
async def test_one_is_made_for_each_kind_and_kept(tmp_path: Path) -> None:
    store = bases(tmp_path)
    first, again = await asyncio.gather(store.get(DISK), store.get(DISK))
    assert first == again and first.stat().st_size == DISK.size_bytes
    assert first.read_bytes()[1080:1082] == b"\x53\xef"  # ext4's magic
    made = first.stat().st_ino
    assert (await bases(tmp_path).get(DISK)).stat().st_ino == made  # another daemon takes it as it is
    assert await store.get(DataDisk(size_bytes=64 * MIB, quotas=True)) != first
    assert await store.get(DataDisk(size_bytes=80 * MIB)) != first
    assert not list((tmp_path / "bases").glob("*.half"))


@needs_mke2fs
async def test_a_damaged_one_is_made_anew_and_old_links_stay(tmp_path: Path) -> None:
    path = await bases(tmp_path).get(DISK)
    sound = checksum(path)
    link_base(path, tmp_path / "linked")
    path.rename(tmp_path / "moved")
    shutil.copy(tmp_path / "moved", path)
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"flipped")
    assert await bases(tmp_path).get(DISK) == path
    assert b"flipped" not in path.read_bytes()
    assert checksum(tmp_path / "linked") == sound


@needs_mke2fs
async def test_what_a_killed_builder_left_is_no_base(tmp_path: Path) -> None:
    path = await bases(tmp_path).get(DISK)
    path.with_suffix(".half").write_bytes(b"half")
    path.unlink()
    assert checksum(await bases(tmp_path).get(DISK))
    assert not path.with_suffix(".half").exists()


@needs_mke2fs
async def test_few_are_kept(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    for i in range(KEEP + 3):
        (tmp_path / f"bases/ext4-1m-{i:012}.img").touch()
    path = await bases(tmp_path).get(DISK)
    assert path.exists() and len(list((tmp_path / "bases").glob("*.img"))) == KEEP


async def test_a_host_without_mke2fs_says_so(tmp_path: Path) -> None:
    with pytest.raises(HostUnfit, match="e2fsprogs"):
        await DiskBases(tmp_path / "bases", None).get(DISK)
    assert [path.name for path in (tmp_path / "bases").iterdir()] == [".lock"]


def test_a_base_that_has_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="has gone"):
        link_base(tmp_path / "none", tmp_path / "link")
