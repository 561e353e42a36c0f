"""A device process's trace: on and off for every module, kept in between, written to whom it is asked by."""

from __future__ import annotations

import json
import tempfile
from typing import Any

from hypervisor.memory.faults import FaultServer
from hypervisor.vmx.trace import DeviceTrace


def written(trace: DeviceTrace) -> Any:
    with tempfile.TemporaryFile() as file:
        trace.take(file.fileno())
        file.seek(0)
        text = file.read()
    return json.loads(text) if text else None


def test_hooks_are_given_and_taken_back() -> None:
    given: list[list[int]] = [[], []]
    trace = DeviceTrace([hooks.append for hooks in given])
    assert written(trace) is None
    trace.start()
    trace.start()
    trace.stop()
    first, second = given
    assert first == second == [first[0], first[0], 0] and first[0]
    assert written(trace)["traceEvents"] == []


def test_real_modules_take_a_hook() -> None:
    trace = DeviceTrace([FaultServer.trace])
    trace.start()
    trace.stop()


def test_what_was_written_is_counted() -> None:
    trace = DeviceTrace([])
    assert trace.stats() == {"commits": 0, "restarts": 0, "memory_bytes": 0}
    trace.start()
    assert trace._trace is not None
    for _ in range(10_000):  # more than the rings keep
        trace._trace.mark()
    trace.stop()
    stats = trace.stats()
    assert stats["commits"] == 10_000 and stats["restarts"] >= 0
    assert 0 < stats["memory_bytes"] < 4 << 20
