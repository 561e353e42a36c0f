"""`hypervisor.vmm.accel`: the probe on this machine, its time limits, and its memory.

Where a second stage that hangs, ends or succeeds is needed, a script stands in for QEMU: this machine's KVM does one of
these only. The real second stage runs in tests/integration/test_confinement.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from hypervisor.vmm import accel
from hypervisor.vmm.accel import KvmProbe, probe_kvm

QEMU = Path("/usr/bin/qemu-system-x86_64")


def script(directory: Path, text: str) -> Path:
    path = directory / "qemu"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def first_stage_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def passes() -> KvmProbe:
        return KvmProbe(True, "a guest ran to user mode and back")

    monkeypatch.setattr(accel, "_run_first_stage", passes)
    monkeypatch.setattr(accel, "_missing_device", lambda: "")


def children() -> list[str]:
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [Path(f"/proc/{pid}/comm").read_text() for pid in pids]


def kernel(directory: Path) -> Path:
    path = directory / "vmlinuz"
    path.write_bytes(b"kernel")
    return path


async def test_the_probe_answers_here_within_its_time_limits() -> None:
    began = time.monotonic()
    probe = await probe_kvm(qemu=QEMU, kernel=None, cache_directory=None)
    assert time.monotonic() - began < 10
    assert probe.reason
    assert "\n" not in probe.reason


async def test_the_probe_is_no_without_virtualization_hardware() -> None:
    """However willingly /dev/kvm opens."""
    hint = accel._hardware_hint()
    if not hint:
        pytest.skip("this CPU shows vmx or svm")
    assert not (await probe_kvm(qemu=QEMU, kernel=None, cache_directory=None)).usable


async def test_no_process_of_the_probe_is_left() -> None:
    await probe_kvm(qemu=QEMU, kernel=None, cache_directory=None)
    assert not any("kvm-probe" in name for name in children())


async def test_a_guest_that_reaches_user_mode(first_stage_passes: None, tmp_path: Path) -> None:
    works = script(tmp_path, f"echo early; echo '{accel.MARKER.decode()}'; sleep 1000")
    probe = await probe_kvm(qemu=works, kernel=kernel(tmp_path), cache_directory=None)
    assert probe.usable


async def test_a_qemu_that_ends_is_quoted(first_stage_passes: None, tmp_path: Path) -> None:
    fails = script(tmp_path, "echo 'failed to set MSR 0x10a to 0x69' >&2; exit 1")
    probe = await probe_kvm(qemu=fails, kernel=kernel(tmp_path), cache_directory=None)
    assert not probe.usable
    assert probe.reason.endswith("before the guest reached user mode: failed to set MSR 0x10a to 0x69")


async def test_without_a_guest_kernel_the_answer_is_not_final(first_stage_passes: None, tmp_path: Path) -> None:
    probe = await probe_kvm(qemu=QEMU, kernel=None, cache_directory=tmp_path)
    assert probe.usable
    assert "not yet tried with the guest kernel" in probe.reason
    assert not (tmp_path / accel.CACHE_NAME).exists()


async def test_a_guest_that_hangs_is_ended_at_the_limit(first_stage_passes: None, tmp_path: Path) -> None:
    hangs = script(tmp_path, f"echo $$ > {tmp_path}/pid; echo last words; sleep 1000 & wait")
    probe = await probe_kvm(qemu=hangs, kernel=kernel(tmp_path), cache_directory=None, boot_timeout=0.5)
    assert not probe.usable
    assert probe.reason.endswith("did not reach user mode under KVM within 0.5 s: last words")
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_cancelling_ends_the_probe(first_stage_passes: None, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "started")
    hangs = script(tmp_path, f"echo $$ > {tmp_path}/started; exec sleep 1000")
    task = asyncio.create_task(probe_kvm(qemu=hangs, kernel=kernel(tmp_path), cache_directory=None))
    pid = int(await asyncio.to_thread((tmp_path / "started").read_text))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_the_answer_is_kept_while_nothing_changes(first_stage_passes: None, tmp_path: Path) -> None:
    counter = tmp_path / "runs"
    qemu = script(tmp_path, f"echo run >> {counter}; echo '{accel.MARKER.decode()}'")
    cache = tmp_path / "cache"
    for _ in range(2):
        probe = await probe_kvm(qemu=qemu, kernel=kernel(tmp_path), cache_directory=cache)
        os.utime(tmp_path / "vmlinuz", ns=(1, 1))
        assert probe.usable
    runs_before = len(counter.read_text().split())
    await probe_kvm(qemu=qemu, kernel=tmp_path / "vmlinuz", cache_directory=cache)
    assert len(counter.read_text().split()) == runs_before + 1  # the kernel's file has changed since
    await probe_kvm(qemu=qemu, kernel=tmp_path / "vmlinuz", cache_directory=cache)
    assert len(counter.read_text().split()) == runs_before + 1
    await probe_kvm(qemu=qemu, kernel=tmp_path / "vmlinuz", cache_directory=cache, fresh=True)
    assert len(counter.read_text().split()) == runs_before + 2
    assert [path.name for path in cache.iterdir()] == [accel.CACHE_NAME]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 99}', '{"version": 1, "key": {}, "usable": "yes"}'])
async def test_a_broken_cache_is_as_good_as_none(first_stage_passes: None, tmp_path: Path, content: str) -> None:
    (tmp_path / accel.CACHE_NAME).write_text(content)
    qemu = script(tmp_path, f"echo '{accel.MARKER.decode()}'")
    assert (await probe_kvm(qemu=qemu, kernel=kernel(tmp_path), cache_directory=tmp_path)).usable
    assert json.loads((tmp_path / accel.CACHE_NAME).read_text())["usable"] is True


async def test_what_may_change_without_a_reboot_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "KVM_DEVICE", tmp_path / "kvm")
    probe = await probe_kvm(qemu=QEMU, kernel=None, cache_directory=tmp_path)
    assert not probe.usable
    assert "does not exist" in probe.reason
    assert not (tmp_path / accel.CACHE_NAME).exists()


async def test_missing_parts_say_how_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "_missing_device", lambda: "")
    monkeypatch.setattr(accel, "LIBEXEC", tmp_path)
    probe = await probe_kvm(qemu=QEMU, kernel=None, cache_directory=None)
    assert "make native" in probe.reason


@pytest.mark.parametrize("output", [b"", b"{}", b"not json", b'{"usable": true}'])
def test_an_answer_that_is_none(output: bytes) -> None:
    probe = accel._parse_first_stage(output)
    assert not probe.usable
    assert not probe.final
