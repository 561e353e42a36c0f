"""What disks count, in one form whoever serves them."""

from __future__ import annotations

from pathlib import Path

from hypervisor.controller.diskfigures import counted, disk_names, open_disks
from hypervisor.vmm.argv import Disk

FIGURES = {"reads": 3, "writes": 2, "flushes": 1, "read_bytes": 12288, "redirects_out": 2, "errors": 1}
STATS = {"read_requests": 3, "read_latency_sum_ns": 3000, "read_latency_p99_ns": 2048, "write_requests": 1}


def disk(serial: str, path: str | None = "/x") -> Disk:
    return Disk(serial=serial, path=None if path is None else Path(path), read_only=True, fd=20)


def test_names_are_what_people_call_the_disks() -> None:
    disks = [disk("hv-root"), disk("hv-data"), disk("sha-a"), disk("empty-1", None), disk("sha-b")]
    names = disk_names(disks)
    assert [names[s] for s in ("hv-root", "hv-data", "sha-a", "sha-b")] == ["root", "scratch", "image", "image-2"]


def test_requests_of_all_types_and_the_latency_of_the_first_filter_that_measures() -> None:
    row = counted(
        FIGURES, [("throttle", {"held_requests": 1}), ("stats", STATS), ("below", {"read_latency_sum_ns": 9})]
    )
    assert (row["requests"], row["redirects"], row["errors"], row["read_bytes"]) == (6, 2, 1, 12288)
    assert (row["latency_ns"], row["latency_p99_ns"]) == (750, 2048)
    assert row["filters"] == ["throttle", "stats", "below"]
    assert counted(FIGURES, [])["latency_ns"] is None


def test_what_a_device_process_makes_up_counts_as_nothing() -> None:
    assert counted({"reads": "many", "writes": -4, "errors": [1], "redirects_out": True}, [("x", 7)]) == {
        "requests": 0, "read_bytes": 0, "written_bytes": 0, "redirects": 0, "errors": 0,
        "latency_ns": None, "latency_p99_ns": None, "filters": [],
    }  # fmt: skip
    assert counted(None, [])["requests"] == 0


async def test_a_disk_whose_process_has_gone_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/control.sock").touch()
    assert await open_disks(tmp_path) == await open_disks(tmp_path / "none") == []
