"""Idle guests are trimmed, busy ones are not, and nobody who would die of the signal gets it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hypervisor.vmm import trim
from hypervisor.vmm.trim import WORTH_BYTES, IdleRule, Look, takes_signal, trim_when_idle
from hypervisor.vmx.process import ProcessId

MIB = 1 << 20
#: as the library in QEMU: blocks the signal, and gives memory back for each that comes. The thread that waits is not
#: the first: while it waits, the kernel shows the signal as not blocked there
TRIMMED = f"""
import os, signal, sys, threading
numbers = {{signal.Signals(signal.SIGRTMIN) + 6}}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
held = [bytearray(os.urandom(1024)) * ({4 * WORTH_BYTES} // 1024)]
def serve():
    while True:
        signal.sigwait(numbers)
        held.clear()
        print("given back", flush=True)
threading.Thread(target=serve, daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
"""


def rule(cpu_s: float = 5.0, mib: int = 60) -> IdleRule:
    return IdleRule(100.0, Look(cpu_s, mib * MIB), idle_s=20.0)


def test_after_its_idle_time_and_not_before() -> None:
    idle = rule()
    assert not idle.trims(119.0, Look(5.1, 60 * MIB))
    assert idle.trims(120.0, Look(5.1, 60 * MIB))


def test_work_begins_the_wait_anew() -> None:
    idle = rule()
    assert not idle.trims(115.0, Look(5.3, 60 * MIB))
    assert not idle.trims(120.0, Look(5.3, 60 * MIB))
    assert idle.trims(135.0, Look(5.4, 60 * MIB))


def test_again_only_when_it_has_grown_and_each_time_later() -> None:
    idle = rule()
    idle.trimmed(120.0, Look(5.1, 20 * MIB))
    assert not idle.trims(200.0, Look(5.2, 20 * MIB + WORTH_BYTES - 1))
    assert not idle.trims(159.0, Look(5.2, 20 * MIB + WORTH_BYTES))
    assert idle.trims(160.0, Look(5.2, 20 * MIB + WORTH_BYTES))
    for _ in range(20):
        idle.trimmed(160.0, Look(5.2, 20 * MIB))
    assert idle.idle_s == trim.MOST_IDLE_S


def test_what_has_little_is_left_alone() -> None:
    assert not rule(mib=4).trims(200.0, Look(5.1, WORTH_BYTES - 1))


def test_a_process_that_does_not_wait_for_the_signal_never_gets_it() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert not takes_signal(other.pid)
        asyncio.run(asyncio.wait_for(trim_when_idle(ProcessId.of(other.pid), "vm", pytest.fail, idle_s=0.0), 90))
        assert other.poll() is None
        other.communicate(b"\n")
    assert not takes_signal(other.pid)
    assert Look.at(other.pid) is None


@contextmanager
def trimmable() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", TRIMMED], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield process
        finally:
            process.kill()


def test_an_idle_process_is_trimmed_once_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trim, "LOOK_S", 0.05)

    async def watch(process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        done = asyncio.Event()
        task = asyncio.create_task(trim_when_idle(ProcessId.of(process.pid), "vm", done.set, idle_s=0.2))
        await asyncio.wait_for(done.wait(), 90)
        said = await asyncio.to_thread(process.stdout.readline)
        os.kill(process.pid, 9)
        await asyncio.wait_for(task, 90)  # it ends with the process
        return said

    with trimmable() as process:
        assert asyncio.run(watch(process)) == b"given back\n"
