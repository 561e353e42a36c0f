"""What a host can give, found out with real and with stand-in programs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hypervisor.errors import HostUnfit
from hypervisor.vmm import capabilities as module
from hypervisor.vmm.capabilities import MIN_QEMU, HostCapabilities, find_program, probe, qemu_version


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


async def test_this_host(tmp_path: Path) -> None:
    found = await probe(tmp_path, guest_kernel=None, accelerator="tcg")
    assert found.qemu_version >= MIN_QEMU
    assert found.choose_accelerator("auto") == "tcg"
    assert found.mke2fs is not None
    assert (await probe(tmp_path, guest_kernel=None, accelerator="tcg", vsock="kernel")).vsock == "kernel"


def test_accelerators(capabilities: HostCapabilities) -> None:
    assert capabilities.choose_accelerator("auto") == capabilities.choose_accelerator("tcg") == "tcg"
    with pytest.raises(HostUnfit, match="no /dev/kvm; use accelerator auto or tcg"):
        capabilities.choose_accelerator("kvm")
    with_kvm = replace(capabilities, kvm_unusable=None)
    assert [with_kvm.choose_accelerator(wish) for wish in ("auto", "kvm", "tcg")] == ["kvm", "kvm", "tcg"]


def test_a_missing_program_names_its_package() -> None:
    with pytest.raises(HostUnfit, match="install the package e2fsprogs"):
        find_program("no-such-program", package="e2fsprogs")


async def test_an_old_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = program(tmp_path / module.QEMU_NAME, "echo QEMU emulator version 5.2.0")
    monkeypatch.setattr(module, "_which", lambda name: old)
    with pytest.raises(HostUnfit, match=r"5\.2\.0; install 7\.2 or later"):
        await probe(tmp_path, guest_kernel=None, accelerator="tcg")


@pytest.mark.parametrize(("script", "says"), [("echo hello", "names no version"), ("exit 1", "names no version")])
async def test_a_qemu_that_is_none(tmp_path: Path, script: str, says: str) -> None:
    with pytest.raises(HostUnfit, match=says):
        await qemu_version(program(tmp_path / "qemu", script))


async def test_a_qemu_that_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(HostUnfit, match="does not run"):
        await qemu_version(tmp_path / "none")
