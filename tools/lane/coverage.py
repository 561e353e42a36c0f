"""Line coverage of the host package, as the lane's tests see it: measured in L1, reported here.

hv, hostd, the zygote and vmx are processes of their own: each that starts with COVERAGE_PROCESS_START in its
environment is measured, as by tools/coverage.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_INSIDE = "/podvisor/.venv/lib/python3.11/site-packages/hypervisor"
#: on the project's disk
RC = "/podvisor/lane/coveragerc"
_RC = f"""[run]
source = {_INSIDE}
branch = True
parallel = True
omit = {_INSIDE}/agent/*
data_file = /tmp/coverage/data
sigterm = True

[paths]
source =
    {ROOT}/hypervisor
    {_INSIDE}

[report]
skip_empty = True
exclude_also =
    if TYPE_CHECKING:
    raise AssertionError
"""


def write_rc(path: Path) -> None:
    """For both sides: `report` has it beside the data."""
    path.write_text(_RC)


def report(results: Path) -> None:
    """Says the share of lines that ran; leaves ``coverage.json``, with this checkout's paths, in `results`.

    :raises subprocess.CalledProcessError: the run left no data
    """
    rc = results / "coveragerc"
    write_rc(rc)
    data = f"--data-file={results / 'coverage'}"
    tool = (sys.executable, "-m", "coverage")
    parts = sorted((results / "coverage-data").iterdir())
    subprocess.run([*tool, "combine", "-q", f"--rcfile={rc}", data, *parts], check=True, cwd=ROOT)
    subprocess.run([*tool, "json", "-q", f"--rcfile={rc}", data, "-o", results / "coverage.json"], check=True, cwd=ROOT)
    argv = [*tool, "report", f"--rcfile={rc}", data, "--format=total"]
    total = subprocess.run(argv, check=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    print(f"kvm-lane: these tests run {total} % of the host package's lines and branches; {results / 'coverage.json'}")
