"""Files of a volume are replaced all at once."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from hypervisor.agent.errors import AgentError
from hypervisor.agent.fields import Fields
from hypervisor.agent.publish import File, parse_files, publish


def tree(root: Path) -> dict[str, bytes]:
    """What a program sees that opens paths by name."""
    shown = [p for p in root.iterdir() if not p.name.startswith("..")]
    found: dict[str, bytes] = {}
    for path in shown:
        for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
            found[str(file.relative_to(root))] = file.read_bytes()
    return found


def test_files_are_there_with_their_modes_and_replaced(tmp_path: Path) -> None:
    publish(str(tmp_path), [File("token", b"1", 0o600), File("a/b", b"2", 0o644)])
    assert tree(tmp_path) == {"token": b"1", "a/b": b"2"}
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    opened = (tmp_path / "token").open("rb")
    publish(str(tmp_path), [File("token", b"3", 0o644), File("c", b"4", 0o644)])
    assert tree(tmp_path) == {"token": b"3", "c": b"4"}
    assert opened.read() == b"1"  # who has the old one open keeps it
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("..")]) == 2  # ..data, and where it points


def test_leftovers_of_a_killed_write_go(tmp_path: Path) -> None:
    (tmp_path / "..0123").mkdir()
    (tmp_path / "..0123" / "x").write_bytes(b"old")
    publish(str(tmp_path), [File("x", b"new", 0o644)])
    assert tree(tmp_path) == {"x": b"new"} and not (tmp_path / "..0123").exists()


def test_paths_that_collide_leave_the_old_files(tmp_path: Path) -> None:
    publish(str(tmp_path), [File("a", b"1", 0o644)])
    with pytest.raises(AgentError):
        publish(str(tmp_path), [File("a", b"2", 0o644), File("a/b", b"3", 0o644)])
    assert tree(tmp_path) == {"a": b"1"}


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../b", "", "..data", "a//b", "./a"])
def test_paths_that_leave_the_volume_are_refused(path: str) -> None:
    request: dict[str, Any] = {"files": [{"path": path, "data": base64.b64encode(b"x").decode()}]}
    with pytest.raises(AgentError):
        parse_files(Fields(request, "volume.write"))


@pytest.mark.root
def test_files_of_a_group_can_be_read_by_it(tmp_path: Path) -> None:
    publish(str(tmp_path), [File("token", b"1", 0o600), File("a/b", b"2", 0o444)], group=4321)
    for name, mode in (("token", 0o640), ("a/b", 0o444)):
        found = (tmp_path / name).stat()
        assert (found.st_gid, found.st_mode & 0o777) == (4321, mode)


def test_a_config_map_of_ten_thousand_keys(tmp_path: Path) -> None:
    given = [{"path": f"k{i}", "data": base64.b64encode(b"x").decode(), "mode": 0o644} for i in range(10_000)]
    publish(str(tmp_path), parse_files(Fields({"files": given}, "volume.write")))
    assert len(list((tmp_path / "..data").iterdir())) == 10_000 and (tmp_path / "k9999").read_bytes() == b"x"
