"""What a pod's start costs by who serves its disks: QEMU; vmx with a file system made at the start; vmx with a scratch
disk that is a linked clone of a formatted base.

All three on one host, in turn: its daemon looks before each start which of them is wanted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from host import ROOT, Host, fresh_host
from measure import Figure
from startup import PHASES, Runs

QEMU, FORMATTED, CLONED = "QEMU's block layer", "vmx, file system made at the start", "vmx, linked clone of a base"
MODES = (QEMU, FORMATTED, CLONED)
_WARM_UP = 2
"""The first start of a kind makes its template, the second one records its working set."""
_PATIENCE_S = 60.0

# A daemon as users have it, but for one thing: who serves the next pod's disks.
_DAEMON = f"""
import asyncio, dataclasses, os, pathlib, sys
from hypervisor.controller import vmhost
from hypervisor.controller.hostd import HostConfig, serve
from hypervisor.controller.paths import state_directory

wanted, usual = pathlib.Path(sys.argv[2]), vmhost.VmHost.start

async def start(self, request):
    mode = wanted.read_text()
    os.environ["HV_BLOCK"] = "qemu" if mode == {QEMU!r} else "vmx"
    return await usual(self if mode == {CLONED!r} else dataclasses.replace(self, bases=None), request)

vmhost.VmHost.start = start
asyncio.run(serve(HostConfig(state_directory(sys.argv[1]))))
"""


@contextmanager
def _daemon(host: Host, wanted: Path) -> Iterator[None]:
    host.run("host", "stop")
    (host.state / "host.json").unlink(missing_ok=True)
    with (host.state / "bench.log").open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", _DAEMON, host.state, wanted],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while not (host.state / "host.json").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the daemon does not listen: {(host.state / 'bench.log').read_text()[-2000:]}")
            time.sleep(0.05)
        yield
    finally:
        host.run("host", "stop", "--pods", check=False)
        process.terminate()
        process.wait()


def run(rounds: int) -> list[Figure]:
    """`rounds` starts of each kind, in turn."""
    runs = {mode: Runs() for mode in MODES}
    with fresh_host("busybox") as host:
        wanted = host.state / "bench-mode"
        wanted.write_text(QEMU)
        with _daemon(host, wanted):
            for turn in range(_WARM_UP + rounds):
                for mode in MODES:
                    wanted.write_text(mode)
                    (runs[mode] if turn >= _WARM_UP else Runs()).take(host)
    return [figure for mode in MODES for figure in _figures(mode, runs[mode])]


def _figures(mode: str, runs: Runs) -> list[Figure]:
    whole = Figure(f"{mode}: request at the daemon to the container's exit", "s", tuple(runs.exits))
    phases = [(name, tuple(row[name] for row in runs.phases if name in row)) for name in PHASES]
    return [whole, *(Figure(f"{mode}: phase {name}", "s", values) for name, values in phases if values)]
