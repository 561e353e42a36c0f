"""tools/kvm-lane without its guest: what it is made of, and what is said when the guest fails."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "guest-images")]

from lane import everywhere, machine, packages, project, suites  # noqa: E402
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


def test_no_test_for_the_lane_is_forgotten() -> None:
    marked = {p for p in (ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.(kvm|vhost_vsock)\b", p.read_text())}
    listed = {str(path.relative_to(ROOT)) for path in marked if path.name != Path(__file__).name}
    assert listed == set(suites.SHORT)
    named = [word.removeprefix("--deselect=") for word in suites.LONG]
    for name in named:
        path, _, test = name.partition("::")
        assert f"def {test}(" in (ROOT / path).read_text() if test else (ROOT / path).exists(), name


@pytest.mark.parametrize("dilation", [1, 3])
def test_the_guests_clock_is_slower(dilation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_machine_tsc_khz", lambda: 2_000_000)
    root = RootDisk(*(tmp_path / name for name in ("vmlinuz", "initrd", "root")))
    argv = machine._argv(root, tmp_path, tmp_path, machine.Size(2, 512, dilation))
    told = [word for word in argv[argv.index("-append") + 1].split() if word.startswith("tsc_early_khz=")]
    assert told == (["tsc_early_khz=6000000"] if dilation > 1 else [])


def results(path: Path, **outcomes: str) -> str:
    """A JUnit file with a test of each name that needs KVM, and one that needs nothing."""
    needs = '<properties><property name="needs" value="kvm vhost_vsock"/></properties>'
    skips = {"ran": "", "failed": "<failure/>", "skipped": '<skipped message="needs KVM"/>'}
    cases = [f'<testcase classname="t" name="{n}">{needs}{skips[o]}</testcase>' for n, o in outcomes.items()]
    other = '<testcase classname="t" name="other"><skipped message="needs root"/></testcase>'
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}{other}</testsuite></testsuites>")
    return str(path)


def test_what_was_skipped_everywhere_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host = results(tmp_path / "host.xml", a="skipped", b="skipped", c="ran", d="skipped")
    lane = results(tmp_path / "lane.xml", a="ran", b="skipped", d="failed")
    assert everywhere.main([host, lane]) == 1
    told = capsys.readouterr()
    assert told.err == "everywhere: error: t::b was skipped in each of 2 runs: needs KVM\n"
    assert told.out == "everywhere: tests run by what they need: kvm 3, vhost_vsock 3\n"


def test_nothing_was_skipped_everywhere(tmp_path: Path) -> None:
    host = results(tmp_path / "host.xml", a="skipped", b="ran")
    assert everywhere.main([host, results(tmp_path / "lane.xml", a="ran")]) == 0


def test_with_kvm_on_every_machine_those_without_are_excused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(results(tmp_path / "host.xml", a="skipped"))
    path.write_text(path.read_text().replace("kvm vhost_vsock", "tcg"))
    assert everywhere.main([str(path), results(tmp_path / "lane.xml", b="ran")]) == 0
    assert "1 tests about machines without KVM were not run" in capsys.readouterr().out
    assert everywhere.main([str(path), results(tmp_path / "lane.xml", b="skipped")]) == 1


def test_results_that_are_missing_are_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert everywhere.main([results(tmp_path / "host.xml", a="ran"), str(tmp_path / "none.xml")]) == 1
    assert "none.xml" in capsys.readouterr().err


def test_marks_reach_the_results(tmp_path: Path) -> None:
    """As tests/conftest.py puts them there, for a test that is skipped too."""
    (tmp_path / "conftest.py").write_text(
        (ROOT / "tests/conftest.py").read_text() + "\nNEEDS['tcg'] = (lambda: False, 'not here')\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = tcg\n")
    (tmp_path / "test_x.py").write_text("import pytest\n@pytest.mark.tcg\ndef test_x(): pass\n")
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        "-o",
        "junit_family=xunit1",
        "--junit-xml=x",
    ]
    subprocess.run([*argv, "--rootdir", str(tmp_path)], cwd=tmp_path, check=True, capture_output=True)
    assert everywhere.read(tmp_path / "x") == [everywhere.Case("test_x::test_x", frozenset({"tcg"}), "not here")]


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
