"""Work inside a guest beside the same work in a plain process on the host, the same static program in both."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from host import fresh_host
from measure import Figure

SOURCE = Path(__file__).with_suffix(".c")


def parse(output: str) -> dict[str, float]:
    """Operations a second by case."""
    rows = (line.split() for line in output.splitlines())
    return {name: int(operations) / int(ns) * 1e9 for name, operations, ns in rows}


def run(rounds: int) -> list[Figure]:
    """How many times slower each kind of work is inside (host's rate over the guest's)."""
    slower: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, fresh_host("busybox") as host:
        program = Path(folder) / "guest_speed"
        subprocess.run(["gcc", "-O2", "-static", "-o", program, SOURCE], check=True)
        host.run("run", "-d", "--name", "speed", "--memory", "256Mi", "busybox", "--", "sleep", "100000")
        host.run("cp", str(program), "speed:/guest_speed")
        for _ in range(rounds):
            outside = parse(subprocess.run([program, folder], check=True, capture_output=True, text=True).stdout)
            inside = parse(host.run("exec", "speed", "--", "/guest_speed", "/").stdout.decode())
            for name, rate in outside.items():
                slower.setdefault(name, []).append(rate / inside[name])
    return [Figure(f"{name}: host's rate over the guest's", "x", tuple(values)) for name, values in slower.items()]
