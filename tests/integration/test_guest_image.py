"""The guest image under QEMU's emulator: kernel, init and root, with a stand-in for the agent that reports and ends.

The real agent answers only over vsock; what is looked at here is what it finds when it starts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "guest-images"))

from builder.image import Project, build_image  # noqa: E402
from builder.packages import EXTRA_PYTHON_MODULES  # noqa: E402

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

CMDLINE = "console=ttyS0 quiet panic=-1 rcupdate.rcu_expedited=1 tsc=reliable no_timer_check audit=0"

STAND_IN = """
import ctypes, importlib, json, os, socket, subprocess

def report():
    for name in EXTRA:
        importlib.import_module(name)
    vsock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    vsock.bind((socket.VMADDR_CID_ANY, 1024))
    lo = socket.socket()
    lo.bind(("127.0.0.1", 0))
    lo.listen()
    socket.create_connection(lo.getsockname()).close()
    return {
        "pid": os.getpid(),
        "marks": [int(mark) for mark in os.environ["PODVISOR_BOOT_NS"].split(",")],
        "release": os.uname().release,
        "mounts": {row.split()[1]: row.split()[2:4] for row in open("/proc/mounts")},
        "modules": [row.split()[0] for row in open("/proc/modules")],
        "controllers": open("/sys/fs/cgroup/cgroup.subtree_control").read().split(),
        "devices": sorted(os.listdir("/dev")),
        "crun": subprocess.run(["crun", "--version"], capture_output=True, text=True).stdout,
        "stdin": os.readlink("/proc/self/fd/0"),
        "helper": os.access("/usr/lib/podvisor/hv-exec", os.X_OK),
        "seccomp": len(json.load(open("/usr/lib/podvisor/seccomp.json"))["syscalls"]),
        "free_kib": int(open("/proc/meminfo").read().split("MemAvailable:")[1].split()[0]),
    }

def main():
    try:
        print("REPORT " + json.dumps(report()), flush=True)
    finally:
        ctypes.CDLL(None).reboot(0x4321FEDC)
"""


def boot(image: Path, disk: Path, *, serial: str = "hv-root", memory: str = "256") -> str:
    """Boots to the guest's own power off; what the console said."""
    manifest = json.loads((image / "manifest.json").read_text())
    argv = [
        "qemu-system-x86_64", "-machine", "pc", "-nodefaults", "-no-user-config", "-accel", "tcg", "-cpu", "max",
        "-m", memory, "-display", "none", "-no-reboot", "-serial", "stdio",
        "-kernel", str(image / manifest["kernel"]["file"]), "-initrd", str(image / "initrd.img"), "-append", CMDLINE,
        "-drive", f"if=none,file={disk},format=raw,readonly=on,id=root",
        "-device", f"virtio-blk-pci,drive=root,serial={serial}",
    ]  # fmt: skip
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(errors="replace")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with the stand-in for the agent, and everything else as it is."""
    top = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "build/guest", top / "build/guest")
    for name in ("__init__.py", "version.py", "agent/__init__.py", "agent/wire.py"):
        target = top / "hypervisor" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "hypervisor" / name, target)
    (top / "hypervisor/agent/main.py").write_text(f"EXTRA = {EXTRA_PYTHON_MODULES!r}\n{STAND_IN}")
    out = tmp_path_factory.mktemp("image")
    build_image(Project(top), out, ROOT / "guest-images/out/cache")
    return out


@pytest.fixture(scope="module")
def report(image: Path) -> dict[str, Any]:
    """What the stand-in saw."""
    console = boot(image, image / "root.erofs")
    lines = [line for line in console.splitlines() if line.startswith("REPORT ")]
    assert lines, console
    answer: dict[str, Any] = json.loads(lines[0].removeprefix("REPORT "))
    return answer


def test_agent_is_pid_1_with_its_boot_marks(report: dict[str, Any]) -> None:
    assert report["pid"] == 1
    assert report["stdin"] == "/dev/null"
    assert len(report["marks"]) == 4
    assert report["marks"] == sorted(report["marks"])


def test_manifest_names_what_is_loaded(report: dict[str, Any], image: Path) -> None:
    manifest = json.loads((image / "manifest.json").read_text())
    assert report["release"] == manifest["kernel"]["release"]
    assert set(report["modules"]) == set(manifest["modules"])
    assert "vsock_loopback" not in report["modules"]


def test_mounts_are_made(report: dict[str, Any]) -> None:
    kinds = {path: row[0] for path, row in report["mounts"].items()}
    assert kinds == {
        "/": "erofs", "/proc": "proc", "/sys": "sysfs", "/dev": "devtmpfs", "/sys/fs/cgroup": "cgroup2",
        "/dev/pts": "devpts", "/dev/shm": "tmpfs", "/dev/mqueue": "mqueue", "/run": "tmpfs", "/tmp": "tmpfs",
        "/mnt": "tmpfs",
    }  # fmt: skip
    assert report["mounts"]["/"][1].startswith("ro")
    assert {"fd", "ptmx", "pts", "shm", "stdin", "stdout", "vsock"} <= set(report["devices"])


def test_containers_can_be_limited(report: dict[str, Any]) -> None:
    assert {"cpu", "io", "memory", "pids"} <= set(report["controllers"])


def test_engine_helper_and_profile_are_there(report: dict[str, Any]) -> None:
    assert report["crun"].startswith("crun version")
    assert report["helper"]
    assert report["seccomp"] > 10


def test_most_of_a_small_guest_is_left_for_containers(report: dict[str, Any]) -> None:
    assert report["free_kib"] > 150 * 1024  # of 256 MiB


def test_guest_of_128_mib_boots(image: Path) -> None:
    assert "REPORT " in boot(image, image / "root.erofs", memory="128")


def test_missing_root_disk_is_one_line_and_the_end(image: Path) -> None:
    console = boot(image, image / "root.erofs", serial="another")
    assert "podvisor init: no virtio disk with serial hv-root appeared within 10 s; powering off" in console


def test_broken_root_disk_is_one_line_and_the_end(image: Path, tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(1 << 20))
    assert "podvisor init: mounting /dev/vda as erofs: Invalid argument; powering off" in boot(
        image, tmp_path / "zeros"
    )
