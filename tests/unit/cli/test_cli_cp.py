"""hv cp: placement of files both ways, and hostile archives."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hostd_standin import Hv, StandIn

from hypervisor.cli.cp import Layout, split_argument
from hypervisor.cli.untar import Unpacker, stays_inside
from hypervisor.errors import HvError, InvalidInput, ProtocolError


def tree(root: Path) -> dict[str, Any]:
    """Files with their text, links with ``-> target``, folders with None."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = None if path.is_dir() else path.read_text()
    return found


@pytest.fixture
def remote(host: StandIn) -> Path:
    (host.files / "dir/sub").mkdir(parents=True)
    (host.files / "dir/a").write_text("A")
    (host.files / "dir/sub/b").write_text("B")
    (host.files / "dir/link").symlink_to("sub/b")
    (host.files / "alias").symlink_to("dir")
    return host.files


DIR = {"a": "A", "link": "-> sub/b", "sub": None, "sub/b": "B"}


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        ("hello:/dir/a", "there", {"there/a": "A"}),
        ("hello:/dir/a", "there/new", {"there/new": "A"}),
        ("hello:dir/a", "there/old", {"there/old": "A"}),
        ("hello:/dir", "there", {"there/dir": None, **{f"there/dir/{k}": v for k, v in DIR.items()}}),
        ("hello:/dir", "there/new", {"there/new": None, **{f"there/new/{k}": v for k, v in DIR.items()}}),
        ("hello:/dir", "there/new/", {"there/new": None, **{f"there/new/{k}": v for k, v in DIR.items()}}),
        ("hello:/dir/.", "there", {f"there/{k}": v for k, v in DIR.items()}),
        ("hello:/dir/.", "fresh", {"fresh": None, **{f"fresh/{k}": v for k, v in DIR.items()}}),
    ],
)
def test_out_of_a_container(
    hv: Hv, remote: Path, tmp_path: Path, source: str, destination: str, expected: dict[str, Any]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/old").write_text("old")
    done = hv("cp", source, destination)
    assert (done.stderr, done.returncode) == ("", 0)
    before = {"there": None, "there/old": "old"}
    assert {k: v for k, v in tree(tmp_path).items() if k.startswith(("there", "fresh"))} == before | expected


@pytest.mark.parametrize(
    ("source", "destination", "message"),
    [
        ("hello:/nothere", ".", "no such file"),
        ("hello:/dir", "old", "dir is a folder, and the destination is there for a file"),
        ("hello:/dir/a", "new/", "there is no folder new/ to copy a into; make it first"),
        ("hello:/dir/a/.", "new", "a is no folder"),
        ("hello:/dir/a", "no/such/place", "there is no folder no/such"),
        ("hello:/dir", "old/x", "there is no folder old"),
    ],
)
def test_out_of_a_container_refused(
    hv: Hv, remote: Path, tmp_path: Path, source: str, destination: str, message: str
) -> None:
    (tmp_path / "old").write_text("old")
    done = hv("cp", source, destination)
    assert done.returncode == 1
    assert message in done.stderr
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        ("file", "hello:/dir", {"dir/file": "F"}),
        ("file", "hello:/dir/new", {"dir/new": "F"}),
        ("file", "hello:/dir/a", {"dir/a": "F"}),
        ("file", "hello:/alias", {"dir/file": "F"}),
        ("file", "hello:/", {"file": "F"}),
        ("tree", "hello:/dir", {"dir/tree": None, "dir/tree/x": "X", "dir/tree/l": "-> x"}),
        ("tree", "hello:/new", {"new": None, "new/x": "X", "new/l": "-> x"}),
        ("tree/.", "hello:/dir", {"dir/x": "X", "dir/l": "-> x"}),
        ("tree/.", "hello:/new", {"new": None, "new/x": "X", "new/l": "-> x"}),
    ],
)
def test_into_a_container(
    hv: Hv, remote: Path, tmp_path: Path, source: str, destination: str, expected: dict[str, Any]
) -> None:
    (tmp_path / "file").write_text("F")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/x").write_text("X")
    (tmp_path / "tree/l").symlink_to("x")
    before = tree(remote)
    done = hv("cp", source, destination)
    assert (done.stderr, done.returncode) == ("", 0)
    assert tree(remote) == before | expected


