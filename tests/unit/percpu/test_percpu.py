"""Counters and rings of CPUs through the Python faces: from several threads, several processes, with bad input."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from hypervisor.errors import InvalidInput, NotFound, ProtocolError, ResourceExhausted
from hypervisor.percpu.area import PerCpuAreas, Registration, slice_extension
from hypervisor.percpu.counter import PerCpuCounter
from hypervisor.percpu.ring import PerCpuRing
from hypervisor.percpu.trace import PerCpuTrace

ADDS = 20_000

CHILD = """
import sys
from hypervisor.percpu.area import PerCpuAreas
from hypervisor.percpu.counter import PerCpuCounter
from hypervisor.percpu.ring import PerCpuRing
fd, counter, control, data, count = map(int, sys.argv[1:])
areas = PerCpuAreas.attach(fd)
adds, ring = PerCpuCounter(areas, counter), PerCpuRing(areas, handles=(control, data))
for i in range(count):
    adds.add()
    assert ring.put(b"from a process")
"""


@pytest.fixture
def areas() -> PerCpuAreas:
    return PerCpuAreas()


def spawn(areas: PerCpuAreas, counter: PerCpuCounter, ring: PerCpuRing, count: int, **environment: str) -> None:
    arguments = [str(n) for n in (areas.fd, counter.handle, *ring.handles, count)]
    subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        pass_fds=[areas.fd],
        env=os.environ | environment,
        check=True,
        timeout=60,
    )


def test_counter_counts_down_and_up(areas: PerCpuAreas) -> None:
    counter = PerCpuCounter(areas)
    assert counter.value() == 0 and counter.parts() == {}
    counter.add()
    counter.add(-6)
    assert counter.value() == sum(counter.parts().values()) == -5
    counter.add(2**63 - 1)
    counter.add(6)
    assert counter.value() == -(2**63)


def test_adds_of_threads_are_all_there(areas: PerCpuAreas) -> None:
    counter = PerCpuCounter(areas)

    def add() -> None:
        for _ in range(ADDS):
            counter.add()

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen = [counter.value() for _ in range(1000)]
    for thread in threads:
        thread.join()
    assert counter.value() == 4 * ADDS
    assert seen == sorted(seen)


@pytest.mark.parametrize("tunables", ["", "glibc.pthread.rseq=0"])
def test_other_processes_use_the_same(areas: PerCpuAreas, tunables: str) -> None:
    counter, ring = PerCpuCounter(areas), PerCpuRing(areas, 65536)
    spawn(areas, counter, ring, 1000, GLIBC_TUNABLES=tunables)
    counter.add(5)
    assert counter.value() == 1005
    assert Counter(record for _, record in ring.drain()) == {b"from a process": 1000}


def test_a_forked_child_shares_them(areas: PerCpuAreas) -> None:
    counter = PerCpuCounter(areas)
    pid = os.fork()
    if pid == 0:
        counter.add(3)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert counter.value() == 3


def test_what_a_killed_process_counted_stays(areas: PerCpuAreas, tmp_path: Path) -> None:
    counter = PerCpuCounter(areas)
    pid = os.fork()
    while pid == 0:
        counter.add()
    while counter.value() < 1000:
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    value = counter.value()
    counter.add()
    assert counter.value() == value + 1


def test_a_closed_counter_is_an_error(areas: PerCpuAreas) -> None:
    counter = PerCpuCounter(areas)
    again = PerCpuCounter(areas, counter.handle)
    again.close()  # not its own
    counter.add()
    counter.close()
    for use in (counter.add, again.add, counter.value, lambda: PerCpuCounter(areas, counter.handle)):
        with pytest.raises(NotFound, match="no such item"):
            use()
    counter.close()
    with PerCpuCounter(areas) as reused:
        assert reused.value() == 0


def test_bad_input_is_refused(areas: PerCpuAreas, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        PerCpuAreas(65537)
    with pytest.raises(NotFound):
        PerCpuCounter(areas, 12345)
    with pytest.raises(InvalidInput):
        PerCpuRing(areas, 5000)
    with pytest.raises(OverflowError):
        PerCpuCounter(areas).add(2**63)
    counter = PerCpuCounter(areas)
    with pytest.raises(NotFound):
        PerCpuRing(areas, handles=(counter.handle, 7))
    with pytest.raises(InvalidInput):
        PerCpuRing(areas, handles=(counter.handle, counter.handle))
    (tmp_path / "file").write_bytes(b"x" * 4096)
    with (tmp_path / "file").open() as file, pytest.raises(InvalidInput, match="attaching"):
        PerCpuAreas.attach(file.fileno())
    with pytest.raises(InvalidInput):
        PerCpuAreas.attach(-1)


@pytest.mark.parametrize("number", [-1, 2**40, 2**64])
def test_numbers_out_of_range_are_refused(areas: PerCpuAreas, number: int) -> None:
    for use in (
        lambda: PerCpuAreas(number),
        lambda: PerCpuRing(areas, number),
        lambda: PerCpuTrace(areas, number),
        lambda: PerCpuAreas.attach(number),
    ):
        with pytest.raises(InvalidInput):
            use()
    error = NotFound if number == 2**40 else InvalidInput  # a handle has 64 bits
    with pytest.raises(error):
        PerCpuCounter(areas, number)
    with pytest.raises(error):
        PerCpuRing(areas, handles=(number, number))
    assert areas.stats().items == 0


def test_nobody_can_take_the_memory_away(areas: PerCpuAreas) -> None:
    """Else whoever has the descriptor could end every process that uses it, by SIGBUS."""
    counter = PerCpuCounter(areas)
    counter.add()
    for size in (0, 4096, os.fstat(areas.fd).st_size * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(areas.fd, size)
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, os.fstat(areas.fd).st_size)
    os.pwrite(unsealed, os.pread(areas.fd, 4096, 0), 0)
    with pytest.raises(InvalidInput, match="attaching"):
        PerCpuAreas.attach(unsealed)
    os.close(unsealed)
    counter.add()
    assert counter.value() == 2


def test_a_closed_descriptor_hides_nothing(areas: PerCpuAreas) -> None:
    counter = PerCpuCounter(areas)
    counter.add(5)
    fd, spare = areas.fd, os.dup(areas.fd)
    os.close(fd)
    assert counter.value() == 5
    os.dup2(spare, fd, inheritable=False)  # it is the object's to close
    os.close(spare)


def test_items_of_others_are_told_apart_by_kind_and_areas(areas: PerCpuAreas) -> None:
    other = PerCpuAreas()
    ring = PerCpuRing(other, 4096)
    with pytest.raises(NotFound):
        PerCpuRing(areas, handles=ring.handles)
    with pytest.raises(InvalidInput):
        PerCpuRing(other, handles=ring.handles[::-1])


SUBINTERPRETER = """
import sys, _xxsubinterpreters as interpreters
from hypervisor.percpu.area import PerCpuAreas
from hypervisor.percpu.counter import PerCpuCounter
counter = PerCpuCounter(PerCpuAreas())
script = f'''
from hypervisor.percpu.area import PerCpuAreas
from hypervisor.percpu.counter import PerCpuCounter
PerCpuCounter(PerCpuAreas.attach({counter._areas.fd}), {counter.handle}).add(7)
'''
for _ in range(3):
    interpreter = interpreters.create()
    interpreters.run_string(interpreter, script)
    interpreters.destroy(interpreter)
