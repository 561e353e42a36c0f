"""Log files against a model: a list of entries, and what a user would see of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.agent import logs
from hypervisor.agent.logs import Entry, LogWriter, Selection

STREAM = st.sampled_from(logs.STREAMS)
CHUNK = st.one_of(st.binary(max_size=40), st.text("ab\n", max_size=40).map(str.encode), st.just(b"x" * 40_000))
CHUNKS = st.lists(st.tuples(STREAM, CHUNK), max_size=25)
quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write(directory: Path, chunks: list[tuple[bytes, bytes]], **limits: int) -> LogWriter:
    for old in directory.glob("0.log*"):
        old.unlink()
    writer = LogWriter(str(directory), 0, **{"max_bytes": 1 << 30, "max_files": 2, **limits})
    for i, (stream, data) in enumerate(chunks):
        writer.write(stream, data, i * 1_000_000_000)
    writer.close()
    return writer


def entries(directory: Path) -> list[Entry]:
    found = []
    for path in logs.files(str(directory), 0):
        found += [e for line in Path(path).read_bytes().split(b"\n") if (e := logs.parse_entry(line))]
    return found


def read(directory: Path, **wanted: object) -> bytes:
    return b"".join(logs.read_log(str(directory), 0, Selection(**wanted)))  # type: ignore[arg-type]


def model_tail(have: list[Entry], count: int) -> list[Entry]:
    ends = [i for i, e in enumerate(have) if e.final or i == len(have) - 1]
    return have[ends[-count - 1] + 1 :] if len(ends) > count else have


@quick
@given(CHUNKS)
def test_each_stream_is_kept_byte_for_byte(tmp_path: Path, chunks: list[tuple[bytes, bytes]]) -> None:
    write(tmp_path, chunks)
    for stream in logs.STREAMS:
        wanted = b"".join(data for s, data in chunks if s == stream)
        assert b"".join(e.content for e in entries(tmp_path) if e.stream == stream) == wanted
    assert read(tmp_path) == b"".join(e.content for e in entries(tmp_path))
    assert all(len(e.data) <= logs.MAX_ENTRY for e in entries(tmp_path))


@quick
@given(CHUNKS, st.integers(200, 100_000), st.integers(1, 4))
def test_rotation_keeps_the_newest_whole_entries(
    tmp_path: Path, chunks: list[tuple[bytes, bytes]], max_bytes: int, max_files: int
) -> None:
    write(tmp_path, chunks)
    everything = entries(tmp_path)
    write(tmp_path, chunks, max_bytes=max_bytes, max_files=max_files)
    kept = entries(tmp_path)
    assert kept == everything[len(everything) - len(kept) :]
    paths = logs.files(str(tmp_path), 0)
    assert len(paths) <= max_files
    longest = logs.MAX_ENTRY + 64
    assert all(Path(p).stat().st_size <= max(max_bytes, longest) for p in paths)
    if everything:
        assert kept[-1] == everything[-1]


@quick
@given(CHUNKS, st.integers(0, 12), st.integers(200, 5000))
def test_tail(tmp_path: Path, chunks: list[tuple[bytes, bytes]], count: int, max_bytes: int) -> None:
    write(tmp_path, chunks, max_bytes=max_bytes, max_files=9)
    assert read(tmp_path, tail=count) == b"".join(e.content for e in model_tail(entries(tmp_path), count))


@quick
@given(CHUNKS, st.integers(0, 30), st.integers(0, 200))
def test_since_and_limit(tmp_path: Path, chunks: list[tuple[bytes, bytes]], since: int, limit: int) -> None:
    write(tmp_path, chunks)
    stamp = logs.stamp_of(since * 1_000_000_000)
    wanted = b"".join(e.content for e in entries(tmp_path) if e.stamp >= stamp)
    assert read(tmp_path, since_ns=since * 1_000_000_000, limit_bytes=limit) == wanted[:limit]


def test_timestamps_stand_at_line_starts_only(tmp_path: Path) -> None:
    write(tmp_path, [(b"stdout", b"one\ntw"), (b"stdout", b"o\nthree")])
    first, second = b"1970-01-01T00:00:00.000000000Z ", b"1970-01-01T00:00:01.000000000Z "
    assert read(tmp_path, timestamps=True) == first + b"one\n" + first + b"two\n" + second + b"three"


def test_lines_that_are_no_entries_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, [(b"stdout", b"one\n")])
    path = tmp_path / "0.log"
    path.write_bytes(b"torn\n\n2026 stdout F x\n" + path.read_bytes() + b"1970-01-01T00:00:00.00000")
    assert read(tmp_path) == b"one\n"
    assert read(tmp_path, tail=1) == b"one\n"


def test_a_full_disk_is_counted_and_leaves_whole_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LogWriter(str(tmp_path), 0, max_bytes=1 << 20, max_files=2)
    writer.write(b"stdout", b"before\n", 0)
    real = os.write
    answers = [5]  # five bytes, then ENOSPC, as a disk that fills up answers

    def full(fd: int, data: bytes) -> int:
        if answers:
            return real(fd, data[: answers.pop()])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        writer.write(b"stdout", b"lost\n", 1)
    writer.write(b"stdout", b"after\n", 2)
    assert writer.dropped_bytes == 5
    assert writer.error is not None and writer.error.errno == 28
    assert read(tmp_path) == b"before\nafter\n"


def test_attempts_and_no_directory(tmp_path: Path) -> None:
    for name in ("0.log", "2.log", "2.log.1", "10.log", "x.log", "1.txt"):
        (tmp_path / name).touch()
    assert logs.attempts(str(tmp_path)) == [0, 2, 10]
    assert logs.files(str(tmp_path), 2) == [f"{tmp_path}/2.log.1", f"{tmp_path}/2.log"]
    assert logs.attempts(str(tmp_path / "none")) == []
