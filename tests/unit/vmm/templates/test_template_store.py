"""Templates on disk: what fits is used, what was damaged is named and built anew, two builders build one."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.errors import InvalidInput, ResourceExhausted
from hypervisor.vmm.templates.store import TemplateStore
from hypervisor.vmm.templates.template import (
    FORMAT,
    PAGE,
    Template,
    TemplateDamaged,
    TemplateKey,
    copy_ram,
    data_extents,
    outside,
)
from hypervisor.vmx import working_set

KEY = TemplateKey(qemu_version="7.2.0", argv=("qemu", "-m", "1"), guest="g")
SIZE = 64 * PAGE


async def build(folder: Path) -> None:
    """RAM with data in pages 3, 4 and 40; a little state."""
    fd = os.open(folder / "ram", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, SIZE)
    for page in (3, 4, 40):
        os.pwrite(fd, bytes([page]) * PAGE, page * PAGE)
    os.close(fd)
    (folder / "state").write_bytes(b"state of devices")


@pytest.fixture
def store(tmp_path: Path) -> TemplateStore:
    return TemplateStore(tmp_path / "templates")


async def test_built_once_and_found_again(store: TemplateStore) -> None:
    built: list[Path] = []

    async def counting(folder: Path) -> None:
        built.append(folder)
        await asyncio.sleep(0.01)
        await build(folder)

    found = await asyncio.gather(*(store.get(KEY, counting) for _ in range(5)))
    assert len(built) == 1
    assert {t.path for t in found} == {store.path(KEY)}
    assert found[0].manifest.extents == ((3, 2), (40, 1))
    assert not [p for p in store.path(KEY).parent.iterdir() if p.name.startswith(".build")]


async def test_two_stores_on_one_folder_build_one(store: TemplateStore, tmp_path: Path) -> None:
    built: list[Path] = []

    async def counting(folder: Path) -> None:
        built.append(folder)
        await asyncio.sleep(0.2)
        await build(folder)

    await asyncio.gather(store.get(KEY, counting), TemplateStore(tmp_path / "templates").get(KEY, counting))
    assert len(built) == 1


@pytest.mark.parametrize(
    ("part", "damage", "word"),
    [
        ("ram", lambda p: os.truncate(p, SIZE - PAGE), "bytes instead of"),
        ("ram", lambda p: flip(p, 3 * PAGE + 7), "checksum"),
        ("ram", lambda p: flip(p, 20 * PAGE), "checksum"),  # data where a hole was
        ("state", lambda p: flip(p, 2), "checksum"),
        ("state", lambda p: p.unlink(), "cannot be read"),
        ("template.json", lambda p: p.write_text("{}"), "template.json"),
        ("template.json", lambda p: p.write_text(p.read_text().replace('"7.2.0"', '"8.0.0"')), "another"),
        (
            "template.json",
            lambda p: p.write_text(p.read_text().replace(f'"format": {FORMAT}', '"format": 2')),
            "version",
        ),
    ],
)
async def test_damage_is_named_and_mended(store: TemplateStore, part: str, damage: object, word: str) -> None:
    template = await store.get(KEY, build)
    assert callable(damage)
    damage(template.path / part)
    with pytest.raises(TemplateDamaged, match=word) as caught:
        Template.load(template.path, KEY)
    assert part in str(caught.value)
    again = await store.get(KEY, build)
    assert again.ram.stat().st_size == SIZE
    assert Template.load(again.path, KEY) == again


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1) or b"\0"
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


async def test_a_hole_that_was_read_is_no_damage(store: TemplateStore) -> None:
    """On tmpfs, reading a hole through a mapping makes it a page of zeroes."""
    template = await store.get(KEY, build)
    fd = os.open(template.ram, os.O_RDWR)
    os.pwrite(fd, bytes(3 * PAGE), 5 * PAGE)
    os.close(fd)
    assert Template.load(template.path, KEY) == template


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)))
def test_outside_is_a_difference(pages: set[int], known: set[int]) -> None:
    found = outside(runs(pages), runs(known))
    assert {p for first, count in found for p in range(first, first + count)} == pages - known


def runs(pages: set[int]) -> tuple[tuple[int, int], ...]:
    made: list[tuple[int, int]] = []
    for page in sorted(pages):
        if made and sum(made[-1]) == page:
            made[-1] = (made[-1][0], made[-1][1] + 1)
        else:
            made.append((page, 1))
    return tuple(made)


async def test_a_failed_build_leaves_nothing(store: TemplateStore) -> None:
    async def failing(folder: Path) -> None:
        (folder / "ram").write_bytes(b"x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        await store.get(KEY, failing)
    assert [p.name for p in store.path(KEY).parent.iterdir() if not p.name.startswith(".lock")] == []
    assert (await store.get(KEY, build)).manifest.key == KEY


@contextmanager
def small_disk(folder: Path, pages: int) -> Iterator[Path]:
    """A file system that holds `pages` pages."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={pages * PAGE}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.root
