"""`hypervisor.vmm.checks`: every finding on this machine, and the ones that only other machines have."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from hypervisor.vmm import accel, capabilities, cgroup, checks, confine
from hypervisor.vmm.checks import Finding, Program, main_job_possible, run_checks

PACKAGES = Path(__file__).parents[3] / "tools/setup/packages.txt"


async def test_the_whole_table(tmp_path: Path) -> None:
    findings = await run_checks(state_directory=tmp_path / "state")
    names = [finding.name for finding in findings]
    assert len(set(names)) == len(names)
    for wanted in ("QEMU", "KVM", "vsock", "userfaultfd", "tun", "cgroup", "memory", "state directory", "guest image"):
        assert wanted in names
    for finding in findings:
        assert finding.found, finding
        assert "\n" not in finding.found + finding.fix
        assert finding.status == "ok" or finding.fix, finding
        assert json.loads(json.dumps(asdict(finding)))["name"] == finding.name
    assert not (tmp_path / "state").exists(), "looking must change nothing"


async def test_tcg_is_said_to_be_no_boundary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def unusable(*_: object, **__: object) -> accel.KvmProbe:
        return accel.KvmProbe(False, "because")

    monkeypatch.setattr(accel, "probe_kvm", unusable)
    kvm, isolation = await checks.check_accelerator(None, tmp_path)
    assert kvm.found == "unusable: because"
    assert "no security boundary" in isolation.found
    assert main_job_possible([kvm, isolation])


async def test_kvm_that_works_needs_no_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def usable(*_: object, **__: object) -> accel.KvmProbe:
        return accel.KvmProbe(True, "it ran")

    monkeypatch.setattr(accel, "probe_kvm", usable)
    assert [finding.status for finding in await checks.check_accelerator(None, tmp_path)] == ["ok"]


def test_exit_is_decided_by_what_the_main_job_needs() -> None:
    assert main_job_possible([Finding("a", "fail", "x"), Finding("b", "warn", "x", needed_for_main_job=True)])
    assert not main_job_possible([Finding("a", "fail", "x", needed_for_main_job=True)])


def test_a_missing_program_names_its_package() -> None:
    finding = checks.check_program(Program("no-such-program", "some-package", "does things"))
    assert (finding.status, finding.needed_for_main_job) == ("fail", True)
    assert "apt-get install some-package" in finding.fix


def test_programs_are_those_of_the_package_list() -> None:
    rows = [line.split() for line in PACKAGES.read_text().splitlines() if line and not line.startswith("#")]
    assert {program.package for program in checks.PROGRAMS} <= {package for group, package in rows if group == "run"}


async def test_missing_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "QEMU_NAME", "no-such-qemu")
    finding = await checks.check_qemu()
    assert (finding.status, finding.needed_for_main_job) == ("fail", True)


@pytest.mark.parametrize(
    ("version", "devices", "complaint"),
    [
        ("5.2.0", 'name "virtio-blk-pci" "vhost-user-vsock-pci"', "5.2.0"),
        ("7.2.0", 'name "virtio-blk-pci"', "without vhost-user-vsock-pci"),
    ],
)
async def test_unfit_qemu(
    version: str, devices: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = tmp_path / "qemu-fake"
    qemu.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo 'QEMU emulator version {version}';; *) echo '{devices}';; esac\n"
    )
    qemu.chmod(0o755)
    monkeypatch.setattr(capabilities, "QEMU_NAME", "qemu-fake")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    finding = await checks.check_qemu()
    assert finding.status == "fail"
    assert complaint in finding.found


async def test_no_guest_image(tmp_path: Path) -> None:
    findings = {f.name: f for f in await run_checks(state_directory=tmp_path, guest_directory=tmp_path / "none")}
    assert findings["guest image"].status == "fail"
    assert not main_job_possible(list(findings.values()))


async def test_confinement_that_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    for support in (
        confine.ConfinementSupport(False, False, True, "no private root: x"),
        confine.ConfinementSupport(True, True, False, "not root"),
    ):

        async def answer(support: confine.ConfinementSupport = support) -> confine.ConfinementSupport:
            return support

        monkeypatch.setattr(confine, "host_support", answer)
        finding = await checks.check_confinement()
        assert (finding.status, finding.needed_for_main_job) == ("warn", True)


def test_no_cgroups_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "detect", lambda: cgroup.Layout("none", reason="run as root"))
    finding = checks.check_cgroup()
    assert (finding.status, finding.fix) == ("warn", "run as root")


def test_low_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, status in ((100, "fail"), (1000, "warn"), (8000, "ok")):
        monkeypatch.setattr(checks, "_read", lambda _, kib=available * 1024: f"MemTotal: 1 kB\nMemAvailable: {kib} kB")
        assert checks.check_memory().status == status


def test_low_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for limit, status in (("MIN_FREE_DISK", "fail"), ("COMFORTABLE_DISK", "warn")):
        with monkeypatch.context() as patched:
            patched.setattr(checks, limit, 1 << 60)
            assert checks.check_disk(tmp_path / "not/yet/there").status == status
    assert not (tmp_path / "not").exists()


def test_userfaultfd_speaks_of_the_setting() -> None:
    assert (
        "vm.unprivileged_userfaultfd" in checks.check_userfaultfd().found
        or "not usable" in checks.check_userfaultfd().found
    )


def test_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    finding = checks.check_user()
    assert finding.status == "warn"
    assert "no user of its own per VM" in finding.found