@pytest.mark.parametrize(
    ("source", "destination", "message"),
    [
        ("nothere", "hello:/", "cannot read nothere: No such file"),
        ("tree", "hello:/dir/a", "a folder cannot be copied over it"),
        ("file", "hello:/nothere/", "there is no folder /nothere/"),
        ("file", "hello:/no/such/place", "no such directory"),
    ],
)
def test_into_a_container_refused(
    hv: Hv, remote: Path, tmp_path: Path, source: str, destination: str, message: str
) -> None:
    (tmp_path / "file").write_text("F")
    (tmp_path / "tree").mkdir()
    before = tree(remote)
    done = hv("cp", source, destination)
    assert done.returncode == 1
    assert message in done.stderr
    assert tree(remote) == before


@pytest.mark.parametrize("args", [("a", "b"), ("hello:/a", "hello:/b"), ("hello:/a",)])
def test_wrong_usage(hv: Hv, args: tuple[str, ...]) -> None:
    assert hv("cp", *args).returncode == 2


def test_tar_streams(hv: Hv, remote: Path) -> None:
    out = hv("cp", "hello:/dir", "-", text=False)
    with tarfile.open(fileobj=io.BytesIO(out.stdout)) as archive:
        assert sorted(archive.getnames()) == ["dir", "dir/a", "dir/link", "dir/sub", "dir/sub/b"]
    (remote / "copy").mkdir()
    assert hv("cp", "-", "hello:/copy", input=out.stdout, text=False).returncode == 0
    assert tree(remote / "copy/dir") == DIR


def test_special_files_stay_behind(hv: Hv, remote: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    os.mkfifo(tmp_path / "tree/pipe")
    done = hv("cp", "tree", "hello:/new")
    assert (done.stderr, done.returncode) == ("hv: skipped new/pipe: neither file, folder nor link\n", 0)


def test_owner_and_modes(hv: Hv, remote: Path, tmp_path: Path) -> None:
    (remote / "dir/a").chmod(0o6777)
    (remote / "dir").chmod(0o555)
    assert hv("cp", "hello:/dir", "out").returncode == 0
    assert stat.S_IMODE((tmp_path / "out/a").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    assert (tmp_path / "out").stat().st_mtime == (remote / "dir").stat().st_mtime


def test_only_a_link_that_leads_away(hv: Hv, remote: Path, tmp_path: Path) -> None:
    (remote / "away").symlink_to("/etc/passwd")
    done = hv("cp", "hello:/away", "x")
    assert done.returncode == 1
    assert "nothing of /away could be copied" in done.stderr
    assert not (tmp_path / "x").is_symlink()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pod:/a", ("pod", "/a")),
        ("ns/pod:a/b", ("ns/pod", "/a/b")),
        ("pod:", ("pod", "/")),
        ("./a:b", (None, "./a:b")),
        ("/a:b", (None, "/a:b")),
        ("a", (None, "a")),
        ("-", (None, "-")),
    ],
)
def test_arguments(text: str, expected: tuple[str | None, str]) -> None:
    assert split_argument(text) == expected


# ---- hostile archives ------------------------------------------------------------------------------------------------


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"x", link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o777
    info.size = len(data) if kind == tarfile.REGTYPE else 0
    return info, data


def archive_of(*members: Member) -> io.BytesIO:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    data.seek(0)
    return data


def unpack(folder: Path, *members: Member) -> list[str]:
    warnings: list[str] = []
    with Unpacker(str(folder), lambda parts, _is_folder: parts, warnings.append) as unpacker:
        unpacker.unpack(archive_of(*members))
    return warnings


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("untouched")
    return folder


@pytest.mark.parametrize(
    "members",
    [
        [member("../outside/file")],
        [member("a/../../outside/file")],
        [member("a", tarfile.LNKTYPE, link="../outside/file")],
        [member("a", tarfile.LNKTYPE, link="nothere")],
        [member("d/"[:-1], tarfile.DIRTYPE), member("a", tarfile.LNKTYPE, link="d")],
        [member("a"), member("a/b")],
        [member("d", tarfile.DIRTYPE), member("d")],
    ],
)
def test_refused(inside: Path, members: list[Any]) -> None:
    with pytest.raises(InvalidInput):
        unpack(inside, *members)
    assert tree(inside.parent / "outside") == {"file": "untouched"}


