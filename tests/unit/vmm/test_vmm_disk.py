"""The data disk: really ext4, sparse or reserved, and nothing left of one that could not be made."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor.errors import HostUnfit, HvError, ResourceExhausted
from hypervisor.vmm import disk
from hypervisor.vmm.capabilities import find_program
from hypervisor.vmm.config import GIB, MIB, DataDisk
from hypervisor.vmm.disk import make_data_disk

MKE2FS = find_program("mke2fs", package="e2fsprogs")


def run(program: str, *args: object) -> str:
    argv = [MKE2FS.with_name(program), *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


async def test_sparse_ext4(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    await make_data_disk(path, DataDisk(size_bytes=GIB), MKE2FS)
    status = path.stat()
    assert status.st_size == GIB
    assert status.st_blocks * 512 < MIB
    assert status.st_mode & 0o777 == 0o600
    said = run("dumpe2fs", "-h", path)
    assert "has_journal" not in said
    assert "Reserved block count:     0" in said
    run("e2fsck", "-fn", path)


@pytest.mark.parametrize("size", [16 * MIB, 100 * MIB + 4096, 64 * GIB])
async def test_sizes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.img"
    await make_data_disk(path, DataDisk(size_bytes=size), MKE2FS)
    assert path.stat().st_size == size


async def test_preallocated(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    await make_data_disk(path, DataDisk(size_bytes=16 * MIB, preallocate=True), MKE2FS)
    assert path.stat().st_blocks * 512 >= 16 * MIB


@pytest.fixture
def small_host(tmp_path: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=140m", "tmpfs", tmp_path], check=True)
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.root
async def test_a_host_without_space_refuses(small_host: Path) -> None:
    path = small_host / "disk.img"
    with pytest.raises(ResourceExhausted, match="free some space"):
        await make_data_disk(path, DataDisk(size_bytes=64 * MIB, preallocate=True), MKE2FS)
    assert not path.exists()
    await make_data_disk(path, DataDisk(size_bytes=64 * MIB), MKE2FS)


@pytest.mark.root
async def test_a_host_that_fills_up_meanwhile(small_host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "RESERVE", -GIB)
    path = small_host / "disk.img"
    with pytest.raises(ResourceExhausted, match="disk is full"):
        await make_data_disk(path, DataDisk(size_bytes=512 * MIB, preallocate=True), MKE2FS)
    assert not path.exists()


async def test_mke2fs_missing(tmp_path: Path) -> None:
    with pytest.raises(HostUnfit, match="e2fsprogs"):
        await make_data_disk(tmp_path / "disk.img", DataDisk(), None)


async def test_mke2fs_fails(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with pytest.raises(HvError, match="could not format"):
        await make_data_disk(path, DataDisk(), Path("/bin/false"))
    assert not path.exists()


async def test_an_existing_disk_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_text("mine")
    with pytest.raises(HvError, match="File exists"):
        await make_data_disk(path, DataDisk(), MKE2FS)
    assert path.read_text() == "mine"


async def test_cancelled_it_leaves_nothing(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 100\n")
    slow.chmod(0o755)
    path = tmp_path / "disk.img"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await make_data_disk(path, DataDisk(), slow)
    assert not path.exists()
