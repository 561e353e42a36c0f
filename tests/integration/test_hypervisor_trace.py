"""``hv trace --hypervisor`` of a real pod: what its vmx did while somebody worked in it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import Host

pytestmark = pytest.mark.qemu


def trace(host: Host, pod: str, path: Path, *work: str) -> list[dict[str, Any]]:
    """The events of two seconds in which `work` was run in the pod, again and again."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            host.hv("exec", pod, "--", *work)

    worker = threading.Thread(target=run)
    worker.start()
    try:
        host.hv("trace", "--hypervisor", "--seconds", "2", "--file", str(path), pod)
    finally:
        over.set()
        worker.join()
    body = json.loads(path.read_text())
    events: list[dict[str, Any]] = body["traceEvents"]
    return events


@pytest.mark.tcg
def test_trace_shows_what_vmx_does(host: Host, pod: str, tmp_path: Path) -> None:
    events = trace(host, pod, tmp_path / "trace.json", "true")
    assert "vsock" in {e["name"] for e in events}
    times = [e["ts"] for e in events]
    assert times == sorted(times)
    assert all(e["ph"] == "X" and 0 <= e["dur"] < 10e6 for e in events)
    assert len({e["pid"] for e in events}) == 1
    told = json.loads(host.hv("top", "-o", "json").stdout)
    (percpu,) = (one["vm"]["vmx"]["percpu"] for one in told["pods"] if one["name"] == pod)
    assert percpu["commits"] >= len(events) and percpu["restarts"] >= 0
    assert 0 < percpu["memory_bytes"] < 4 << 20
    second = trace(host, pod, tmp_path / "again.json", "true")
    assert second[-1]["ts"] > times[-1]


def test_trace_of_no_pod(host: Host, tmp_path: Path) -> None:
    done = host.hv("trace", "--hypervisor", "no-such-pod", check=False)
    assert done.returncode == 1 and b"no-such-pod" in done.stderr
    done = host.hv("trace", "no-such-pod", check=False)
    assert done.returncode == 1 and b"--hypervisor" in done.stderr
