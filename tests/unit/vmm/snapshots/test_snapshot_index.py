"""The index of a snapshot: overlays keep every page, and no damaged file is taken for an index."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.errors import InvalidInput
from hypervisor.vmm.snapshots.index import TEMPLATE, ZERO, Piece, decode, encode, joined, overlay, within

PAGES = 64


def pieces_of(table: list[tuple[int, int]]) -> list[Piece]:
    return joined(Piece(i, 1, source, page) for i, (source, page) in enumerate(table))


def table_of(pieces: list[Piece]) -> list[tuple[int, int]]:
    return [
        (p.source, 0 if p.source == ZERO else p.page + i) for p in pieces for i in range(p.pages)
    ]  # the place of a page of zeroes is no matter


tables = st.lists(
    st.one_of(st.just((ZERO, 0)), st.tuples(st.integers(1, 2), st.integers(0, 9)), st.just((TEMPLATE, -1))),
    min_size=1, max_size=PAGES,
).map(lambda t: [(s, i if s == TEMPLATE else p) for i, (s, p) in enumerate(t)])  # fmt: skip


@given(tables, st.data())
def test_overlay_is_page_by_page(table: list[tuple[int, int]], data: st.DataObject) -> None:
    changed = sorted(data.draw(st.sets(st.integers(0, len(table) - 1))))
    changes = joined(Piece(page, 1, 3, n) for n, page in enumerate(changed))
    expected = list(table)
    for n, page in enumerate(changed):
        expected[page] = (3, n)
    assert table_of(overlay(pieces_of(table), changes)) == expected


@given(tables, st.integers(0, PAGES), st.integers(0, PAGES))
def test_within_is_a_slice(table: list[tuple[int, int]], first: int, count: int) -> None:
    assert table_of(list(within(pieces_of(table), first, count))) == table[first : first + count]


@given(tables)
def test_what_is_encoded_is_decoded(table: list[tuple[int, int]]) -> None:
    pieces = pieces_of(table)
    data = encode(pieces, ram_pages=len(table), layers=2)
    assert decode(data, ram_pages=len(table), layers=[10, 10]) == pieces


GOOD = encode(pieces_of([(TEMPLATE, 0), (ZERO, 0), (1, 4), (2, 5)]), ram_pages=4, layers=2)


def sealed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize("i", range(len(GOOD)))
def test_each_flipped_byte_is_seen(i: int) -> None:
    bad = bytearray(GOOD)
    bad[i] ^= 1
    with pytest.raises(InvalidInput, match="index"):
        decode(bytes(bad), ram_pages=4, layers=[10, 10])


@given(st.binary(max_size=200), st.integers(0, len(GOOD) - 32))
@settings(max_examples=300)
def test_nothing_but_an_index_is_taken_for_one(noise: bytes, at: int) -> None:
    """With a checksum that fits, as whoever writes files on purpose would have."""
    body = GOOD[:-32]
    data = sealed(body[:at] + noise + body[at + len(noise) :])
    try:
        pieces = decode(data, ram_pages=4, layers=[10, 10])
    except InvalidInput:
        return
    sizes = {TEMPLATE: 4, 1: 10, 2: 10, ZERO: 4}
    assert sum(p.pages for p in pieces) == 4
    assert all(p.page + p.pages <= sizes[p.source] for p in pieces)


@pytest.mark.parametrize(
    ("table", "layers"),
    [([(1, 9), (1, 10)], [10, 10]), ([(3, 0)], [10, 10]), ([(TEMPLATE, 1)], [10, 10])],
    ids=["beyond a layer", "a layer that is not there", "a page of the template in another place"],
)
def test_pages_that_a_source_has_not(table: list[tuple[int, int]], layers: list[int]) -> None:
    data = encode(pieces_of(table), ram_pages=len(table), layers=len(layers))
    with pytest.raises(InvalidInput, match="names pages"):
        decode(data, ram_pages=len(table), layers=layers)


def test_gaps() -> None:
    for pieces in ([Piece(1, 3, ZERO, 0)], [Piece(0, 3, ZERO, 0)], [Piece(0, 2, ZERO, 0), Piece(1, 2, ZERO, 0)]):
        with pytest.raises(InvalidInput, match=r"gap|ends at"):
            decode(encode(pieces, ram_pages=4, layers=0), ram_pages=4, layers=[])
