"""Addresses and what is found on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypervisor.errors import InvalidInput
from hypervisor.vsock.address import (
    MAX_PORT,
    KernelVsock,
    UnixVsock,
    check_path,
    check_port,
    kernel_vsock_available,
)


def test_addresses_say_what_they_are() -> None:
    assert str(UnixVsock(Path("/run/vm/vsock.sock"))) == "unix:/run/vm/vsock.sock"
    assert str(KernelVsock(42)) == "vsock:42"
    assert UnixVsock(Path("/run/vm/vsock.sock")).listen_path(1024) == Path("/run/vm/vsock.sock_1024")


@pytest.mark.parametrize("port", [0, 1, 1024, MAX_PORT])
def test_good_ports(port: int) -> None:
    assert check_port(port) == port


@pytest.mark.parametrize("port", [-1, MAX_PORT + 1, 2**40])
def test_bad_ports_are_named(port: int) -> None:
    with pytest.raises(InvalidInput, match=str(port)):
        check_port(port)


def test_a_path_too_long_for_a_unix_socket_is_refused() -> None:
    assert check_path(Path("/" + "x" * 106)) == "/" + "x" * 106
    with pytest.raises(InvalidInput, match="shorter state directory"):
        check_path(Path("/" + "x" * 107))
    with pytest.raises(InvalidInput):
        check_path(Path("/" + "ü" * 60))  # 121 bytes


def test_a_missing_device_is_found_missing_with_its_fix(tmp_path: Path) -> None:
    finding = kernel_vsock_available(tmp_path / "vhost-vsock")
    assert not finding.ok
    assert not finding.needed
    assert "No such file" in finding.found
    assert "modprobe vhost_vsock" in finding.fix


def test_a_device_that_opens_is_found(tmp_path: Path) -> None:
    device = tmp_path / "vhost-vsock"
    device.touch()
    assert kernel_vsock_available(device).ok
