"""A template's RAM as VADs: every page once, data where data is, zeroes elsewhere."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.memory.database import PageFrameDatabase
from hypervisor.memory.space import AddressSpace
from hypervisor.vmm.templates.frames import MIN_HOLE_PAGES, HostFrames, pieces
from hypervisor.vmm.templates.template import FORMAT, PAGE, Manifest, Template, TemplateKey

PAGES = 4096
EXTENTS = ((3, 2), (3 + 2 + MIN_HOLE_PAGES, 10), (2000, 1), (2005, 7))


def template(path: Path = Path("/t"), sha: str = "x") -> Template:
    key = TemplateKey(qemu_version="7.2.0", argv=(), guest="")
    manifest = Manifest(
        format=FORMAT, key=key, ram_bytes=PAGES * PAGE, ram_sha256=sha, state_bytes=0, state_sha256="", extents=EXTENTS
    )
    return Template(path, manifest)


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 50)), max_size=20))
def test_pieces_cover_ram_once(gaps: list[tuple[int, int]]) -> None:
    extents, at = [], 0
    for gap, count in gaps:
        extents.append((at + gap, count))
        at += gap + count
    found = pieces(tuple(extents), at + 5)
    assert [f for f, _, _ in found] == [0, *(f + c for f, c, _ in found)][: len(found)]
    assert sum(c for _, c, _ in found) == at + 5
    data = {p for f, c, has_data in found if has_data for p in range(f, f + c)}
    assert {p for f, c in extents for p in range(f, f + c)} <= data


def test_clones_of_one_template_share_its_vads() -> None:
    with HostFrames() as frames:
        first, second = frames.clone_plan(template()), frames.clone_plan(template())
        assert first.mappings == second.mappings
        used = frames.usage()
        assert used.vads == len(first.mappings)
        assert used.pfes == PAGES
        frames.clone_plan(template(sha="y"))
        assert frames.usage().vads == 2 * used.vads


def test_a_device_process_can_map_and_not_change_it() -> None:
    with HostFrames() as frames:
        plan = frames.clone_plan(template())
        with pytest.raises(OSError, match=r"not permitted|denied"):
            mmap.mmap(frames.reader_fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with PageFrameDatabase.open(frames.reader_fd, writer=False) as database, AddressSpace(database) as space:
            for page, pages, vad, vad_page in plan.mappings:
                space.map(page * PAGE, pages, vad, page=vad_page)
            assert space.usage().mapped_pages == PAGES
            found = space.lookup(2001 * PAGE)
            assert found is not None
