"""Pods whose disks are served by vmx with chains of filters: what the annotation says is what the guest meets."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import HV, wait_for
from test_hostd import Daemon, daemon, pod_manifest, state_of

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

__all__ = ["daemon"]


def create(daemon: Daemon, name: str, filters: str, script: str = "while :; do sleep 0.1; done") -> Any:
    manifest = pod_manifest(name, script, policy="Never")
    manifest["metadata"]["annotations"] = {"hv.io/filters": filters}
    return daemon.call("POST", "/hv/v1/pods", manifest)


def run(daemon: Daemon, *words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HV_STATE_DIR": str(daemon.state)}
    return subprocess.run(
        words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
    )


def hv(daemon: Daemon, *words: str, code: int | None = 0) -> str:
    done = run(daemon, HV, *words)
    assert code is None or done.returncode == code, f"hv {words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def disk_stats(daemon: Daemon, pod: str, serial: str = "hv-data") -> dict[str, Any]:
    top = daemon.call("GET", "/hv/v1/top")
    found = next(p["vm"]["vmx"].get("disks", {}) for p in top["pods"] if p["name"] == pod)
    return dict(found.get(serial, {"filters": []}))


def filters_of(stats: dict[str, Any]) -> dict[str, dict[str, int]]:
    return {f["name"]: f["figures"] for f in stats["filters"]}


def wait_running(daemon: Daemon, name: str) -> None:
    """The first such pod of a daemon has its template made: a guest boots."""
    daemon.wait(name, lambda p: "running" in state_of(p), "runs", 180)


@pytest.fixture
def pods(daemon: Daemon) -> Iterator[list[str]]:
    """Names of pods to remove at the end."""
    names: list[str] = []
    yield names
    for name in names:
        daemon.remove(name)


WRITE = "dd if=/dev/urandom of=/f bs=4k count=64 2>/dev/null && sync /f && md5sum < /f"
READ = "dd if=/f iflag=direct bs=4k 2>/dev/null | md5sum"  # from the disk


def test_a_chain_before_the_scratch_disk_counts_checks_and_outlives_its_vmx(daemon: Daemon, pods: list[str]) -> None:
    create(daemon, "chained", "scratch: stats | throttle,iops=2000 | integrity; image: stats")
    pods.append("chained")
    wait_running(daemon, "chained")
    before = hv(daemon, "exec", "chained", "--", "sh", "-c", WRITE)
    stats = disk_stats(daemon, "chained")
    assert [f["kind"] for f in stats["filters"]] == ["stats", "throttle", "linkedclone", "integrity"]
    assert stats["redirects_out"] > 0 and stats["base"]["reads"] > 0  # the file system is its base's
    assert filters_of(stats)["stats"]["write_requests"] > 0
    vmx = daemon.pid_of("chained", "vmx")
    os.kill(vmx, signal.SIGKILL)
    wait_for(lambda: daemon.pid_of("chained", "vmx") != vmx, "vmx is replaced")
    # a session that is opened while the guest's vsock device is being exchanged may wait for long
    read = ("timeout", "30", HV, "exec", "chained", "--", "sh", "-c", READ)
    wait_for(lambda: run(daemon, *read).stdout == before, "the file is the same", 150)
    after = filters_of(disk_stats(daemon, "chained"))
    assert after["integrity"]["bad_blocks"] == 0
    hv(daemon, "exec", "chained", "--", "sh", "-c", WRITE)


def test_an_injected_error_is_seen_by_the_guest(daemon: Daemon, pods: list[str]) -> None:
    create(daemon, "failing", "scratch: error,types=write,skip=200")
    pods.append("failing")
    wait_running(daemon, "failing")
    said = hv(
        daemon, "exec", "failing", "--", "sh", "-c",
        "dd if=/dev/zero of=/big oflag=direct bs=4k count=600 2>&1 || echo failed", code=None,
    )  # fmt: skip
    assert "Input/output error" in said or "Read-only file system" in said, said
    assert filters_of(disk_stats(daemon, "failing"))["error"]["failed"] > 0


def test_a_chain_is_changed_while_the_pod_runs(daemon: Daemon, pods: list[str]) -> None:
    create(daemon, "changed", "")
    pods.append("changed")
    wait_running(daemon, "changed")
    assert "requests waited" in hv(daemon, "disk", "filter", "add", "changed/scratch", "error", "types=write")
    written = "dd if=/dev/zero of=/f oflag=direct bs=4k count=1 2>&1 || true"
    assert "Input/output error" in hv(daemon, "exec", "changed", "--", "sh", "-c", written)
    hv(daemon, "disk", "filter", "set", "changed/scratch", "error", "types=discard")
    assert "1+0 records out" in hv(daemon, "exec", "changed", "--", "sh", "-c", written)
    vmx = daemon.pid_of("changed", "vmx")
    os.kill(vmx, signal.SIGKILL)
    wait_for(lambda: daemon.pid_of("changed", "vmx") != vmx, "vmx is replaced")
    wait_for(lambda: "error" in filters_of(disk_stats(daemon, "changed")), "its successor has the chain as it was")
    hv(daemon, "disk", "filter", "rm", "changed/scratch", "error")
    assert list(filters_of(disk_stats(daemon, "changed"))) == ["linkedclone"]
    said = hv(daemon, "disk", "filter", "rm", "changed/scratch", "linkedclone", code=1)
    assert "would give wrong data" in said


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        ("nothing", "'nothing' is no filter for a pod's disk"),
        ("integrity | throttle,iops=3", "throttle (inspection) cannot come after integrity (encryption)"),
        ("throttle,iops=fast", "a whole number is wanted"),
    ],
)
def test_a_chain_that_makes_no_sense_is_refused_and_nothing_is_started(daemon: Daemon, filters: str, says: str) -> None:
    answer = create(daemon, "refused", f"scratch: {filters}")
    assert answer["kind"] == "Status" and answer["reason"] == "Invalid", answer
    assert "metadata.annotations" in answer["message"] and says in answer["message"], answer
    assert daemon.pod("refused")["reason"] == "NotFound"
