"""VMs under KVM on a machine that has none: figures taken in the KVM lane's guest (inside_lane.py)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from measure import Figure

ROOT = Path(__file__).parents[2]


def run(rounds: int) -> list[Figure]:
    """Start phases, both back ends of vsock, speed of work; a quarter of an hour."""
    out = ROOT / "build/kvm-lane"
    subprocess.run([ROOT / "tools/kvm-lane", "--guest", "--bench", "all", f"--rounds={rounds}"], check=True)
    rows = json.loads((out / "results/figures.json").read_text())
    return [Figure(row["name"], row["unit"], tuple(row["samples"])) for row in rows]
