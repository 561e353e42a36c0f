"""The disks of a vmx: made, filled, counted, closed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound
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
