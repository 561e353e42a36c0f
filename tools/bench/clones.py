"""A thousand linked clones of one base: how long they take to make and to open, and what each costs while idle."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from measure import Figure

from hypervisor.iofilter.chain import open_disk
from hypervisor.iofilter.descriptor import Data, Descriptor
from hypervisor.iofilter.loop import DiskLoop
from hypervisor.iofilter.store import DATA, DiskStore

COUNT = 1000
SIZE = 10 << 30


def private_bytes() -> int:
    """Memory of this process that nobody else has."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def once() -> tuple[float, float, float, float]:
    """Seconds to make and to open all of them; KiB of memory and of disk a clone."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, ExitStack() as stack:
        store = DiskStore(Path(folder) / "disks")
        store.create(Descriptor("base", SIZE, Data("file", DATA)))
        began = time.perf_counter()
        for i in range(COUNT):
            store.clone("base", f"clone-{i}")
        made = time.perf_counter() - began
        used = sum(path.stat().st_blocks * 512 for path in store.root.rglob("*") if path.is_file())
        loop = stack.enter_context(DiskLoop())
        base = open_disk(loop, store, "base", read_only=True)
        before = private_bytes()
        began = time.perf_counter()
        opened = [open_disk(loop, store, f"clone-{i}", bases={"base": base}) for i in range(COUNT)]
        took = time.perf_counter() - began
        memory = private_bytes() - before
        for disk in opened:
            disk.close()
        base.close()
    return made, took, memory / COUNT / 1024, used / COUNT / 1024


def run(rounds: int) -> list[Figure]:
    """The figures."""
    made, opened, memory, disk = zip(*(once() for _ in range(rounds)), strict=True)
    return [
        Figure(f"{COUNT} linked clones of a {SIZE >> 30} GiB base, made", "s", made, 5),
        Figure(f"{COUNT} linked clones opened in one process", "s", opened),
        Figure("memory of an idle clone", "KiB", memory, 64),
        Figure("a new clone's files", "KiB", disk),
    ]
