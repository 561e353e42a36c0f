"""Pods that start as clones of a template: all different, and no worse off than cold ones when something breaks."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Host, wait_for

from hypervisor.vmm import trim

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.uffd]

NUMBERS = b"".join(b"%d\n" % n for n in range(1, 3001))
TELL = (
    "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; head -c 32 /dev/urandom | sha256sum; hostname; "
    "cat /etc/machine-id 2>/dev/null || echo none-$(hostname)"
)


@pytest.fixture(scope="module", autouse=True)
def template(host: Host) -> Path:
    """What pods of the default size start from, made before the tests.

    Other sizes may have templates too: the host is shared with other modules.
    """
    with running(host, "which-template", "sleep", "1000") as folder:
        assert plan(folder)["origin"] == "clone"
        return Path(plan(folder)["clone"]["template"])


def templates(host: Host) -> list[Path]:
    """All that are whole."""
    return sorted(p for p in (host.state / "templates").glob("[0-9a-f]*") if (p / "template.json").is_file())


@contextmanager
def running(host: Host, name: str, *command: str, options: tuple[str, ...] = ()) -> Iterator[Path]:
    """A pod of this name, and its folder; removed afterwards."""
    before = set((host.state / "pods").iterdir())
    host.hv("run", "-d", "--name", name, *options, "busybox", "--", *command)
    try:
        (folder,) = set((host.state / "pods").iterdir()) - before
        yield folder
    finally:
        host.hv("rm", "-f", name)


def plan(folder: Path) -> Any:
    return json.loads((folder / "vm/config.json").read_text())


def status(folder: Path) -> Any:
    return json.loads((folder / "status.json").read_text())


def warnings(host: Host, event: str) -> list[str]:
    lines = [json.loads(x) for x in (host.state / "hostd.log").read_text().splitlines() if x.startswith("{")]
    return [line.get("reason", "") for line in lines if line.get("event") == event]


def test_a_pod_is_a_clone_and_says_its_phases(host: Host, template: Path) -> None:
    done = host.hv("run", "--rm", "--timing", "busybox", "--", "true")
    phases = json.loads(done.stderr.decode().splitlines()[-1])["host"]
    assert {"pull", "queue", "vm", "boot", "setup", "containers"} <= phases.keys()
    with running(host, "clone-plan", "sleep", "1000") as folder:
        assert plan(folder)["origin"] == "clone"
        assert plan(folder)["clone"]["template"] == str(template)


@pytest.mark.parametrize(("clones", "at_once"), [(20, 5), pytest.param(30, 30, marks=pytest.mark.soak)])
def test_no_two_clones_are_equal(host: Host, clones: int, at_once: int) -> None:
    names = [f"twin-{i}" for i in range(clones)]

    def tell(name: str) -> list[str]:
        told = host.hv("run", "--rm", "--name", name, "busybox", "--", "sh", "-c", TELL).stdout
        return told.decode().splitlines()

    with ThreadPoolExecutor(at_once) as pool:
        told = list(pool.map(tell, names))
    assert all(len(lines) == 5 for lines in told)
    for what, values in zip(
        ("boot_id", "uuid", "random", "hostname", "machine-id"), zip(*told, strict=True), strict=True
    ):
        assert len(set(values)) == clones, f"{what}: {values}"


def ram_of(host: Host, name: str) -> Any:
    """What a pod's vmx counts of its guest's RAM."""
    (pod,) = (p for p in host.json("top")["pods"] if p["name"] == name)
    return pod["vm"]["vmx"]["ram"]


def test_a_working_set_is_recorded_once_and_saves_the_faults(host: Host, template: Path) -> None:
    path = template / "working-set"
    path.write_bytes(b"damaged")
    with running(host, "recorder", "sleep", "1000") as folder:
        assert plan(folder)["clone"]["recording"]
        wait_for(path.exists, "the working set is there", 10)
        recorder = ram_of(host, "recorder")
        with running(host, "reader", "sleep", "1000") as other:
            assert plan(other)["clone"]["working_set"]
            reader = ram_of(host, "reader")
    assert "checksum" in warnings(host, "working set dropped; it is recorded anew")[-1]
    assert recorder["prefetched"] == 0
    assert reader["prefetched"] > 1000
    assert reader["faults"] <= recorder["faults"] / 20
    assert (reader["pages_copied"] + reader["pages_zeroed"]) * 4096 <= 32 << 20


@pytest.mark.parametrize(
    ("part", "said"),
    [("ram", "ram was changed"), ("state", "state cannot be read"), ("template.json", "template.json")],
)
def test_a_damaged_template_is_built_anew(host: Host, template: Path, part: str, said: str) -> None:
    inode = (template / "ram").stat().st_ino
    if part == "ram":
        extents = json.loads((template / "template.json").read_text())["extents"]
        with (template / "ram").open("r+b") as file:
            at = extents[-1][0] * 4096 + 100
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0x10]))
    else:
        (template / part).unlink()
        if part == "template.json":
            (template / part).mkdir()
    before = len(warnings(host, "template is built anew"))
    assert host.hv("run", "--rm", "busybox", "--", "echo", "ok").stdout == b"ok\n"
    told = warnings(host, "template is built anew")[before:]
    assert len(told) == 1, told
    assert said in told[0]
    assert template in templates(host)
    assert (template / "ram").stat().st_ino != inode or part != "ram"


def test_ram_that_cannot_be_served_ends_the_pod_and_says_so(host: Host, template: Path) -> None:
    """The template is truncated under a running clone: it must never read zeroes instead."""
    with running(host, "cut", "sleep", "1000") as folder:
        os.truncate(template / "ram", 0)
        host.hv("exec", "cut", "--", "sh", "-c", "head -c 64000000 /dev/urandom | sha256sum", check=False)
        wait_for(lambda: status(folder)["phase"] == "Failed", "the pod has failed", 20)
        assert "guest RAM" in status(folder)["message"]


def test_translated_code_is_given_back_and_the_guest_goes_on(host: Host) -> None:
    """Amid work, many times: what is thrown away is translated again, and nothing is computed wrongly."""
    work = "i=0; while [ $i -lt 30 ]; do i=$((i+1)); seq 3000 | sort -n | md5sum; done | sort -u"
    with running(host, "trimmed", "sleep", "1000") as folder, ThreadPoolExecutor(1) as pool:
        qemu = json.loads((folder / "vm/processes.json").read_text())["qemu"]["pid"]
        before = private_bytes(qemu)
        os.kill(qemu, trim.SIGNAL)
        wait_for(lambda: private_bytes(qemu) < before - 2 * trim.WORTH_BYTES, "the memory is given back", 20)
        working = pool.submit(host.hv, "exec", "trimmed", "--", "sh", "-c", work)
        for _ in range(20):
            os.kill(qemu, trim.SIGNAL)
            time.sleep(0.2)  # or it would do nothing but translate
        assert working.result().stdout == hashlib.md5(NUMBERS).hexdigest().encode() + b"  -\n"
        assert status(folder)["phase"] == "Running"


def private_bytes(pid: int) -> int:
    look = trim.Look.at(pid)
    assert look is not None, "QEMU has ended"
    return look.private_bytes


def test_a_daemon_killed_amid_making_a_template_leaves_no_guest(fresh_host: Host) -> None:
    made = fresh_host.state / "templates"
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(fresh_host.hv, "run", "-d", "--name", "cut", "busybox", "--", "sleep", "9", check=False)
        wait_for(lambda: any(made.glob("vm-*/processes.json")), "a template is being made", 20)
        os.kill(fresh_host.daemon_pid(), 9)
        starting.result()
    # No pod will ask for this template again.
    for path in (fresh_host.state / "pods").glob("*/pod.json"):
        path.unlink()
    fresh_host.hv("host", "start")
    assert not list(made.glob("vm-*")) + list(made.glob(".build-*"))
    wait_for(lambda: not [x for x in fresh_host.processes() if "qemu" in x], "its QEMU has ended", 5)