async def test_a_disk_that_is_full_at_any_moment(tmp_path: Path) -> None:
    """RAM, state and manifest are 14 pages and some: whichever of them finds no room, nothing stays, and it is said."""
    source = os.memfd_create("ram")
    os.ftruncate(source, SIZE)
    os.pwrite(source, b"data" * PAGE * 3, 8 * PAGE)

    async def copying(folder: Path) -> None:
        ram = os.open(folder / "ram", os.O_RDWR | os.O_CREAT)
        try:
            copy_ram(source, ram, SIZE)
        finally:
            os.close(ram)
        (folder / "state").write_bytes(bytes(PAGE + 1))

    outcomes = []
    for pages in (4, 12, 13, 14, 15, 16, 24):
        with small_disk(tmp_path / f"disk-{pages}", pages) as disk:
            store = TemplateStore(disk / "templates")
            try:
                outcomes.append(Template.load((await store.get(KEY, copying)).path, KEY) is not None)
            except ResourceExhausted as e:
                outcomes.append(False)
                assert str(disk) in str(e)
                assert [p.name for p in store.path(KEY).parent.glob("*") if not p.name.startswith(".lock")] == []
    os.close(source)
    assert outcomes[0] is False
    assert outcomes[-1] is True
    assert outcomes == sorted(outcomes)


async def test_another_key_is_another_template(store: TemplateStore) -> None:
    other = TemplateKey(qemu_version="7.2.1", argv=KEY.argv, guest=KEY.guest)
    assert (await store.get(KEY, build)).path != (await store.get(other, build)).path
    assert await store.prune(lambda key: key == KEY) == [other.digest]
    (store.path(KEY) / "template.json").write_text("{")
    assert await store.prune(lambda key: key == KEY) == [KEY.digest]


async def test_working_set_first_one_wins(store: TemplateStore) -> None:
    template = await store.get(KEY, build)
    assert len(template.working_set()) == 0
    template.keep_working_set([5, 3, 9, 5, SIZE // PAGE, 7])
    template.keep_working_set([1])
    assert list(template.working_set()) == [5, 3, 9, 7]  # each once, and none beyond RAM
    assert not [p for p in template.path.iterdir() if p.name.endswith(".new")]


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "of another template", "too long"])
async def test_a_damaged_working_set_is_dropped_and_recorded_anew(store: TemplateStore, damage: str) -> None:
    template = await store.get(KEY, build)
    template.keep_working_set([5, 3, 9])
    path = Template.working_set_of(template.path)
    data = path.read_bytes()
    path.write_bytes(
        {
            "flipped": data[:50] + bytes([data[50] ^ 4]) + data[51:],
            "short": data[:-7],
            "empty": b"",
            "of another template": working_set.encode([1], template="11" * 32, ram_pages=64),
            "too long": data + bytes(working_set.MAX_BYTES),
        }[damage]
    )
    assert len(template.working_set()) == 0
    assert not path.exists()
    template.keep_working_set([8])
    assert list(template.working_set()) == [8]


async def test_a_working_set_grows_by_what_later_clones_touch(store: TemplateStore) -> None:
    template = await store.get(KEY, build)
    template.keep_working_set([5, 3])
    assert template.extend_working_set([3, 9, 9, 7, SIZE // PAGE, 1], most=2) == 4
    assert list(template.working_set()) == [5, 3, 9, 7]
    assert template.extend_working_set([9], most=2) == 4
    assert [p.name for p in template.path.iterdir() if "new" in p.name] == []


def test_a_working_set_is_bounded_and_filled_in_order() -> None:
    pages = list(range(100_000, 0, -1))
    data = working_set.encode(pages, template="00" * 32, ram_pages=1 << 20)
    kept = working_set.decode(data, template="00" * 32, ram_pages=1 << 20)
    assert list(kept) == pages[: working_set.MAX_PAGES]
    filled = list(working_set.batches(kept))
    assert [p for batch in filled for p in sorted(batch, reverse=True)] == list(kept)
    assert all(list(batch) == sorted(batch) for batch in filled)
    with pytest.raises(InvalidInput, match="more pages"):
        working_set.decode(data, template="00" * 32, ram_pages=1000)


def test_pages_of_zeroes_become_holes(tmp_path: Path) -> None:
    source = os.memfd_create("ram")
    os.ftruncate(source, SIZE)
    os.pwrite(source, bytes(PAGE), 5 * PAGE)  # touched, but zero
    os.pwrite(source, b"x", 7 * PAGE)
    target = os.open(tmp_path / "ram", os.O_RDWR | os.O_CREAT)
    assert copy_ram(source, target, SIZE) == 1
    assert data_extents(target) == ((7, 1),)
    assert os.pread(target, SIZE, 0) == os.pread(source, SIZE, 0)
    os.close(source)
    os.close(target)
