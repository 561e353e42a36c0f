"""The device process of a VM is killed, and the pod runs on: at any moment, many times, with or without the daemon."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Host, wait_for

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.uffd]

#: writes files that the guest keeps in fresh pages of its memory, and checks each; a wrong one is told
STORM = (
    "i=0; while true; do i=$((i+1)); yes line-$i | head -c 2000000 >/tmp/f; "
    '[ "$(yes line-$i | head -c 2000000 | cksum)" = "$(cksum </tmp/f)" ] || echo BAD $i; '
    "mv /tmp/f /tmp/f$i; echo $i >/tmp/done; done"
)
CHECK = (
    "n=$(cat /tmp/done); i=0; while [ $i -lt $n ]; do i=$((i+1)); "
    '[ "$(yes line-$i | head -c 2000000 | cksum)" = "$(cksum </tmp/f$i)" ] || echo BAD $i; done; echo checked $n'
)
#: of its own size, so that most of what the storm touches is fresh
ROOMY = ("--memory", "700Mi")


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


def processes(folder: Path) -> Any:
    """As recorded; the test fails, with what the pod says, when the VM has gone."""
    try:
        return json.loads((folder / "vm/processes.json").read_text())
    except FileNotFoundError:
        pytest.fail(f"the VM has gone: {status(folder)['message']}")


def has_successor(folder: Path, dead: int) -> bool:
    return bool(processes(folder)["vmx"]["pid"] != dead)


def status(folder: Path) -> Any:
    return json.loads((folder / "status.json").read_text())


def answers(host: Host, name: str) -> bool:
    return host.hv("exec", name, "--", "echo", "here", check=False).stdout == b"here\n"


def kill_vmx(folder: Path) -> int:
    """Kills it; its process id."""
    pid = int(processes(folder)["vmx"]["pid"])
    os.kill(pid, 9)
    return pid


def kill_many(host: Host, folder: Path, name: str, times: int) -> None:
    """Each as soon as the last successor's agent answers, or at any moment before."""
    chance = random.Random(7)
    for turn in range(times):
        assert status(folder)["phase"] == "Running", status(folder)["message"]
        if times > 40:
            time.sleep(0.75)  # below the rate at which a VM is given up
        dead = kill_vmx(folder)
        wait_for(partial(has_successor, folder, dead), f"vmx is replaced, kill {turn}", 10)
        if turn % 4 == 3:
            time.sleep(chance.uniform(0, 0.3))  # amid its reconnecting
        else:
            wait_for(lambda: answers(host, name), f"the agent answers again, kill {turn}", 30)


def replaced(host: Host, name: str) -> int:
    (pod,) = (p for p in host.json("top")["pods"] if p["name"] == name)
    return int(pod["vm"]["vmx_replaced"])


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_killed_during_a_storm_of_faults_and_no_page_is_wrong(host: Host, kills: int) -> None:
    with running(host, "storm", "sh", "-c", STORM, options=ROOMY) as folder:
        qemu = processes(folder)["qemu"]["pid"]
        kill_many(host, folder, "storm", kills)
        wait_for(lambda: answers(host, "storm"), "the agent answers at the end", 30)
        assert replaced(host, "storm") == kills
        assert processes(folder)["qemu"]["pid"] == qemu
        assert status(folder)["phase"] == "Running"
        assert status(folder)["containers"][0]["restarts"] == 0
        assert b"BAD" not in host.hv("logs", "storm").stdout
        checked = host.hv("exec", "storm", "--", "sh", "-c", CHECK).stdout
        assert b"BAD" not in checked
        assert checked.startswith(b"checked ")


def test_killed_with_the_daemon(fresh_host: Host) -> None:
    """Nobody keeps a descriptor for that day: the next daemon finds all it needs in QEMU."""
    with running(fresh_host, "orphan", "sh", "-c", STORM) as folder:
        for _ in range(2):
            os.kill(fresh_host.daemon_pid(), 9)
            kill_vmx(folder)
            fresh_host.hv("host", "start")
            wait_for(lambda: answers(fresh_host, "orphan"), "the agent answers", 30)
        assert status(folder)["containers"][0]["restarts"] == 0
        assert b"BAD" not in fresh_host.hv("exec", "orphan", "--", "sh", "-c", CHECK).stdout


