"""A dear source is loaded once for several address spaces, through the Python faces, with real userfaultfds."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from hypervisor.errors import InvalidInput
from hypervisor.memory.database import PageFrameDatabase, SourceKind, new_memory_file
from hypervisor.memory.faults import FaultServer
from hypervisor.memory.loader import SourceLoader
from hypervisor.memory.native import PAGE
from hypervisor.memory.space import AddressSpace

PAGES = 64
SIZE = PAGES * PAGE

pytestmark = [pytest.mark.root, pytest.mark.uffd]


#: a process that has pages, each full of its number; no thread: who touches a page in Python holds the GIL meanwhile
REMOTE = """
import os, struct
while ask := os.read(0, 16):
    offset, length = struct.unpack("=QQ", ask)
    answer = b"".join(bytes([page]) * 4096 for page in range(offset // 4096, (offset + length) // 4096))
    while answer:
        answer = answer[os.write(0, answer):]
"""


@pytest.fixture
def remote() -> Iterator[Callable[[], socket.socket]]:
    """Starts such a process; its socket."""
    with contextlib.ExitStack() as stack:

        def start() -> socket.socket:
            ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", REMOTE], stdin=theirs))
            stack.callback(process.kill)
            return ours

        yield start


@pytest.fixture
def database() -> Iterator[PageFrameDatabase]:
    fd = new_memory_file("pfdb")
    with PageFrameDatabase.create(fd, max_vads=4, max_pfes=2 * PAGES) as it:
        yield it
    os.close(fd)


@contextlib.contextmanager
def vm(
    database: PageFrameDatabase, vad: int, loader: SourceLoader, source: socket.socket
) -> Iterator[tuple[FaultServer, mmap.mmap]]:
    ram, client = new_memory_file("ram"), loader.client()
    os.ftruncate(ram, SIZE)
    with AddressSpace(database) as space, mmap.mmap(ram, SIZE) as memory:
        space.map(0, PAGES, vad)
        server = FaultServer(database, space, ram_bytes=SIZE, around_pages=1)
        server.add_source(1, source.fileno(), kind=SourceKind.REMOTE, size=SIZE)
        server.share_source(1, loader.store_fd, client)
        os.close(client)
        server.open_own()
        server.register_own(memory)
        with server:
            yield server, memory
    os.close(ram)


def touch(memory: mmap.mmap) -> None:
    """In a thread of its own, as a toucher that is never served would hang for ever otherwise."""
    seen: list[int] = []
    toucher = threading.Thread(target=lambda: seen.extend(memory[page * PAGE] for page in range(PAGES)), daemon=True)
    toucher.start()
    toucher.join(30)
    assert seen == list(range(PAGES))


def test_two_spaces_load_once_and_go_on_without_their_loader(
    database: PageFrameDatabase, remote: Callable[[], socket.socket]
) -> None:
    vad, half = database.add(SourceKind.REMOTE, pages=PAGES, source=1), SIZE // 2
    loading = SourceLoader(database, 1, remote().fileno(), kind=SourceKind.REMOTE, size=SIZE, max_bytes=half)
    with contextlib.ExitStack() as vms:
        with loading as loader:
            first, first_ram = vms.enter_context(vm(database, vad, loader, remote()))
            second, second_ram = vms.enter_context(vm(database, vad, loader, remote()))
            touch(first_ram)
            assert (loader.counts().units, loader.counts().bytes, loader.counts().failed) == (2, half, 0)
            assert first.stats().units_loaded == 2  # what was beyond the limit
        touch(second_ram)
        assert second.stats().frames_found == PAGES // 2
        assert second.stats().units_loaded == 2


def test_what_makes_no_sense_is_refused_with_the_reason(
    database: PageFrameDatabase, remote: Callable[[], socket.socket]
) -> None:
    file = new_memory_file("no store")
    os.ftruncate(file, SIZE)
    with pytest.raises(InvalidInput, match="not dear"):
        SourceLoader(database, 1, file, kind=SourceKind.FILE, max_bytes=SIZE)
    with AddressSpace(database) as space, FaultServer(database, space, ram_bytes=SIZE) as server:
        with pytest.raises(InvalidInput, match="sharing source 1"):
            server.share_source(1, file, file)
        server.add_source(1, remote().fileno(), kind=SourceKind.REMOTE, size=SIZE)
        with pytest.raises(InvalidInput, match="sharing source 1"):  # it is not sealed
            server.share_source(1, file, file)
    os.close(file)
