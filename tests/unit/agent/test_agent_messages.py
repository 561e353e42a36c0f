"""Termination messages: the file, its bound, and the log where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypervisor.agent import messages
from hypervisor.agent.container import Container
from hypervisor.agent.errors import AgentError
from hypervisor.agent.logs import LogWriter
from hypervisor.agent.spec import parse_spec


def ended(folder: Path, left: bytes, log: bytes, **message: object) -> Container:
    spec = {"name": "main", "image_disk": "img-0", "argv": ["x"], "message": {"path": "/dev/termination-log"} | message}
    container = Container(parse_spec(spec), 0)
    container.root._layers = str(folder)
    container.log_directory = str(folder / "log")
    (folder / "files").mkdir()
    (folder / "log").mkdir()
    Path(container.root.make_message_file()).write_bytes(left)
    writer = LogWriter(container.log_directory, 0, max_bytes=1 << 20, max_files=2)
    writer.write(b"stdout", log)
    writer.close()
    return container


def test_what_it_left_is_told_up_to_the_bound(tmp_path: Path) -> None:
    container = ended(tmp_path, b"x" * 5000, b"log\n", from_logs=True)
    assert messages.read(container, failed=True) == "x" * 4096
    assert (tmp_path / "files/message").stat().st_mode & 0o777 == 0o666


def test_the_log_when_it_failed_and_left_nothing(tmp_path: Path) -> None:
    log = b"".join(b"line %03d\n" % i for i in range(200))
    container = ended(tmp_path, b"", log, from_logs=True)
    told = messages.read(container, failed=True)
    assert told.splitlines() == [f"line {i:03}" for i in range(120, 200)]
    assert messages.read(container, failed=False) == ""


def test_a_long_log_is_cut_at_its_head(tmp_path: Path) -> None:
    container = ended(tmp_path, b"", b"a" * 3000 + b"END\n", from_logs=True)
    told = messages.read(container, failed=True)
    assert len(told) == messages.LOG_BYTES
    assert told.endswith("aEND\n")


def test_no_log_unless_asked_for_and_a_missing_file_is_nothing(tmp_path: Path) -> None:
    container = ended(tmp_path, b"", b"log\n")
    assert messages.read(container, failed=True) == ""
    (tmp_path / "files/message").unlink()
    assert messages.read(container, failed=True) == ""


def test_bad_settings() -> None:
    base = {"name": "main", "image_disk": "img-0", "argv": ["x"]}
    for message in ({"path": "rel"}, {"path": "/x", "max_bytes": 5000}, {"path": "/x", "more": 1}, {}):
        with pytest.raises(AgentError, match=r"container\.message"):
            parse_spec(base | {"message": message})
