"""kill -9 of a process that writes through stateful filters, over and over: nothing acknowledged lost, nothing torn.

``HV_IOFILTER_KILLS`` says how often in all (``make soak``: 300 for each chain). The work is done by
``tests/c/iofilter/crash_checker.c``, which explains itself.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHAINS = (
    "linkedclone",
    "snapshot",
    "integrity",
    "encrypt",
    "mirror",
    "linkedclone+integrity+encrypt+mirror",
)
KILLS = int(os.environ.get("HV_IOFILTER_KILLS", "24"))
TIME_LIMIT_S = 20 + KILLS


@pytest.fixture(scope="module")
def checker() -> Path:
    """The program, built if need be."""
    subprocess.run(["make", "-s", "-C", str(ROOT / "csrc"), "crash-iofilter"], check=True, timeout=300)
    return ROOT / "build" / "c" / "crash-iofilter"


@pytest.mark.parametrize("chain", CHAINS)
def test_nothing_acknowledged_is_lost(checker: Path, chain: str, tmp_path: Path) -> None:
    kills = max(4, KILLS // len(CHAINS)) if KILLS < 100 else KILLS
    done = subprocess.run(
        [checker, chain, str(kills), str(tmp_path), str(os.getpid())],
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S * 4,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{kills} kills" in done.stdout
    print(done.stdout)
