"""Filters in Python: what they see and do, and that whatever goes wrong in them is an error of the request, at once."""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hypervisor.errors import HvError, InvalidInput
from hypervisor.iofilter.loop import Disk, DiskLoop
from hypervisor.iofilter.python_filter import Filter, Request, RequestType, load, serving

SIZE = 1 << 20


@contextmanager
def in_thread(implementation: Filter, path: Path) -> Iterator[None]:
    """Serves a filter on an asyncio loop of its own."""
    ready, over = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        async with serving(implementation, path):
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    assert ready.wait(20)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    data = tmp_path / "data"
    data.write_bytes(bytes(SIZE))
    with DiskLoop() as loop:
        opened = loop.open_file("d", data)
        opened.start()
        yield opened
        opened.close()


def qemu_io(disk: Disk, path: Path, *commands: str) -> str:
    """Runs commands of qemu-io against the disk; what it printed."""
    export = disk.export(path / "nbd.sock")
    arguments = [word for command in commands for word in ("-c", command)]
    address = f"nbd+unix:///d?socket={path / 'nbd.sock'}"
    try:
        done = subprocess.run(
            ["qemu-io", "-f", "raw", *arguments, address], capture_output=True, text=True, timeout=60, check=False
        )
    finally:
        export.close()
    return done.stdout + done.stderr


class Seen(Filter):
    """Passes all on and remembers it."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int, int]] = []
        self.written = b""

    async def request(self, r: Request) -> None:
        self.requests.append((r.type.name, r.offset, r.length))
        if r.type is RequestType.WRITE:
            self.written = r.data


def test_it_sees_what_passes(disk: Disk, tmp_path: Path) -> None:
    seen = Seen()
    with in_thread(seen, tmp_path / "py"):
        disk.add("python", "py", (("socket", str(tmp_path / "py")),))
        out = qemu_io(disk, tmp_path, "write -P 7 4096 8192", "flush", "read -P 7 4096 8192", "read -P 0 0 4096")
        assert "failed" not in out
        assert ("WRITE", 4096, 8192) in seen.requests
        assert ("READ", 0, 4096) in seen.requests
        assert any(kind == "FLUSH" for kind, _, _ in seen.requests)
        assert seen.written == b"\x07" * 8192
        disk.remove("py")
    assert (tmp_path / "data").read_bytes()[4096:12288] == b"\x07" * 8192


class Plus(Filter):
    """Stores every byte plus one."""

    async def request(self, r: Request) -> None:
        if r.type is RequestType.READ:
            r.end(bytes((b - 1) % 256 for b in await r.below()))
        elif r.type is RequestType.WRITE:
            await r.below(bytes((b + 1) % 256 for b in r.data))


def test_it_changes_what_is_stored(disk: Disk, tmp_path: Path) -> None:
    with in_thread(Plus(), tmp_path / "py"):
        disk.add("python", "py", (("socket", str(tmp_path / "py")),))
        assert "failed" not in qemu_io(disk, tmp_path, "write -P 7 0 4096", "read -P 7 0 4096", "read -P 255 4096 4096")
        disk.remove("py")
    assert (tmp_path / "data").read_bytes()[:4097] == b"\x08" * 4096 + b"\0"


class Broken(Filter):
    """Each way of being wrong has an offset."""

    async def request(self, r: Request) -> None:
        match r.offset:
            case 4096:
                raise OSError(errno.ENOSPC, "full")
            case 8192:
                raise RuntimeError("a bug")
            case 12288:
                r.end(b"too short")
            case 16384:
                r.pass_on()
                r.end()


def test_its_faults_are_the_requests(disk: Disk, tmp_path: Path) -> None:
    with in_thread(Broken(), tmp_path / "py"):
        disk.add("python", "py", (("socket", str(tmp_path / "py")),))
        assert "No space left" in qemu_io(disk, tmp_path, "write 4096 4096")
        assert "Input/output error" in qemu_io(disk, tmp_path, "read 8192 4096")
        assert "Input/output error" in qemu_io(disk, tmp_path, "read 12288 4096")
        assert "failed" not in qemu_io(disk, tmp_path, "read 16384 4096", "read 0 4096")
        assert disk.figures("py")["times_broken"] == 0
        disk.remove("py")


def test_one_that_goes_and_comes_back(disk: Disk, tmp_path: Path) -> None:
    with in_thread(Seen(), tmp_path / "py"):
        disk.add("python", "py", (("socket", str(tmp_path / "py")),))
        assert "failed" not in qemu_io(disk, tmp_path, "read 0 4096")
    assert "Input/output error" in qemu_io(disk, tmp_path, "read 0 4096")
    with in_thread(Seen(), tmp_path / "py"):
        deadline = time.monotonic() + 30
        while "failed" in qemu_io(disk, tmp_path, "read 0 4096"):
            assert time.monotonic() < deadline
        disk.remove("py")


@pytest.mark.parametrize("answer", [b"", b"x" * 48, b"PVY1" + bytes(44)], ids=["silence", "noise", "nothing"])
def test_one_that_does_not_answer(disk: Disk, tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "py"))
        listener.listen()
        disk.add("python", "py", (("socket", str(tmp_path / "py")), ("timeout_ms", "200")))
        peer, _ = listener.accept()
        with peer:
            peer.sendall(answer)
            assert "Input/output error" in qemu_io(disk, tmp_path, "read 0 4096")
    assert disk.figures("py")["times_broken"] >= 1
    disk.remove("py")


def test_bad_settings(disk: Disk, tmp_path: Path) -> None:
    with pytest.raises(HvError, match="start the Python class first"):
        disk.add("python", "py", (("socket", str(tmp_path / "none")),))
    with pytest.raises(HvError, match="socket is not set"):
        disk.add("python", "py")
    with pytest.raises(InvalidInput, match="MODULE:CLASS"):
        load("nonesuch:Thing")
    with pytest.raises(InvalidInput, match="no subclass"):
        load("json:JSONDecoder")
