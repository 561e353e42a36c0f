"""The disks of a vmx: made, filled, counted, closed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound
from hypervisor.iofilter.loop import create_state
from hypervisor.iofilter.spec import FilterSpec
from hypervisor.vmx.block import BlockDevices
from hypervisor.vmx.config import BlockConfig

SIZE = 1 << 20


def image(folder: Path, name: str = "disk.raw") -> int:
    path = folder / name
    path.write_bytes(bytes(SIZE))
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


@pytest.fixture
def ends() -> Iterator[list[socket.socket]]:
    """QEMU's ends of connections."""
    made: list[socket.socket] = []
    yield made
    for end in made:
        end.close()


def front(ends: list[socket.socket]) -> int:
    ours, theirs = socket.socketpair()
    ends.append(ours)
    return theirs.detach()


def test_a_device_with_a_disk_and_one_that_gets_it_later(tmp_path: Path, ends: list[socket.socket]) -> None:
    configs = (
        BlockConfig(serial="first", read_only=False),
        BlockConfig(serial="later", read_only=True, announce_bytes=1 << 50, has_disk=False),
    )
    devices = BlockDevices(configs, [(front(ends), image(tmp_path)), (front(ends), None)])
    try:
        stats = devices.stats()
        assert stats["first"]["connected"] == stats["later"]["connected"] == 1
        assert stats["first"]["reads"] == 0
        assert "reads" not in stats["later"]
        devices.insert("later", image(tmp_path, "later.raw"))
        assert devices.stats()["later"]["reads"] == 0
        with pytest.raises(Conflict):
            devices.insert("later", image(tmp_path, "again.raw"))
        with pytest.raises(NotFound, match="no disk nobody"):
            devices.insert("nobody", image(tmp_path, "nobody.raw"))
    finally:
        devices.close()


def test_a_front_end_that_talks_nonsense_is_named(tmp_path: Path, ends: list[socket.socket]) -> None:
    devices = BlockDevices([BlockConfig(serial="disk", read_only=False)], [(front(ends), image(tmp_path))])
    try:
        ends[0].sendall(b"\xff" * 12)
        ends[0].settimeout(10)
        assert ends[0].recv(1) == b""
        assert devices.stats()["disk"]["fault"] == "vhost-user: bad version or flags"
    finally:
        devices.close()


@pytest.mark.parametrize("serials", [("same", "same"), ("a" * 21,)])
def test_serials_are_short_and_unlike_each_other(ends: list[socket.socket], serials: tuple[str, ...]) -> None:
    configs = [BlockConfig(serial=serial, read_only=True, has_disk=False) for serial in serials]
    with pytest.raises(InvalidInput):
        BlockDevices(configs, [(front(ends), None) for _ in serials])


def test_too_many_queues_are_refused(ends: list[socket.socket]) -> None:
    with pytest.raises(HvError):
        BlockDevices([BlockConfig(serial="disk", read_only=True, queues=17)], [(front(ends), None)])


def test_a_chain_is_put_together_and_changed_by_one_filter_at_a_time(tmp_path: Path, ends: list[socket.socket]) -> None:
    stats, slow = FilterSpec("stats", "stats"), FilterSpec("delay", "slow", (("us", "1"),))
    config = BlockConfig(serial="disk", read_only=False, filters=(stats,))
    devices = BlockDevices([config], [(front(ends), image(tmp_path))], folder=tmp_path)

    def names() -> list[str]:
        return [found["name"] for found in devices.stats()["disk"]["filters"]]

    try:
        assert names() == ["stats"]
        assert devices.change("disk", (slow, stats)) >= 0
        assert names() == ["slow", "stats"]
        assert devices.change("disk", (slow, stats)) == 0.0  # asked again
        slower = FilterSpec("delay", "slow", (("us", "2"),))
        devices.change("disk", (slower, stats))
        with pytest.raises(InvalidInput, match="us=x"):
            devices.change("disk", (FilterSpec("delay", "slow", (("us", "x"),)), stats))
        for wrong in ((stats, slower), (FilterSpec("null", "null"),), (FilterSpec("null", "slow"), stats)):
            with pytest.raises(InvalidInput):
                devices.change("disk", wrong)
        devices.change("disk", (slower,))
        assert names() == ["slow"]
        with pytest.raises(NotFound):
            devices.change("nobody", ())
    finally:
        devices.close()


def test_a_clone_reads_from_its_base(tmp_path: Path, ends: list[socket.socket]) -> None:
    state = (("base", "disk:base"), ("state", "./clone.state"))
    clone = FilterSpec("linkedclone", "linkedclone", state)
    create_state("linkedclone", clone.resolved(tmp_path), SIZE)
    config = BlockConfig(serial="disk", read_only=False, filters=(clone,), base="base")
    devices = BlockDevices([config], [(front(ends), image(tmp_path))], [image(tmp_path, "base.raw")], folder=tmp_path)
    try:
        assert devices.stats()["disk"]["base"]["reads"] == 0
    finally:
        devices.close()


def test_a_filter_that_cannot_be_made_leaves_nothing(tmp_path: Path, ends: list[socket.socket]) -> None:
    config = BlockConfig(serial="disk", read_only=False, filters=(FilterSpec("throttle", "throttle"),))
    with pytest.raises(InvalidInput, match="neither iops nor bytes"):
        BlockDevices([config], [(front(ends), image(tmp_path))])
