"""Archives: what goes in comes out, and nothing leads out. Run in a child with a root of its own, as the agent does."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hypervisor.agent import archive, tarstream
from hypervisor.agent.errors import AgentError

pytestmark = pytest.mark.root


def in_child(work: Callable[[int], None], root: Path | None, feed: bytes | None = None) -> tuple[bytes, str]:
    """Runs `work` as the agent's child does; gives its stream and its complaint."""
    entrance = archive._EndedRoot(str(root)) if root else archive.Entrance()
    stream_in, stream_out = os.pipe()
    errors_in, errors_out = os.pipe()
    theirs, ours = (stream_in, stream_out) if feed is not None else (stream_out, stream_in)
    pid = os.fork()
    if pid == 0:
        os._exit(archive._run_child(theirs, errors_out, entrance, work))
    os.close(theirs)
    os.close(errors_out)
    out = b""
    if feed is not None:
        writer = threading.Thread(target=_feed, args=(ours, feed))
        writer.start()
        writer.join(60)
    else:
        with os.fdopen(ours, "rb") as f:
            out = f.read()
    with os.fdopen(errors_in, "rb") as f:
        complaint = f.read().decode()
    _, status = os.waitpid(pid, 0)
    assert bool(status) == bool(complaint), (status, complaint)
    return out, complaint


def _feed(fd: int, data: bytes) -> None:
    try:
        with os.fdopen(fd, "wb", buffering=0) as f:
            for i in range(0, len(data), 65536):
                f.write(data[i : i + 65536])
    except BrokenPipeError:
        pass


def pack(root: Path, path: str) -> tuple[bytes, str]:
    return in_child(lambda fd: tarstream.pack_path(path, fd), root)


def unpack(root: Path, path: str, data: bytes) -> str:
    return in_child(lambda fd: tarstream.unpack_into(path, fd), root, data)[1]


def members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {m.name: m for m in tar}


def archive_of(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in entries:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def entry(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tree = tmp_path / "root"
    (tree / "dir/sub").mkdir(parents=True)
    (tree / "dir/file").write_bytes(b"content")
    os.link(tree / "dir/file", tree / "dir/hard")
    (tree / "dir/link").symlink_to("/etc/passwd")
    os.mkfifo(tree / "dir/fifo")
    (tree / "dir/su").write_bytes(b"")
    os.chown(tree / "dir/su", 1234, 99)
    (tree / "dir/su").chmod(0o4755)
    with (tree / "dir/sparse").open("wb") as f:
        f.truncate(64 << 20)
        f.seek(32 << 20)
        f.write(b"middle")
    os.setxattr(tree / "dir/file", "user.note", b"\xff\x00binary")
    (tree / "dir/sub").chmod(0o1777)
    return tree


def test_a_tree_goes_out_and_comes_in_as_it_was(root: Path) -> None:
    data, complaint = pack(root, "/dir")
    assert complaint == ""
    (root / "copy").mkdir()
    assert unpack(root, "/copy", data) == ""
    copy = root / "copy/dir"
    assert {p.name for p in copy.iterdir()} == {p.name for p in (root / "dir").iterdir()}
    assert (copy / "file").read_bytes() == b"content"
    assert (copy / "file").stat().st_ino == (copy / "hard").stat().st_ino
    assert (copy / "link").readlink() == Path("/etc/passwd")
    assert stat.S_ISFIFO((copy / "fifo").stat().st_mode)
    su = (copy / "su").stat()
    assert (su.st_uid, su.st_gid, stat.S_IMODE(su.st_mode)) == (1234, 99, 0o4755)
    assert os.getxattr(copy / "file", "user.note") == b"\xff\x00binary"
    assert stat.S_IMODE((copy / "sub").stat().st_mode) == 0o1777
    sparse = (copy / "sparse").stat()
    assert sparse.st_size == 64 << 20 and sparse.st_blocks * 512 < 1 << 20
    assert (copy / "file").stat().st_mtime == pytest.approx((root / "dir/file").stat().st_mtime, abs=1e-6)


@pytest.mark.parametrize(
    ("path", "names"),
    [("/dir/file", {"file"}), ("/dir/sub/", {"sub"}), ("/dir/sub/.", {"."}), ("/dir/link", {"link"})],
)
def test_names_are_relative_to_the_parent(root: Path, path: str, names: set[str]) -> None:
    data, _ = pack(root, path)
    assert set(members(data)) == names


@pytest.mark.parametrize("path", ["/proc/version", "/sys/kernel/mm/transparent_hugepage/enabled"])
def test_files_whose_size_the_kernel_makes_up_arrive_whole(path: str) -> None:
    if not Path(path).exists():
        pytest.skip(f"this kernel has no {path}")
    data, complaint = in_child(lambda fd: tarstream.pack_path(path, fd), None)
    assert complaint == ""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        content = tar.extractfile(Path(path).name)
        assert content is not None and content.read() == Path(path).read_bytes() != b""


def test_a_kernel_file_that_cannot_be_read_is_refused_by_name() -> None:
    _, complaint = in_child(lambda fd: tarstream.pack_path("/proc/self/mem", fd), None)
    assert "/proc/self/mem" in complaint


def test_links_lead_nowhere_outside(root: Path) -> None:
    (root / "out").symlink_to("/etc")
    assert "out" in members(pack(root, "/out")[0])
    _, complaint = pack(root, "/out/passwd")
    assert complaint.startswith("NotFound")
    (root / "etc").mkdir()
    assert unpack(root, "/out", archive_of(entry("new", b"x"))) == ""
    assert (root / "etc/new").read_bytes() == b"x"
    assert not Path("/etc/new").exists()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (archive_of(entry("../up")), "leads out of the directory"),
        (archive_of(entry("a/../../b")), "leads out of the directory"),
        (archive_of(entry("h", type=tarfile.LNKTYPE, linkname="../../etc/passwd")), "leads out of the directory"),
        (b"rubbish" * 500, "not a whole tar stream"),
        (archive_of(entry("big", bytes(100_000)))[:50_000], "not a whole tar stream"),
    ],
)
def test_hostile_and_broken_archives(root: Path, data: bytes, complaint: str) -> None:
    assert complaint in unpack(root, "/dir", data)


