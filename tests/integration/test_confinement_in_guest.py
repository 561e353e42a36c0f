"""The confinement on Debian 12's own kernel: cgroup v2 with all its controllers, Landlock without scopes.

The kernel that this test runs on may have neither; so a guest is booted from the guest image's kernel and initramfs,
with a root of its own: the guest image's, the rest of Python's library, the code under test, confinement_in_guest.py.
"""

from __future__ import annotations

import json
import py_compile
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "guest-images/out"
FILTER_ONLY = {"new-user-namespace", "vsock-socket", "netlink-socket", "datagram-pair", "io-uring", "abstract-socket"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the guest printed."""
    folder = tmp_path_factory.mktemp("in-guest")
    disk = make_disk(folder)
    with booted(disk, folder / "console") as console:
        text = console.read_text(errors="replace")
    found: dict[str, Any] = {}
    for line in text.splitlines():
        if line.startswith("RESULT "):
            found |= json.loads(line.removeprefix("RESULT "))
    assert "drill-one-user" in found, text[-3000:]
    return found


def make_disk(folder: Path) -> Path:
    root = folder / "root"
    subprocess.run(["fsck.erofs", f"--extract={root}", IMAGE / "root.erofs"], check=True, capture_output=True)
    for package in ("libpython3.11-minimal", "libpython3.11-stdlib"):
        (archive,) = (IMAGE / "cache").glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, root], check=True)
    room = root / "usr/lib/podvisor"
    for module in ("errors", "vmm/__init__", "vmm/cgroup", "vmm/watch", "vmx/__init__", "vmx/process"):
        target = room / "hypervisor" / f"{module}.py"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "hypervisor" / f"{module}.py", target)
    shutil.copy(ROOT / "hypervisor/libexec/hv-confine", room)
    hostile = ["gcc", "-D_GNU_SOURCE", "-O1", "-static", "-o", room / "hostile", ROOT / "tests/c/confine/hostile.c"]
    subprocess.run(hostile, check=True)
    script = Path(__file__).with_name("confinement_in_guest.py")
    py_compile.compile(str(script), cfile=str(room / "agent_main.pyc"), doraise=True)
    subprocess.run(["mkfs.erofs", folder / "disk", root], check=True, capture_output=True)
    return folder / "disk"


@contextmanager
def booted(disk: Path, console: Path) -> Iterator[Path]:
    """Yields the console's log once the guest has turned itself off."""
    argv = [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "512",
        "-machine", "pc", "-accel", "tcg", "-cpu", "max", "-serial", f"file:{console}",
        "-kernel", IMAGE / "vmlinuz", "-initrd", IMAGE / "initrd.img", "-append", "console=ttyS0 quiet panic=-1",
        "-drive", f"if=none,id=root,format=raw,readonly=on,file={disk}",
        "-device", "virtio-blk-pci,drive=root,serial=hv-root",
    ]  # fmt: skip
    subprocess.run(argv, check=True, timeout=120)
    yield console


pytestmark = [pytest.mark.qemu, pytest.mark.slow]


def test_cgroup_v2_limits_hold(results: dict[str, Any]) -> None:
    assert results["layout"] == ["v2", "cpu", "memory", "pids"]
    assert (results["oom-status"], results["oom-kills"]) == (9, 1)
    assert results["peak"] <= 32 << 20
    assert 0.05 < results["cpu-share"] < 0.35  # asked for: 0.2 of a CPU
    assert results["members"] is True


def test_cgroup_v2_ends(results: dict[str, Any]) -> None:
    assert results["kill-status"] == 9
    assert results["swept"] == ["left"]
    assert results["nothing-left"] is True


@pytest.mark.parametrize("mode", ["filter", "no-filter", "one-user"])
def test_the_drill_holds_there(results: dict[str, Any], mode: str) -> None:
    drill = results[f"drill-{mode}"]
    assert drill["complete"] and drill["alive"], drill
    assert drill["attempts"] >= 35
    assert set(drill["reached"]) <= (FILTER_ONLY if mode == "no-filter" else set()), drill
