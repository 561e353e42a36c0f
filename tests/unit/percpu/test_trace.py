"""Traces: events of every CPU, by time, as Chrome reads them."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from typing import Any

import pytest

from hypervisor.errors import HvError, InvalidInput
from hypervisor.percpu.area import PerCpuAreas
from hypervisor.percpu.trace import PerCpuTrace


def events_of(trace: PerCpuTrace) -> list[dict[str, Any]]:
    with tempfile.TemporaryFile() as file:
        count = trace.write(file.fileno())
        file.seek(0)
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    assert len(events) == count
    return events


def test_events_come_by_time() -> None:
    trace = PerCpuTrace(PerCpuAreas(), 1024)
    threads = [threading.Thread(target=lambda: [trace.mark(i) for i in range(100)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = events_of(trace)
    assert [e["ts"] for e in events] == sorted(e["ts"] for e in events)
    assert sorted(e["args"]["argument"] for e in events) == sorted(list(range(100)) * 3)
    assert {e["pid"] for e in events} == {os.getpid()}
    assert len({e["tid"] for e in events}) == 3
    assert {e["args"]["cpu"] for e in events} <= set(range(os.cpu_count() or 1))


def test_the_newest_stay() -> None:
    trace = PerCpuTrace(PerCpuAreas(), 128)
    os.sched_setaffinity(0, {min(before := os.sched_getaffinity(0))})
    try:
        for i in range(1000):
            trace.mark(i)
    finally:
        os.sched_setaffinity(0, before)
    assert [e["args"]["argument"] for e in events_of(trace)] == list(range(1000 - 127, 1000))


def test_bad_input_is_refused() -> None:
    areas = PerCpuAreas()
    for records in (0, 100, 1 << 16):
        with pytest.raises(InvalidInput):
            PerCpuTrace(areas, records)
    with pytest.raises(HvError, match="writing a trace"):
        PerCpuTrace(areas).write(-1)
