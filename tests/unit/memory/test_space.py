"""Address spaces against a plain dictionary as the model, and the Python face's errors."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hypervisor.errors import Conflict, InvalidInput, NotFound, ResourceExhausted
from hypervisor.memory.database import PageFrameDatabase, SourceKind, new_memory_file
from hypervisor.memory.native import PAGE
from hypervisor.memory.space import AddressSpace, Extent

# Two windows far apart (page numbers), so that every level of the table is crossed.
PAGES = 1200
BASES = (0, (1 << 35) - 600)


class Model(RuleBasedStateMachine):
    """Pages as a dictionary: page number -> (vad, page of the vad)."""

    @initialize(sizes=st.lists(st.integers(1, 900), min_size=1, max_size=5))
    def begin(self, sizes: list[int]) -> None:
        self.fd = new_memory_file("pfdb")
        self.database = PageFrameDatabase.create(self.fd, max_vads=8, max_pfes=8192)
        self.vads = {self.database.add(SourceKind.FILE, pages=n, offset=n * PAGE): n for n in sizes}
        self.space = AddressSpace(self.database)
        self.model: dict[int, tuple[int, int]] = {}

    @rule(base=st.sampled_from(BASES), at=st.integers(0, PAGES), pages=st.integers(1, PAGES), data=st.data())
    def map(self, base: int, at: int, pages: int, data: st.DataObject) -> None:
        vad = data.draw(st.sampled_from(sorted(self.vads)))
        page = data.draw(st.integers(0, self.vads[vad] - 1))
        pages = min(pages, self.vads[vad] - page)
        wanted = range(base + at, base + at + pages)
        if any(p in self.model for p in wanted):
            with pytest.raises(Conflict):
                self.space.map(wanted.start * PAGE, pages, vad, page=page)
        else:
            self.space.map(wanted.start * PAGE, pages, vad, page=page)
            self.model |= {p: (vad, page + i) for i, p in enumerate(wanted)}

    @rule(base=st.sampled_from(BASES), at=st.integers(0, PAGES), pages=st.integers(1, PAGES))
    def unmap(self, base: int, at: int, pages: int) -> None:
        gone = [p for p in range(base + at, base + at + pages) if self.model.pop(p, None)]
        assert self.space.unmap((base + at) * PAGE, pages) == len(gone)

    @invariant()
    def extents_are_the_model(self) -> None:
        if not hasattr(self, "space"):
            return
        found = {e.address // PAGE + i: (e.vad, e.page + i) for e in self.space.extents() for i in range(e.pages)}
        assert found == self.model
        assert self.space.usage().mapped_pages == len(self.model)

    @rule(base=st.sampled_from(BASES), at=st.integers(0, 2 * PAGES))
    def lookup(self, base: int, at: int) -> None:
        found = self.space.lookup((base + at) * PAGE + 7)
        expected = self.model.get(base + at)
        assert (found[1] if found else None) == (expected[1] if expected else None)

    def teardown(self) -> None:
        if hasattr(self, "space"):
            self.space.close()
            self.database.close()
            os.close(self.fd)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def database() -> Iterator[PageFrameDatabase]:
    fd = new_memory_file("pfdb")
    with PageFrameDatabase.create(fd, max_vads=4, max_pfes=100) as it:
        yield it
    os.close(fd)


def test_neighbouring_mappings_of_one_vad_are_one_extent(database: PageFrameDatabase) -> None:
    vad = database.add(SourceKind.FILE, pages=10)
    with AddressSpace(database) as space:
        space.map(0, 4, vad)
        space.map(4 * PAGE, 6, vad, page=4)
        assert list(space.extents()) == [Extent(0, 10, vad, 0)]
        space.unmap(2 * PAGE, 1)
        assert list(space.extents()) == [Extent(0, 2, vad, 0), Extent(3 * PAGE, 7, vad, 3)]


def test_errors_are_of_the_tree(database: PageFrameDatabase) -> None:
    vad = database.add(SourceKind.ZERO, pages=10)
    with AddressSpace(database) as space:
        with pytest.raises(InvalidInput):
            space.map(1, 1, vad)
        with pytest.raises(InvalidInput):
            space.map((1 << 48) - PAGE, 2, vad)
        with pytest.raises(InvalidInput):
            space.map(-PAGE, 1, vad)
        with pytest.raises(NotFound):
            space.map(0, 1, 3)
        with pytest.raises(ResourceExhausted):
            database.add(SourceKind.FILE, pages=95)
        with pytest.raises(NotFound):
            database.remove(3)
        assert list(space.extents()) == []


def test_a_file_that_is_no_database_is_refused() -> None:
    fd = new_memory_file("junk")
    os.write(fd, b"x" * 8192)
    with pytest.raises(InvalidInput):
        PageFrameDatabase.open(fd, writer=False)
    os.close(fd)


def test_tables_take_less_than_a_hundredth_of_what_they_map() -> None:
    """The bar is 0.7 % of mapped memory, tables and entries, VADs apart (docs/memory.md)."""
    pages = 1 << 18
    fd = new_memory_file("pfdb")
    with PageFrameDatabase.create(fd, max_vads=2, max_pfes=pages + 1) as database, AddressSpace(database) as space:
        space.map(0, pages, database.add(SourceKind.FILE, pages=pages))
        used = space.usage().node_bytes + database.usage().pfe_bytes
        assert used / (pages * PAGE) <= 0.007
    os.close(fd)
