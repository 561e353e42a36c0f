"""Blobs, decompression and the worker's protocol, in this process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from imagekit import COMPRESSORS, IMAGE_ID, LayerTar, sha256, zstd

from hypervisor.errors import HostUnfit, HvError, InvalidInput, ResourceExhausted
from hypervisor.images import worker
from hypervisor.images import zstd as zstd_reader
from hypervisor.images.blobs import Blob, Budget, ByteStream, decoded, is_compressed
from hypervisor.images.build import BuildJob, ExpandJob, Layer, run
from hypervisor.images.model import Limits, no_progress

DATA = os.urandom(3 << 20) + bytes(1 << 20)


def blob(folder: Path, data: bytes, digest: str | None = None) -> Blob:
    (folder / "blob").write_bytes(b"before" + data + b"after")
    return Blob(folder / "blob", 6, len(data), digest)


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_what_was_compressed_comes_back(tmp_path: Path, compression: str) -> None:
    packed = COMPRESSORS[compression](DATA)
    assert b"".join(decoded(blob(tmp_path, packed, sha256(packed)), Budget(Limits()))) == DATA
    assert is_compressed(packed[:8]) is bool(compression)


@pytest.mark.parametrize("compression", ["+gzip", "+zstd"])
def test_every_cut_is_noticed(tmp_path: Path, compression: str) -> None:
    packed = COMPRESSORS[compression](os.urandom(300_000) + bytes(300_000))
    for size in (5, 20, 1000, 200_000, len(packed) - 1):
        with pytest.raises(InvalidInput, match="cut short"):
            b"".join(decoded(blob(tmp_path, packed[:size]), Budget(Limits())))


def test_zstd_frames_may_follow_one_another(tmp_path: Path) -> None:
    packed = zstd(DATA[:100]) + zstd(b"") + zstd(DATA[100:])
    assert b"".join(decoded(blob(tmp_path, packed), Budget(Limits()))) == DATA


def test_damaged_zstd(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="the zstd data is damaged"):
        b"".join(decoded(blob(tmp_path, zstd(DATA)[:50] + b"x" * 100), Budget(Limits())))


def test_a_host_without_libzstd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise zstd_reader.LibraryMissing("libzstd.so.1")

    monkeypatch.setattr(zstd_reader, "_library", missing)
    with pytest.raises(HostUnfit, match="libzstd1"):
        b"".join(decoded(blob(tmp_path, zstd(b"x")), Budget(Limits())))


def test_blobs_are_verified(tmp_path: Path) -> None:
    assert blob(tmp_path, DATA, sha256(DATA)).read(len(DATA)) == DATA
    with pytest.raises(InvalidInput, match="blob sha256:000000000000 is damaged: its content has digest"):
        blob(tmp_path, DATA, "0" * 64).read(len(DATA))
    with pytest.raises(InvalidInput, match="is cut short"):
        Blob(tmp_path / "blob", 6, len(DATA) * 2).read(len(DATA) * 2)
    with pytest.raises(InvalidInput, match="a document may have 10"):
        blob(tmp_path, DATA).read(10)


def test_budgets() -> None:
    budget = Budget(Limits(image_bytes=1000, bomb_grace=100, bomb_ratio=10, entries=2))
    budget.stored(20)
    budget.decoded(200)
    with pytest.raises(ResourceExhausted, match="20 compressed bytes swell to more than 201 B"):
        budget.decoded(1)
    with pytest.raises(ResourceExhausted, match="hold more than 1000 B"):
        budget.decoded(900)
    budget.entry()
    budget.entry()
    with pytest.raises(ResourceExhausted, match="more than 2 entries"):
        budget.entry()


def pieces() -> Iterator[bytes]:
    yield b"abc"
    yield b"defgh"


def test_exact_reads() -> None:
    stream = ByteStream(pieces(), "it")
    assert (stream.read(2), stream.read(4), stream.read_some(99), stream.read_if_any(3)) == (b"ab", b"cdef", b"gh", b"")
    assert stream.drain() == sha256(b"abcdefgh")
    with pytest.raises(InvalidInput, match="it is cut short at 8 bytes"):
        ByteStream(pieces(), "it").read(9)
    stream = ByteStream(pieces(), "it")
    stream.skip(5)
    assert stream.read(3) == b"fgh"
    assert ByteStream(pieces(), "it").drain() == sha256(b"abcdefgh")


# ---- jobs ------------------------------------------------------------------------------------------------------------


def a_build(folder: Path) -> BuildJob:
    tar = LayerTar().file("f", "x").bytes()
    return BuildJob(IMAGE_ID, (Layer(blob(folder, tar, sha256(tar)), sha256(tar)),), folder / "out", Limits(entries=7))


def test_jobs_travel(tmp_path: Path) -> None:
    expand = ExpandJob(Blob(tmp_path / "a", 1, 2), tmp_path / "b", Limits())
    for job in (a_build(tmp_path), expand):
        assert worker.decode(worker.encode(job)) == job


def test_expanding(tmp_path: Path) -> None:
    run(ExpandJob(blob(tmp_path, zstd(DATA)), tmp_path / "out", Limits()), no_progress)
    assert (tmp_path / "out").read_bytes() == DATA
    with pytest.raises(HvError, match="cannot write the image"):
        run(ExpandJob(blob(tmp_path, zstd(DATA)), tmp_path / "out", Limits()), no_progress)


def test_a_blob_that_went_away(tmp_path: Path) -> None:
    job = a_build(tmp_path)
    (tmp_path / "blob").unlink()
    with pytest.raises(HvError, match=r"cannot read .*blob: No such file"):
        run(job, no_progress)


def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: bytes) -> tuple[int, list[object]]:
    """Run the worker's main in this process."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    monkeypatch.setattr(worker, "_die_with_parent", lambda: None)
    status = worker.main()
    return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_workers_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = worker.encode(a_build(tmp_path))
    status, said = say(monkeypatch, capsys, job)
    assert (status, said[-1]) == (0, {"done": True})
    assert all("progress" in line for line in said[:-1])  # type: ignore[operator]
    status, said = say(monkeypatch, capsys, job)
    assert status == 1
    assert said[-1]["error"]["kind"] == "Unavailable"  # type: ignore[index]
    status, said = say(monkeypatch, capsys, b"{}")
    assert (status, said) == (
        1,
        [{"error": {"kind": "HvError", "message": "building the image failed: KeyError: 'output'"}}],
    )

    def hungry(*_arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(worker, "run", hungry)
    assert say(monkeypatch, capsys, job)[1][-1]["error"]["kind"] == "ResourceExhausted"  # type: ignore[index]


def test_importing_the_worker_is_cheap() -> None:
    """It starts for every image; asyncio and the store are not its business."""
    program = (
        "import sys, hypervisor.images.worker as worker\n"
        "print('asyncio' in sys.modules, worker.__package__ + '.store' in sys.modules)"
    )
    root = Path(worker.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
