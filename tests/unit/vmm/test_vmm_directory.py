"""A VM's state folder: atomic records, private modes, clear errors."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor.errors import Conflict, HvError, InvalidInput, ResourceExhausted
from hypervisor.vmm.directory import MAX_PATH, Processes, VmDirectory, boot_id, write_atomically
from hypervisor.vmx.process import ProcessId


@pytest.fixture
def files(short_path: Path) -> VmDirectory:
    made = VmDirectory(short_path / "vm")
    made.create(uid=None)
    return made


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_nobody_else_may_enter(files: VmDirectory) -> None:
    os.close(files.open_log(files.console_log))
    files.listen(files.qmp_socket).close()
    write_atomically(files.config, "{}")
    assert mode(files.path) == mode(files.vmx) == 0o700
    assert {mode(f) for f in (files.console_log, files.qmp_socket, files.config)} == {0o600}


@pytest.mark.root
def test_only_vmx_belongs_to_the_vms_user(short_path: Path) -> None:
    made = VmDirectory(short_path / "vm")
    made.create(uid=0x70000000)
    assert made.vmx.stat().st_uid == 0x70000000
    assert made.path.stat().st_uid == 0


def test_an_existing_directory_is_somebody_elses(files: VmDirectory) -> None:
    with pytest.raises(Conflict, match="exists"):
        VmDirectory(files.path).create(uid=None)


def test_a_parent_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(HvError, match="No such file"):
        VmDirectory(tmp_path / "a/b").create(uid=None)


def test_a_log_that_is_there_is_not_taken_over(files: VmDirectory) -> None:
    files.console_log.symlink_to("/etc/passwd")
    with pytest.raises(HvError, match="File exists"):
        files.open_log(files.console_log)


def test_every_socket_fits_at_the_longest_path() -> None:
    longest = VmDirectory(Path("/" + "x" * (MAX_PATH - 1)))
    longest.check_path()
    assert len(f"{longest.vsock_socket}_4294967295") <= 107
    with pytest.raises(InvalidInput, match="too long"):
        VmDirectory(Path(f"{longest.path}x")).check_path()


def test_processes_round_trip(files: VmDirectory) -> None:
    assert files.read_processes() == Processes(boot_id())
    record = Processes(boot_id(), vmx=ProcessId(5, 6), qemu=ProcessId(7, 8))
    files.write_processes(record)
    assert files.read_processes() == record
    assert [p.name for p in files.path.iterdir() if p.name.startswith(".")] == []


def test_records_of_another_boot_mean_nothing(files: VmDirectory) -> None:
    files.write_processes(Processes("another", qemu=ProcessId(1, 2)))
    assert files.read_processes() == Processes(boot_id())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"boot":1}', '{"boot":"x","vmx":{"pid":"1"}}'])
def test_broken_records_mean_nothing(files: VmDirectory, text: str) -> None:
    files.processes.write_text(text)
    assert files.read_processes() == Processes(boot_id())


def test_remove_is_repeatable(files: VmDirectory) -> None:
    files.remove()
    files.remove()
    assert not files.path.exists()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system without a free block."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True)
    try:
        (tmp_path / "vm").mkdir()
        (tmp_path / "ballast").write_bytes(b"x" * (60 * 1024))
        yield tmp_path / "vm"
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.root
def test_a_full_disk_keeps_the_old_record(full_disk: Path) -> None:
    path = full_disk / "config.json"
    write_atomically(path, "old")
    with pytest.raises(ResourceExhausted, match="disk is full"):
        write_atomically(path, "new" * 10_000)
    assert path.read_text() == "old"
    assert [entry.name for entry in full_disk.iterdir()] == ["config.json"]
