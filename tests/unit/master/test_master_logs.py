"""What the master writes about itself, each time in a process of its own: a log is set up once a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WRITER = """
import sys
from pathlib import Path
import logging
from aiohttp.http_exceptions import BadHttpMessage
import structlog
from hypervisor.master import logs

logs.MAX_BYTES = 4000
logs.set_up(Path(sys.argv[1]))
log = structlog.get_logger("test")

def fail(secret):
    raise ZeroDivisionError

try:
    fail("hunter" + "2")
except ZeroDivisionError:
    log.exception("request failed", id=7)
try:
    raise BadHttpMessage("no HTTP " + "at all")
except BadHttpMessage:
    logging.getLogger("aiohttp.server").exception("Error handling request")
for number in range(int(sys.argv[2])):
    log.warning("line", number=number)
"""


def write(state: Path, log: Path, lines: int = 0) -> str:
    with log.open("ab") as stderr:
        subprocess.run([sys.executable, "-c", WRITER, str(state), str(lines)], check=True, stderr=stderr, timeout=60)
    return log.read_text()


def test_a_failure_shows_where_and_no_values(tmp_path: Path) -> None:
    said = write(tmp_path, tmp_path / "elsewhere", 1)
    assert "request failed" in said and "id=7" in said and "ZeroDivisionError" in said
    assert "hunter2" not in said
    assert "number=0" in said


def test_what_is_no_http_is_not_worth_a_line(tmp_path: Path) -> None:
    assert "at all" not in write(tmp_path, tmp_path / "elsewhere")


def test_its_own_file_is_bounded_and_no_other(tmp_path: Path) -> None:
    own, other = tmp_path / "master.log", tmp_path / "other.log"
    assert "number=999" in write(tmp_path, own, 1000)
    assert own.stat().st_size < 5000
    assert (tmp_path / "master.log.1").exists()
    assert write(tmp_path, other, 1000).count("number=") == 1000