@pytest.mark.parametrize("target", ["../outside", "/etc", "..", "sub/../..", "../../x"])
def test_links_that_lead_away_are_skipped(inside: Path, target: str) -> None:
    warnings = unpack(inside, member("link", tarfile.SYMTYPE, link=target), member("plain"))
    assert tree(inside) == {"plain": "x"}
    assert warnings == [f"skipped link: a symbolic link to {target}, which may lead out of the copy"]


def test_nothing_is_written_through_a_link_of_the_archive(inside: Path) -> None:
    """Links come last: at the file's turn there is no link yet, at the link's turn a folder is in its way."""
    with pytest.raises(InvalidInput):
        unpack(inside, member("link", tarfile.SYMTYPE, link="sub"), member("link/file"))


def test_nothing_is_written_through_a_link_that_lies_there(inside: Path) -> None:
    (inside / "link").symlink_to(inside.parent / "outside")
    with pytest.raises(InvalidInput, match="in the way"):
        unpack(inside, member("link/file"))
    assert tree(inside.parent / "outside") == {"file": "untouched"}


def test_a_link_that_lies_there_is_replaced_not_followed(inside: Path) -> None:
    (inside / "link").symlink_to(inside.parent / "outside/file")
    unpack(inside, member("link", data=b"new"))
    assert tree(inside) == {"link": "new"}
    assert tree(inside.parent / "outside") == {"file": "untouched"}


def test_devices_are_skipped(inside: Path) -> None:
    assert unpack(inside, member("dev", tarfile.CHRTYPE), member("pipe", tarfile.FIFOTYPE)) == [
        "skipped dev: neither file, folder nor link",
        "skipped pipe: neither file, folder nor link",
    ]
    assert tree(inside) == {}


def test_holes_take_no_room_here(inside: Path) -> None:
    """A container's file of terabytes that holds nothing must not fill the disk of who copies it."""
    unpack(inside, member("d/sparse", data=b"begin" + bytes(64 << 20)), member("zeros", data=bytes(1 << 20)))
    sparse = (inside / "d/sparse").stat()
    assert sparse.st_size == 5 + (64 << 20)
    assert sparse.st_blocks * 512 < 4 << 20
    assert (inside / "d/sparse").read_bytes()[:8] == b"begin\0\0\0"
    assert (inside / "zeros").stat().st_size == 1 << 20


def test_links_within(inside: Path) -> None:
    unpack(
        inside, member("d/f"), member("d/hard", tarfile.LNKTYPE, link="d/f"), member("s", tarfile.SYMTYPE, link="d/f")
    )
    assert tree(inside) == {"d": None, "d/f": "x", "d/hard": "x", "s": "-> d/f"}
    assert (inside / "d/f").stat().st_ino == (inside / "d/hard").stat().st_ino


@pytest.mark.parametrize("cut", [100, 600, 1000])
def test_broken_off(inside: Path, cut: int) -> None:
    data = archive_of(member("a", data=bytes(5000))).getvalue()[:cut]
    with (
        pytest.raises(ProtocolError, match="broke off"),
        Unpacker(str(inside), lambda p, _d: p, print) as unpacker,
    ):
        unpacker.unpack(io.BytesIO(data))


@pytest.mark.parametrize(
    ("where", "target", "expected"),
    [
        ("a", "b", True),
        ("d/a", "../b", True),
        ("d/a", "../../b", False),
        ("a", "x/../../b", False),
        ("d/e/a", "../x/../y", False),
        ("a", "", True),
        ("a", ".", True),
    ],
)
def test_stays_inside(where: str, target: str, expected: bool) -> None:
    assert stays_inside(tuple(where.split("/")), target) is expected


def test_entries_that_were_not_asked_for(inside: Path) -> None:
    with pytest.raises(HvError, match="as a part of"):
        Layout.of(str(inside), "wanted", contents=False).place(("other", "x"), False)
