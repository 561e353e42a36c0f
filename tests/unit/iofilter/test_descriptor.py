"""Metadata of disks: what is refused, and that a refusal says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hypervisor.errors import HvError, InvalidInput, NotFound
from hypervisor.iofilter import descriptor as metadata
from hypervisor.iofilter.descriptor import Data, Descriptor
from hypervisor.iofilter.spec import FilterSpec

SIZE = 1 << 20


def disk(*filters: FilterSpec, **other: Any) -> Descriptor:
    return Descriptor("d", SIZE, Data("file", "data.raw"), filters=filters, **other)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = disk(FilterSpec("stats", "s"), FilterSpec("throttle", "t", (("iops", "5"),)), parent="base", read_only=True)
    metadata.save(tmp_path, saved)
    assert metadata.load(tmp_path) == saved
    assert [path.name for path in tmp_path.iterdir()] == [metadata.FILE]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    metadata.save(tmp_path, disk(FilterSpec("throttle", "t", (("iops", "5"),)), parent="base"))
    path = tmp_path / metadata.FILE
    good, whole = path.read_bytes(), metadata.load(tmp_path)
    for i in range(len(good)):
        for bit in range(8):
            path.write_bytes(good[:i] + bytes([good[i] ^ 1 << bit]) + good[i + 1 :])
            try:
                assert metadata.load(tmp_path) == whole  # a flip in blanks between the fields
            except HvError:
                continue


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    metadata.save(tmp_path, disk())
    path = tmp_path / metadata.FILE
    good = path.read_bytes().rstrip()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(InvalidInput, match=r"damaged|no disk's descriptor"):
            metadata.load(tmp_path)


def test_no_descriptor(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no disk"):
        metadata.load(tmp_path / "x")


def written(folder: Path, value: dict[str, Any], version: int = 1) -> Path:
    whole = {"version": version, "checksum": metadata._checksum(value), "disk": value}
    (folder / metadata.FILE).write_text(json.dumps(whole))
    return folder


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="version 2, this podvisor knows up to 1"):
        metadata.load(written(tmp_path, disk().as_json(), version=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filters": [{"kind": "gone", "name": "g"}]}, "no filter gone.*wrong data"),
        ({"filters": [{"kind": "encrypt", "name": "e"}, {"kind": "throttle", "name": "t"}]}, "cannot come after"),
        ({"filters": [{"kind": "stats", "name": "s"}, {"kind": "trace", "name": "s"}]}, "two filters named s"),
        ({"filters": [{"kind": "stats", "name": "s", "settings": {"a": 1}}]}, "object of texts"),
        ({"size": 4097}, "multiple of 4096"),
        ({"size": 0}, "multiple of 4096"),
        ({"data": {"kind": "tape", "path": "x"}}, "file or nbd"),
        ({"extra": 1}, "unknown field extra"),
    ],
)
def test_bad_content_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        metadata.load(written(tmp_path, disk().as_json() | change))


def test_where_a_filter_goes() -> None:
    chain = disk(FilterSpec("throttle", "t"), FilterSpec("encrypt", "e"))
    assert chain.place_for("throttle") == 1
    assert chain.place_for("encrypt") == 2
    assert chain.place_for("stats") == 0
    assert chain.place_for("linkedclone") == 1


def test_files_of_the_disks_own_folder() -> None:
    spec = FilterSpec("x", "x", (("state", "./x.state"), ("key", "/k"), ("delta", "file:./d"), ("n", "5")))
    assert dict(spec.resolved(Path("/disks/d"))) == {
        "state": "/disks/d/x.state",
        "key": "/k",
        "delta": "file:/disks/d/d",
        "n": "5",
    }
