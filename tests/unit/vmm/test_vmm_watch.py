"""Processes watched by pidfd: ours and others'."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from hypervisor.errors import NotFound
from hypervisor.vmm.watch import ProcessWatch, describe_status
from hypervisor.vmx.process import ProcessId


def spawn(*argv: str) -> ProcessWatch:
    pid = os.posix_spawnp(argv[0], argv, os.environ)
    return ProcessWatch.open(ProcessId.of(pid))


def output_pid(script: str) -> int:
    return int(subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout)


def listed(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def block_until_zombie(pid: int) -> None:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize(
    ("script", "says"),
    [("exit 0", "exited with status 0"), ("exit 3", "exited with status 3"), ("kill -9 $$", "signal 9")],
)
async def test_a_childs_end_and_status(script: str, says: str) -> None:
    watch = spawn("sh", "-c", script)
    await asyncio.gather(watch.wait(), watch.wait())
    assert not watch.alive
    assert says in describe_status(watch.status())
    watch.close()
    watch.close()


async def test_no_zombie_is_left() -> None:
    watch = spawn("true")
    await watch.wait()
    assert not listed(watch.process.pid)
    watch.close()


async def test_kill() -> None:
    watch = spawn("sleep", "1000")
    assert watch.alive
    await watch.kill()
    await watch.kill()
    watch.signal(signal.SIGTERM)
    assert describe_status(watch.status()) == "was killed (signal 9)"
    watch.close()


async def test_somebody_elses_child() -> None:
    """As vmx, and as QEMU of a VM that was adopted."""
    watch = ProcessWatch.open(ProcessId.of(output_pid("sleep 1000 >/dev/null 2>&1 & echo $!")))
    assert watch.alive
    await watch.kill()
    assert not watch.alive
    assert describe_status(watch.status()) in ("was killed (signal 9)", "ended")
    watch.close()


async def test_alive_sees_an_end_that_the_loop_has_not() -> None:
    watch = spawn("true")
    block_until_zombie(watch.process.pid)
    assert not watch.alive
    await watch.wait()
    watch.close()


async def test_a_number_that_has_changed_hands() -> None:
    me = ProcessId.of(os.getpid())
    with pytest.raises(NotFound, match="another one"):
        ProcessWatch.open(ProcessId(me.pid, me.start_time + 1))
    with pytest.raises(NotFound, match="no process"):
        ProcessWatch.open(ProcessId(output_pid("echo $$"), 1))


def test_an_unknown_status() -> None:
    assert describe_status(None) == "ended"
