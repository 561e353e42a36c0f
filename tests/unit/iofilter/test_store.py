"""Disks on disk: creating, cloning, removing, locks; and chains that change while they run."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hypervisor.errors import Conflict, InvalidInput, NotFound
from hypervisor.iofilter.chain import open_disk
from hypervisor.iofilter.changes import Changes
from hypervisor.iofilter.descriptor import Data, Descriptor
from hypervisor.iofilter.loop import DiskLoop, filter_classes
from hypervisor.iofilter.spec import FilterSpec
from hypervisor.iofilter.store import DATA, DiskStore

SIZE = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "disks")


def make(store: DiskStore, name: str, *filters: FilterSpec) -> None:
    store.create(Descriptor(name, SIZE, Data("file", DATA), filters=filters))


def test_create_list_remove(store: DiskStore) -> None:
    make(store, "b")
    make(store, "a")
    assert store.names() == ["a", "b"]
    with pytest.raises(Conflict, match="there is a disk a already"):
        make(store, "a")
    store.remove("a")
    assert store.names() == ["b"]
    with pytest.raises(NotFound):
        store.remove("a")
    assert not [path for path in store.root.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["", "A", "../x", "a/b", "-a", "a" * 64, "x\n"])
def test_names(store: DiskStore, name: str) -> None:
    with pytest.raises(InvalidInput, match="no name for a disk"):
        make(store, name)


def test_a_base_is_kept_while_it_has_clones(store: DiskStore) -> None:
    make(store, "base")
    store.clone("base", "one")
    assert store.load("base").read_only
    with pytest.raises(Conflict, match="base of one"):
        store.remove("base")
    with DiskLoop() as loop, pytest.raises(Conflict, match="open it read-only"):
        open_disk(loop, store, "base")
    store.remove("one")
    with DiskLoop() as loop:
        open_disk(loop, store, "base").close()
    assert not store.load("base").read_only


def test_one_writer_many_readers(store: DiskStore) -> None:
    make(store, "d")
    with store.locked("d"), pytest.raises(Conflict, match="another process"):
        store.lock("d", shared=True)
    with store.locked("d", shared=True), store.locked("d", shared=True), pytest.raises(Conflict):
        store.remove("d")
    store.remove("d")


def test_bases_that_lead_back(store: DiskStore) -> None:
    make(store, "a")
    store.clone("a", "b")
    loop_back = Descriptor("a", SIZE, Data("file", DATA), parent="b", read_only=True)
    store.change("a", loop_back)
    with DiskLoop() as loop, pytest.raises(InvalidInput, match="lead back"):
        open_disk(loop, store, "b")


def test_what_is_half_made_is_no_disk(store: DiskStore) -> None:
    """A process killed while it makes a disk leaves nothing that counts as one, and the name can be used again."""
    script = f"""
import os, signal
from hypervisor.iofilter import descriptor, store
descriptor.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
s = store.DiskStore(__import__("pathlib").Path({str(store.root)!r}))
s.create(descriptor.Descriptor("d", {SIZE}, descriptor.Data("file", store.DATA)))
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert store.names() == []
    make(store, "d")
    assert store.names() == ["d"]
    assert len(list(store.root.iterdir())) == 1


def test_filters_come_and_go_in_the_descriptor(store: DiskStore) -> None:
    make(store, "d")
    changes = Changes(store, "d")
    changes.add_filter(FilterSpec("throttle", "limit", (("iops", "100"),)))
    changes = Changes(store, "d")
    changes.set_filter("limit", (("iops", "200"),))
    assert dict(store.load("d").filter("limit").settings) == {"iops": "200"}
    with pytest.raises(InvalidInput):
        Changes(store, "d").add_filter(FilterSpec("throttle", "other", (("speed", "1"),)))
    with pytest.raises(InvalidInput, match="was written without it"):
        Changes(store, "d").add_filter(FilterSpec("encrypt", "e", (("key", "/x"),)))
    Changes(store, "d").remove_filter("limit")
    assert store.load("d").filters == ()
    with pytest.raises(NotFound, match="no filter limit"):
        Changes(store, "d").remove_filter("limit")


def test_a_filter_that_the_data_needs_stays(store: DiskStore) -> None:
    make(store, "base")
    store.clone("base", "c")
    with pytest.raises(InvalidInput, match="wrong data"):
        Changes(store, "c").remove_filter("linkedclone")


def test_a_resize_reaches_the_descriptor(store: DiskStore) -> None:
    make(store, "d")
    Changes(store, "d").resize(2 * SIZE)
    assert store.load("d").size == 2 * SIZE
    assert (store.folder("d") / DATA).stat().st_size == 2 * SIZE


def test_a_missing_data_file_is_named(store: DiskStore) -> None:
    make(store, "d")
    (store.folder("d") / DATA).unlink()
    with DiskLoop() as loop, pytest.raises(NotFound, match=r"data\.raw"):
        open_disk(loop, store, "d")
    with store.locked("d"):
        pass  # what failed to open holds nothing


def test_every_filter_has_a_class_and_a_place() -> None:
    classes = filter_classes()
    assert len({c.name for c in classes}) == len(classes)
    assert {"stats", "throttle", "linkedclone"} <= {c.name for c in classes}


def test_nothing_stays_open(store: DiskStore) -> None:
    make(store, "d")
    gc.collect()  # what other tests left to the collector
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with DiskLoop() as loop:
            open_disk(loop, store, "d").close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
