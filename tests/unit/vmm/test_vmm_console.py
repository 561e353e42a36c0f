"""Bounded logs: what is kept, what a reader sees across cuts, and that a source is always drained."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.vmx.console import LogFollower, StreamLog, StreamLogs, append_bounded, read_tail

LIMIT = 4096


@pytest.fixture
def log(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    path = tmp_path / "console.log"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    yield path, fd
    os.close(fd)


def test_small_log_is_whole(log: tuple[Path, int]) -> None:
    path, fd = log
    append_bounded(fd, b"one\n", LIMIT)
    append_bounded(fd, b"two\n", LIMIT)
    assert path.read_bytes() == b"one\ntwo\n"


@given(st.lists(st.binary(min_size=1, max_size=3000), max_size=40))
def test_never_above_the_limit_and_the_newest_is_kept(pieces: list[bytes]) -> None:
    fd = os.memfd_create("log")
    try:
        for piece in pieces:
            append_bounded(fd, piece, LIMIT)
            assert os.fstat(fd).st_size <= LIMIT
        stream = b"".join(pieces)
        kept = os.pread(fd, LIMIT, 0)
        header, text = (b"", kept) if len(stream) <= LIMIT and stream == kept else kept.split(b"\n", 1)
        assert stream.endswith(text)
        assert len(text) >= min(len(stream), LIMIT // 2)
        if header:
            assert header == b"[... %d earlier bytes dropped]" % (len(stream) - len(text))
    finally:
        os.close(fd)


def test_a_piece_larger_than_the_log(log: tuple[Path, int]) -> None:
    path, fd = log
    append_bounded(fd, b"x" * 100_000 + b"end", LIMIT)
    assert path.stat().st_size <= LIMIT
    assert read_tail(path, 3) == b"end"


def test_follower_across_cuts(log: tuple[Path, int]) -> None:
    path, fd = log
    follower = LogFollower(path)
    seen = b""
    stream = b"".join(b"line %d\n" % i for i in range(5000))
    for start in range(0, len(stream), 700):
        append_bounded(fd, stream[start : start + 700], LIMIT)
        seen += follower.read_new()
    assert seen == stream
    assert follower.read_new() == b""


def test_follower_skips_what_was_cut_unread(log: tuple[Path, int]) -> None:
    path, fd = log
    append_bounded(fd, b"first\n", LIMIT)
    follower = LogFollower(path)
    assert follower.read_new() == b"first\n"
    append_bounded(fd, b"x" * 9000 + b"last\n", LIMIT)
    assert follower.read_new().endswith(b"xlast\n")


def test_follower_begins_with_the_last_lines(log: tuple[Path, int]) -> None:
    path, fd = log
    append_bounded(fd, b"a\nb\nc\n", LIMIT)
    assert LogFollower(path, lines=2).read_new() == b"b\nc\n"
    assert LogFollower(path, lines=0).read_new() == b""


def test_no_log_yet(tmp_path: Path) -> None:
    assert read_tail(tmp_path / "x") == b""
    assert LogFollower(tmp_path / "x").read_new() == b""


def test_streams_are_drained_to_their_ends(tmp_path: Path) -> None:
    console, console_out = socket.socketpair()
    stderr_out, stderr = os.pipe()
    logs = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("console", "stderr")]
    streams = StreamLogs([
        StreamLog(console_out.detach(), logs[0], LIMIT), StreamLog(stderr_out, logs[1], LIMIT),
    ])  # fmt: skip
    streams.start()
    console.sendall(b"y" * 1_000_000 + b"booted\n")  # would block if nobody read
    os.write(stderr, b"warning\n")
    os.close(stderr)
    assert not streams.done.is_set()
    console.close()
    assert streams.join(10)
    assert streams.done.is_set()
    assert read_tail(tmp_path / "console", lines=1).endswith(b"booted\n")
    assert (tmp_path / "stderr").read_bytes() == b"warning\n"


def test_a_full_disk_does_not_stop_the_draining(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    source, sink = socket.socketpair()
    streams = StreamLogs([StreamLog(sink.detach(), os.open("/dev/full", os.O_RDWR), LIMIT)])
    streams.start()
    source.sendall(b"z" * 2_000_000)
    source.close()
    assert streams.join(10)