def test_killed_in_a_vm_that_was_booted(host: Host) -> None:
    with running(host, "cold", "sleep", "1000", options=("--cold",)) as folder:
        assert json.loads((folder / "vm/config.json").read_text())["origin"] == "boot"
        for _ in range(2):
            dead = kill_vmx(folder)
            wait_for(partial(has_successor, folder, dead), "vmx is replaced", 10)
            wait_for(lambda: answers(host, "cold"), "the agent answers", 30)


def test_what_runs_over_it_ends_and_says_why(host: Host) -> None:
    """A session ends with an error, a log and the console go on."""
    with running(host, "busy", "sh", "-c", "i=0; while true; do i=$((i+1)); echo $i; sleep 0.2; done") as folder:
        lines = len(host.hv("logs", "busy").stdout.splitlines())
        with ThreadPoolExecutor(1) as pool:
            wait = ("exec", "busy", "--", "sh", "-c", "touch /tmp/session; sleep 1000")
            session = pool.submit(host.hv, *wait, check=False)
            wait_for(lambda: b"session" in host.hv("exec", "busy", "--", "ls", "/tmp").stdout, "it runs", 20)
            dead = kill_vmx(folder)
            wait_for(partial(has_successor, folder, dead), "vmx is replaced", 10)
            assert b"device process replaced" in session.result(30).stderr
            assert session.result().returncode == 125  # hv itself failed: nobody knows how the process ends
        wait_for(lambda: answers(host, "busy"), "the agent answers", 30)
        wait_for(lambda: len(host.hv("logs", "busy").stdout.splitlines()) > lines + 5, "the log goes on", 10)
        told = [json.loads(x) for x in (host.state / "hostd.log").read_text().splitlines() if x.startswith("{")]
        assert [x for x in told if x["event"] == "device process replaced" and "signal 9" in x["reason"]]


def test_killed_amid_the_start(host: Host) -> None:
    """While RAM is handed over, prefetched, and the devices' state is loaded: the pod runs.

    A vmx that has taken RAM over has a successor; before, the start is tried once more.
    """
    chance = random.Random(11)
    for turn in range(8):
        before = set((host.state / "pods").iterdir())
        name = f"start-{turn}"
        with ThreadPoolExecutor(1) as pool:
            starting = pool.submit(host.hv, "run", "-d", "--name", name, "busybox", "--", "sleep", "1000", check=False)
            wait_for(partial(vmx_of_new, host, before), "vmx is there", 20)
            time.sleep(chance.uniform(0.01, 0.3))
            os.kill(vmx_of_new(host, before), 9)
            starting.result()
        (folder,) = set((host.state / "pods").iterdir()) - before
        wait_for(partial(has_come_up_or_not, folder), "it runs or not", 60)
        assert status(folder)["phase"] == "Running", status(folder)["message"]
        wait_for(partial(answers, host, name), "the agent answers", 30)
        host.hv("rm", "-f", name)


def has_come_up_or_not(folder: Path) -> bool:
    return status(folder)["phase"] in ("Running", "Failed")


def vmx_of_new(host: Host, before: set[Path]) -> int:
    """The vmx of the pod that is not in `before`; 0 while there is none."""
    for folder in set((host.state / "pods").iterdir()) - before:
        if not (folder / "vm/processes.json").exists():
            continue
        recorded = processes(folder)
        if recorded["qemu"] is not None and recorded["vmx"] is not None:
            return int(recorded["vmx"]["pid"])
    return 0


def test_a_vmx_that_dies_again_and_again_takes_the_pod_with_it(host: Host) -> None:
    with running(host, "doomed", "sleep", "1000") as folder:
        qemu = processes(folder)["qemu"]["pid"]
        deadline = time.monotonic() + 20
        while status(folder)["phase"] == "Running":
            assert time.monotonic() < deadline
            with suppress(OSError, pytest.fail.Exception):
                kill_vmx(folder)
            time.sleep(0.01)
        wait_for(lambda: status(folder)["reason"] == "VmFailed", "the reason is told", 10)
        assert "vmx" in status(folder)["message"]
        assert "replaced 40 times" in status(folder)["message"]
        wait_for(lambda: not Path(f"/proc/{qemu}").exists(), "QEMU has ended", 10)
