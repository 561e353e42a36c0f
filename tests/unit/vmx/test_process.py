"""Processes named by pid and start time."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from hypervisor.errors import NotFound
from hypervisor.vmx.process import ProcessId

SLEEP = [sys.executable, "-c", "import time; time.sleep(1000)"]


async def test_a_process_from_start_to_end() -> None:
    child = subprocess.Popen(SLEEP)  # noqa: ASYNC220 - asyncio's would reap it
    process = ProcessId.of(child.pid)
    assert process.alive()
    waiters = [asyncio.create_task(process.wait_exit()) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(w.done() for w in waiters)
    assert process.signal(signal.SIGTERM)
    await asyncio.wait_for(asyncio.gather(*waiters), 10)
    # A zombie now: it has ended, though its pid is taken.
    assert not process.alive()
    assert not process.signal(signal.SIGTERM)
    await asyncio.wait_for(process.wait_exit(), 1)
    child.wait()
    assert not process.alive()
    assert not process.kill()
    await asyncio.wait_for(process.wait_exit(), 1)
    with pytest.raises(NotFound):
        ProcessId.of(child.pid)


async def test_a_pid_that_another_process_has_now() -> None:
    """Same pid, other start time: never signalled, and awaited as what it is, gone."""
    other = ProcessId(os.getpid(), ProcessId.of(os.getpid()).start_time - 1)
    assert not other.alive()
    assert not other.kill()
    await asyncio.wait_for(other.wait_exit(), 1)


async def test_a_cancelled_wait_leaves_no_descriptor() -> None:
    process = ProcessId.of(os.getpid())
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    task = asyncio.create_task(process.wait_exit())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
