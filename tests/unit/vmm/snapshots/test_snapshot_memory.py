"""Layers and what goes into them: guest RAM made up, files real."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.errors import InvalidInput
from hypervisor.vmm.snapshots.index import TEMPLATE, ZERO, Piece
from hypervisor.vmm.snapshots.layer import FRAME_PAGES, PAGE, LayerWriter, check_layer
from hypervisor.vmm.snapshots.memory import Base, Difference, write_difference

PAGES = 600


def page(n: int) -> bytes:
    return n.to_bytes(4, "big") * (PAGE // 4)


def write_layer(path: Path, pages: list[bytes]) -> str:
    with path.open("wb") as file:
        writer = LayerWriter(file.fileno())
        for content in pages:
            writer.add(content)
        return writer.finish()


def age(path: Path) -> None:
    """What was verified under the old time is looked at again."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, FRAME_PAGES, FRAME_PAGES + 1])
def test_layer_is_whole(tmp_path: Path, count: int) -> None:
    path = tmp_path / "layer"
    identity = write_layer(path, [page(n) for n in range(count)])
    age(path)
    check_layer(path, identity, count)
    assert path.read_bytes()[: count * PAGE] == b"".join(page(n) for n in range(count))


def test_each_class_of_flipped_byte_is_seen(tmp_path: Path) -> None:
    path, count = tmp_path / "layer", FRAME_PAGES + 2
    identity = write_layer(path, [page(n) for n in range(count)])
    size = path.stat().st_size
    inside = [0, FRAME_PAGES * PAGE, count * PAGE - 1]
    for at in (*inside, *range(count * PAGE, size)):
        data = bytearray(path.read_bytes())
        data[at] ^= 0x40
        bad = tmp_path / f"bad-{at}"
        bad.write_bytes(data)
        with pytest.raises(InvalidInput, match=f"bad-{at}: (was changed|has version)"):
            check_layer(bad, identity, count)


def test_truncated_missing_or_another(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    identity = write_layer(path, [page(1)])
    other = tmp_path / "other"
    write_layer(other, [page(2)])
    with pytest.raises(InvalidInput, match="other: was changed, or is another layer"):
        check_layer(other, identity, 1)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InvalidInput, match="layer: has 4123 bytes instead of 4124"):
        check_layer(path, identity, 1)
    path.unlink()
    with pytest.raises(InvalidInput, match=r"layer: cannot be read: No such file"):
        check_layer(path, identity, 1)


# ---- differences -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, PAGES * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def template(tmp_path: Path) -> Iterator[int]:
    """Pages 100 to 400 have data."""
    path = tmp_path / "template"
    path.write_bytes(bytes(100 * PAGE) + b"".join(page(n) for n in range(100, 400)) + bytes(200 * PAGE))
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


FRESH = [Piece(0, 100, ZERO, 0), Piece(100, 300, TEMPLATE, 100), Piece(400, 200, ZERO, 0)]


def save(ram: int, base: Base, path: Path) -> Difference:
    with path.open("wb") as file:
        writer = LayerWriter(file.fileno())
        difference = write_difference(ram, base, writer)
        writer.finish()
    return difference


def test_untouched_ram_is_as_its_base(ram: int, template: int, tmp_path: Path) -> None:
    assert save(ram, Base(FRESH, [template]), tmp_path / "layer") == (FRESH, 0, 0, [])


def test_what_is_present_and_the_same_is_left_out(ram: int, template: int, tmp_path: Path) -> None:
    os.pwrite(ram, b"".join(page(n) for n in range(200, 210)), 200 * PAGE)
    os.pwrite(ram, bytes(PAGE), 10 * PAGE)
    assert save(ram, Base(FRESH, [template]), tmp_path / "layer") == (FRESH, 11, 0, [10, *range(200, 210)])


def test_zeroes_and_changes(ram: int, template: int, tmp_path: Path) -> None:
    os.pwrite(ram, bytes(PAGE), 200 * PAGE)  # where the template has data
    os.pwrite(ram, page(7) + page(8), 300 * PAGE)
    difference = save(ram, Base(FRESH, [template]), tmp_path / "layer")
    assert difference.pieces == [
        Piece(0, 100, ZERO, 0), Piece(100, 100, TEMPLATE, 100), Piece(200, 1, ZERO, 0),
        Piece(201, 99, TEMPLATE, 201), Piece(300, 2, 1, 0), Piece(302, 98, TEMPLATE, 302), Piece(400, 200, ZERO, 0),
    ]  # fmt: skip
    assert (difference.looked_at, difference.written, difference.touched) == (3, 2, [200, 300, 301])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(st.integers(0, 2**32), min_size=1, max_size=6))
def test_a_chain_gives_back_what_ram_held(template: int, tmp_path: Path, rounds: list[int]) -> None:
    """Each round is a guest that starts from the last snapshot with nothing present, writes, and is saved."""
    truth = [bytes(PAGE)] * 100 + [page(n) for n in range(100, 400)] + [bytes(PAGE)] * 200
    pieces, fds = list(FRESH), [template]
    try:
        for number, seed in enumerate(rounds, 1):
            base, dice = Base(pieces, fds), random.Random(seed)
            ram = os.memfd_create("ram")
            os.ftruncate(ram, PAGES * PAGE)
            for at in dice.sample(range(PAGES), dice.randrange(1, 80)):
                content = dice.choice((bytes(PAGE), page(dice.randrange(2**31)), truth[at]))
                os.pwrite(ram, content, at * PAGE)
                truth[at] = content
            pieces = save(ram, base, tmp_path / f"layer-{number}").pieces
            os.close(ram)
            fds.append(os.open(tmp_path / f"layer-{number}", os.O_RDONLY))
            assert Base(pieces, fds).read(0, PAGES) == b"".join(truth)
    finally:
        for fd in fds[1:]:
            os.close(fd)
