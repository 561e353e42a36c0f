"""The C device through its Python face. What it does for a guest is tested in tests/c/vsock and with real ones."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest

from hypervisor.errors import InvalidInput, ProtocolError, Unavailable
from hypervisor.vsock.backend import VhostUserVsock, VsockLimits, bind_listener

GET_QUEUE_NUM, UNKNOWN = 17, 63


def make(folder: Path, *, frontend: socket.socket | None = None, cid: int = 42, once: bool = True) -> VhostUserVsock:
    return VhostUserVsock(
        frontend=frontend or bind_listener(folder / "f"),
        host=bind_listener(folder / "v"),
        uds_path=str(folder / "v"),
        guest_cid=cid,
        limits=VsockLimits(request_timeout_ms=50),
        exit_on_disconnect=once,
    )


def ask(sock: socket.socket, request: int) -> bytes:
    sock.sendall(struct.pack("=III", request, 1, 0))
    return sock.recv(100)


def test_runs_in_a_thread_answers_and_stops(short_path: Path) -> None:
    with make(short_path, once=False) as device:
        for _ in range(2):  # one front end after the other
            with socket.socket(socket.AF_UNIX) as frontend:
                frontend.connect(str(short_path / "f"))
                assert struct.unpack("=IIIQ", ask(frontend, GET_QUEUE_NUM)) == (GET_QUEUE_NUM, 5, 8, 3)
                assert device.stats()["frontend_connected"] == 1
        assert device.running
        assert device.fault == ""
        # A program that asks while there is no guest gets the end of the stream when its time is up.
        with socket.socket(socket.AF_UNIX) as program:
            program.connect(str(short_path / "v"))
            program.sendall(b"CONNECT 1\n")
            assert program.recv(100) == b""
        assert device.stats()["refused"] == 1
    assert not device.running
    with pytest.raises(Unavailable):
        device.stats()
    device.close()
    device.stop()


def test_a_front_end_that_is_connected_already(short_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, make(short_path, frontend=theirs) as device:
        assert len(ask(ours, GET_QUEUE_NUM)) == 20
        ours.close()
        assert device.wait(5)


def test_a_front_end_that_breaks_the_protocol(short_path: Path) -> None:
    ours, theirs = socket.socketpair()
    device = make(short_path, frontend=theirs)
    with ours:
        ours.sendall(struct.pack("=III", UNKNOWN, 1, 0))
        with pytest.raises(ProtocolError, match="request that is not supported"):
            device.run()
        assert ours.recv(1) == b""
    assert device.stats()["frontend_faults"] == 1
    device.close()


def test_stopped_before_it_runs(short_path: Path) -> None:
    device = make(short_path)
    device.stop()
    device.run()
    device.close()


@pytest.mark.parametrize("cid", [0, 1, 2, 2**32 - 1])
def test_reserved_cids_are_refused(short_path: Path, cid: int) -> None:
    with pytest.raises(InvalidInput, match=str(cid)):
        make(short_path, cid=cid)


def test_a_listener_that_cannot_be_made(short_path: Path) -> None:
    with pytest.raises(Unavailable, match="no/such"):
        bind_listener(short_path / "no/such")
