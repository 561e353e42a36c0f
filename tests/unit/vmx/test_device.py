"""A device in this process, not confined: control socket, streams, end. test_zygote.py has the real thing."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from pathlib import Path

from hypervisor.vmx import control
from hypervisor.vmx.config import VmxConfig, VmxFds
from hypervisor.vmx.device import Device, Log

PATIENCE = 10.0


def make(folder: Path, fds: VmxFds, *, cid: int | None = 7) -> tuple[Device, threading.Thread]:
    config = VmxConfig(directory=folder, guest_cid=cid, stream_limits=(4096,) * len(fds.streams))
    log = Log(os.open(folder / "vmx.log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), 4096)
    device = Device(config, fds, folder, log)
    device.start()
    thread = threading.Thread(target=device.serve)
    thread.start()
    return device, thread


async def test_answers_and_ends_when_told(short_path: Path) -> None:
    _, thread = make(short_path, VmxFds())
    answer = await control.call(short_path / "vmx.sock", "stats")
    assert answer["fault"] == ""
    assert answer["vsock"]["frontend_connected"] == 0
    for line in (b"nonsense\n", b'{"call":"dance"}\n'):
        reader, writer = await asyncio.open_unix_connection(short_path / "vmx.sock")
        writer.write(line)
        assert b'"ok": false' in await reader.readline()
        writer.close()
    await control.call(short_path / "vmx.sock", "stop")
    await asyncio.to_thread(thread.join, PATIENCE)
    assert not thread.is_alive()
    assert "end: told to stop" in (short_path / "vmx.log").read_text()
    assert not (short_path / "vsock.sock").exists()


async def test_ends_with_its_front_end_and_says_why(short_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        _, thread = make(short_path, VmxFds(frontend=theirs.detach()))
        ours.sendall(struct.pack("=III", 63, 1, 0))
        await asyncio.to_thread(thread.join, PATIENCE)
    assert "latest fault: vhost-user: request that is not supported" in (short_path / "vmx.log").read_text()


async def test_ends_with_its_streams(short_path: Path) -> None:
    read, write = os.pipe()
    log = os.open(short_path / "console.log", os.O_RDWR | os.O_CREAT, 0o600)
    _, thread = make(short_path, VmxFds(streams=((read, log),)), cid=None)
    assert await control.call(short_path / "vmx.sock", "stats") == {
        "vsock": None,
        "fault": "",
        "ram": None,
        "disks": None,
        "percpu": {"commits": 0, "restarts": 0, "memory_bytes": 0},
    }
    os.write(write, b"hello\n")
    os.close(write)
    await asyncio.to_thread(thread.join, PATIENCE)
    assert (short_path / "console.log").read_bytes() == b"hello\n"
