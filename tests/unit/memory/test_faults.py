"""The fault server through its Python face, with a real userfaultfd."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from hypervisor.errors import InvalidInput, Unavailable
from hypervisor.memory.database import PageFrameDatabase, SourceKind, new_memory_file
from hypervisor.memory.faults import FaultServer, FaultStats
from hypervisor.memory.native import PAGE
from hypervisor.memory.space import AddressSpace

PAGES = 256

pytestmark = [pytest.mark.root, pytest.mark.uffd]


@pytest.fixture
def template() -> Iterator[int]:
    fd = new_memory_file("template")
    for page in range(PAGES):
        os.write(fd, page.to_bytes(4, "little") * (PAGE // 4))
    yield fd
    os.close(fd)


@pytest.fixture
def space() -> Iterator[tuple[PageFrameDatabase, AddressSpace]]:
    fd = new_memory_file("pfdb")
    with PageFrameDatabase.create(fd, max_vads=4, max_pfes=4 * PAGES) as database, AddressSpace(database) as it:
        yield database, it
    os.close(fd)


def stats_when(server: FaultServer, ready: Callable[[FaultStats], bool]) -> FaultStats:
    """A toucher goes on before its fault is counted."""
    deadline = time.monotonic() + 10
    while not ready(stats := server.stats()):
        assert time.monotonic() < deadline
    return stats


def test_ram_is_filled_as_it_is_touched(space: tuple[PageFrameDatabase, AddressSpace], template: int) -> None:
    database, addresses = space
    addresses.map(0, PAGES, database.add(SourceKind.FILE, pages=PAGES, source=1))
    ram = new_memory_file("ram")
    os.ftruncate(ram, PAGES * PAGE)
    with mmap.mmap(ram, PAGES * PAGE) as memory:
        server = FaultServer(database, addresses, ram_bytes=PAGES * PAGE, around_pages=1)
        server.add_source(1, template)
        server.open_own()
        server.register_own(memory)
        with server:
            seen: list[int] = []

            def touch() -> None:
                # ctypes-free and GIL-bound: the server's thread serves without the GIL
                seen.extend(int.from_bytes(memory[p * PAGE : p * PAGE + 4], "little") for p in (5, 200, 5))

            toucher = threading.Thread(target=touch)
            toucher.start()
            toucher.join()
            assert seen == [5, 200, 5]
            assert server.prefetch([7, 8, 9]) == 3
            stats = stats_when(server, lambda s: s.faults == 2)
            assert server.recorded() == [5, 200]
            assert (stats.pages_copied, stats.prefetched) == (5, 3)
            assert sum(stats.latency) == 2
            assert 0 < stats.latency_ns < 10 * 10**9
            assert stats.bytes == 5 * PAGE
            server.set_around(16)
            toucher = threading.Thread(target=lambda: seen.append(memory[100 * PAGE]))
            toucher.start()
            toucher.join()
            assert seen[-1] == 100
            assert stats_when(server, lambda s: s.faults == 3).pages_copied == 5 + 16
    os.close(ram)


def test_bad_sizes(space: tuple[PageFrameDatabase, AddressSpace]) -> None:
    with pytest.raises(InvalidInput):
        FaultServer(*space, ram_bytes=100)
    with pytest.raises(InvalidInput):
        FaultServer(*space, ram_bytes=PAGE, around_pages=3)
    with FaultServer(*space, ram_bytes=PAGE) as server:
        for pages in (0, 3, 1024):
            with pytest.raises(InvalidInput):
                server.set_around(pages)


def test_a_source_that_cannot_be_mapped(space: tuple[PageFrameDatabase, AddressSpace]) -> None:
    with FaultServer(*space, ram_bytes=PAGE) as server, pytest.raises(Unavailable):
        server.add_source(1, -1)


def test_a_source_of_the_wrong_kind_is_refused_with_the_reason(
    space: tuple[PageFrameDatabase, AddressSpace], template: int
) -> None:
    with FaultServer(*space, ram_bytes=PAGE) as server:
        with pytest.raises(InvalidInput, match="no seek table at the end"):
            server.add_source(1, template, kind=SourceKind.ZSTD)
        server.add_source(1, template)