def test_absolute_names_are_taken_below_the_directory(root: Path) -> None:
    assert unpack(root, "/dir", archive_of(entry("/etc/x", b"1"))) == ""
    assert (root / "dir/etc/x").read_bytes() == b"1"
    assert stat.S_IMODE((root / "dir/etc").stat().st_mode) == 0o755


def test_files_in_the_way_are_replaced_not_written_through(root: Path) -> None:
    victim = root / "victim"
    victim.write_bytes(b"whole")
    (root / "dir/evil").symlink_to("/victim")
    assert unpack(root, "/dir", archive_of(entry("evil", b"new"))) == ""
    assert victim.read_bytes() == b"whole" and (root / "dir/evil").read_bytes() == b"new"


@pytest.mark.parametrize("path", ["/none", "/dir/file", "/dir/link"])
def test_targets_that_are_no_directories(root: Path, path: str) -> None:
    assert path in unpack(root, path, archive_of(entry("x")))


def test_the_child_can_load_nothing(root: Path) -> None:
    """A module of the container's own must never run in the agent's child."""
    (root / "evil.py").write_text("open('/ran', 'w')")

    def work(_fd: int) -> None:
        import evil  # noqa: F401

    _, complaint = in_child(work, root)
    assert "evil" in complaint and not (root / "ran").exists()


def test_owner_names_are_never_looked_up() -> None:
    assert tarfile.pwd is None and tarfile.grp is None  # type: ignore[attr-defined]


def test_a_file_that_shrinks_while_it_is_read(root: Path) -> None:
    fd = os.open(root / "dir/file", os.O_RDONLY)
    source = tarstream._Exactly(fd, 10)
    assert source.read(8) + source.read(8) + source.read(8) == b"content" + bytes(3)
    os.close(fd)


def test_errors_are_agent_errors() -> None:
    with pytest.raises(AgentError, match="is not a directory"):
        tarstream._check_target("/etc/passwd")