counter.add()
sys.exit(counter.value() != 22)
"""


def test_subinterpreters_share_them() -> None:
    pytest.importorskip("_xxsubinterpreters", reason="this Python has no such module for subinterpreters")
    subprocess.run([sys.executable, "-c", SUBINTERPRETER], check=True, timeout=60)


def test_threads_come_and_go(areas: PerCpuAreas) -> None:
    counter = PerCpuCounter(areas)
    for _ in range(100):
        thread = threading.Thread(target=counter.add)
        thread.start()
        thread.join()
    assert counter.value() == 100


def test_areas_are_finite(areas: PerCpuAreas) -> None:
    rings = [PerCpuRing(areas, 524288)]
    with pytest.raises(ResourceExhausted):
        PerCpuRing(areas, 524288)
    rings[0].close()
    PerCpuRing(areas, 524288)


def test_ring_gives_back_what_was_put(areas: PerCpuAreas) -> None:
    with PerCpuRing(areas, 4096) as ring:
        records = [bytes([i]) * i for i in range(50)]
        assert all(ring.put(record) for record in records)
        assert sorted(record for _, record in ring.drain()) == sorted(records)
        assert list(ring.drain()) == []
        assert ring.put(memoryview(b"abcdefgh").cast("I")) and ring.put(bytearray(b"xy"))
        assert sorted(record for _, record in ring.drain()) == [b"abcdefgh", b"xy"]
        assert not ring.put(b"x" * 2041)
        assert ring.counts() == {"dropped": 1, "abandoned": 0, "waiting_bytes": 0}
    with pytest.raises(NotFound):
        ring.put(b"")
    with pytest.raises(NotFound):
        list(ring.drain())
    with pytest.raises(NotFound):
        ring.counts()


def test_ring_says_when_it_is_full(areas: PerCpuAreas) -> None:
    os.sched_setaffinity(0, cpus := {min(before := os.sched_getaffinity(0))})
    try:
        ring = PerCpuRing(areas, 4096)
        put = sum(ring.put(b"12345678") for _ in range(1000))
        assert (put, ring.counts()["dropped"]) == (4096 // 16, 1000 - 4096 // 16)
        records = list(ring.drain())
        assert len(records) == put
        if areas.stats().registration is not Registration.NOBODY:
            assert {cpu for cpu, _ in records} == cpus
    finally:
        os.sched_setaffinity(0, before)


def test_a_damaged_ring_is_an_error_once(areas: PerCpuAreas) -> None:
    ring = PerCpuRing(areas, 4096)
    ring.put(b"12345678")
    ((cpu, _),) = ring.drain()
    ring.put(b"12345678")
    size = os.fstat(areas.fd).st_size
    step, place = 1 << 20, 4 << 20
    for head in range(place + cpu * step, size, step):  # whichever area it went to
        os.pwrite(areas.fd, b"\xff" * 7, head)
    with pytest.raises(ProtocolError):
        list(ring.drain())


def test_stats_say_what_is_there() -> None:
    areas = PerCpuAreas(4096)
    before = areas.stats()
    assert (before.cpus, before.items, before.item_bytes) == (4096, 0, 0)
    assert before.memory_bytes <= 12 * 4096  # looking costs nothing
    counter = PerCpuCounter(areas)
    counter.add()
    after = areas.stats()
    assert (after.items, after.item_bytes) == (1, 8)
    assert after.memory_bytes - before.memory_bytes <= 4 * 4096
    assert after.registration in Registration
    counter.close()
    assert areas.stats().items == 0


def test_the_kernel_says_why_there_is_no_slice_extension() -> None:
    assert isinstance(slice_extension(), str)


def test_areas_go_with_their_last_item() -> None:
    areas = PerCpuAreas()
    fd = areas.fd
    counter = PerCpuCounter(areas)
    del areas
    gc.collect()
    counter.add()
    assert counter.value() == 1
    del counter
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
