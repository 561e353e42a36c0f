"""tools/kvm-lane without its guest: what it is made of, and what is said when the guest fails."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "guest-images")]

from lane import machine, packages, project  # noqa: E402
from lane.rootdisk import RootDisk  # noqa: E402


def test_dependencies_are_setup_cfgs() -> None:
    wanted = project._requirements()
    assert any(line.startswith("aiohttp ") for line in wanted)
    for name in packages.TEST_REQUIREMENTS:
        assert any(line.split()[0] == name for line in wanted), name


def fake_qemu(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def run(folder: Path, timeout_s: float = 20.0) -> int:
    root = RootDisk(folder / "vmlinuz", folder / "initrd", folder / "root")
    return machine.run(root, folder / "project", folder, machine.Size(2, 3072), timeout_s)


def test_status_and_files_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "left.tar", "w") as archive:
        for name, data in {"exit-code": b"3\n", "junit.xml": b"<x/>"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    fake_qemu(tmp_path, f"echo up; dd if={tmp_path}/left.tar of={tmp_path}/disk conv=notrunc status=none", monkeypatch)
    assert run(tmp_path) == 3
    assert (tmp_path / "junit.xml").read_text() == "<x/>"
    assert (tmp_path / "console.log").read_text() == "up\n"
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize(
    ("script", "says"), [("echo kernel panic", "ended without results"), ("exec sleep 60", "did not end within 0.3 s")]
)
def test_a_guest_that_fails_is_no_success(
    script: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_qemu(tmp_path, script, monkeypatch)
    with pytest.raises(SystemExit, match=says):
        run(tmp_path, 0.3)


def test_what_is_compulsory_is_not_skipped(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--co", "--rootdir", str(tmp_path)]
    (tmp_path / "conftest.py").write_text(
        (ROOT / "tests/conftest.py").read_text() + "\nNEEDS['impossible'] = (lambda: False, 'cannot be had')\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = impossible\n")
    (tmp_path / "test_x.py").write_text("import pytest\n@pytest.mark.impossible\ndef test_x(): pass\n")
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    environment = os.environ | {"HV_COMPULSORY": "1"}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 4
    assert "impossible cannot be had" in done.stdout + done.stderr
