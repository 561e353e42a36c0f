"""What the main job must show: a container from an OCI image in a VM of its own, seen through the command line."""

from __future__ import annotations

import hashlib
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Host, wait_for

pytestmark = [pytest.mark.qemu]

BULK = 100 * 1000 * 1000


def test_both_streams_apart_and_the_exit_code(host: Host) -> None:
    done = host.hv("run", "--rm", "busybox", "--", "sh", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 7)


def test_the_kernel_inside_is_another(host: Host, pod: str) -> None:
    release = host.hv("exec", pod, "--", "uname", "-r").stdout.decode().strip()
    assert release
    assert release != platform.release()


def test_bulk_data_through_exec_comes_back_unchanged(host: Host, pod: str) -> None:
    data = os.urandom(BULK)
    back = host.hv("exec", "-i", pod, "--", "cat", stdin=data).stdout
    assert hashlib.sha256(back).digest() == hashlib.sha256(data).digest()


def test_bulk_data_through_cp_comes_back_unchanged(host: Host, pod: str, tmp_path: Path) -> None:
    data = os.urandom(BULK)
    (tmp_path / "there").write_bytes(data)
    host.hv("cp", str(tmp_path / "there"), f"{pod}:/bulk")
    inside = host.hv("exec", pod, "--", "sha256sum", "/bulk").stdout.split()[0].decode()
    assert inside == hashlib.sha256(data).hexdigest()
    host.hv("cp", f"{pod}:/bulk", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data
    host.hv("exec", pod, "--", "rm", "/bulk")


@pytest.mark.slow
def test_fifty_pods_leave_nothing_behind(fresh_host: Host) -> None:
    """Started and removed four at a time; processes, sockets, descriptors and files are counted before and after."""
    fresh_host.hv("run", "--rm", "busybox", "--", "true")  # whatever is made once is made before counting
    before = traces(fresh_host)

    def one(number: int) -> int:
        code = number % 5
        return fresh_host.hv("run", "--rm", "busybox", "--", "sh", "-c", f"exit {code}", check=False).returncode

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(50))) == [n % 5 for n in range(50)]
    wait_for(lambda: traces(fresh_host) == before, f"{traces(fresh_host)} becomes {before}", 30)


def traces(host: Host) -> dict[str, object]:
    """What a pod might leave: processes, the daemon's descriptors, files of the state folder, mounts, cgroups."""
    skipped = {"hostd.log"}
    files = sorted(str(p.relative_to(host.state)) for p in host.state.rglob("*") if p.name not in skipped)
    return {
        "processes": len(host.processes()),
        "descriptors": sum(1 for _ in Path(f"/proc/{host.daemon_pid()}/fd").iterdir()),
        "files": files,
        "mounts": Path("/proc/self/mounts").read_text().count(str(host.state)),
        "cgroups": sum(1 for p in Path("/sys/fs/cgroup").rglob("podvisor*") if p.is_dir()),
        "sockets": Path("/proc/net/unix").read_text().count(str(host.state)),
    }
