"""What ``--bench`` takes into L1 beside the project: tools/bench, and programs that are compiled out here."""

from __future__ import annotations

import sys
from pathlib import Path

from builder.run import output_of

ROOT = Path(__file__).parents[2]
SECTIONS = ("vsock", "speed", "starts")
#: vsock_guest.py and guest_speed.py look there for what they cannot compile in L1. Figures are taken with the machine's
#: clock, so waits are longer instead
ENVIRONMENT = {"HV_PREBUILT": "/podvisor/prebuilt", "HV_TEST_PATIENCE": "5"}


def parts(scratch: Path) -> dict[str, Path]:
    """Files and folders for the project's disk, made below `scratch` where they have to be."""
    sys.path.insert(0, str(ROOT / "tests/integration"))
    from vsock_guest import build_initrd

    made = scratch / "prebuilt"
    made.mkdir()
    speed = made / "guest_speed"
    output_of(["gcc", "-O2", "-static", "-o", str(speed), str(ROOT / "tools/bench/guest_speed.c")])
    (scratch / "initrd").mkdir()
    build_initrd(scratch / "initrd").rename(made / "vsock-initrd.img")
    return {"tools/bench": ROOT / "tools/bench", "prebuilt": made}
