"""Records: what is written is read back the same, anything else is refused by path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.errors import InvalidInput
from hypervisor.vmm import records


@dataclass(frozen=True)
class Inner:
    kind: Literal["a", "b"]
    size: int | None


@dataclass(frozen=True)
class Outer:
    path: Path
    ratio: float
    on: bool
    pairs: tuple[tuple[str, int], ...]
    table: dict[str, Path]
    inner: Inner | None


inners = st.builds(Inner, st.sampled_from(["a", "b"]), st.none() | st.integers())
outers = st.builds(
    Outer,
    st.text(min_size=1).map(Path),
    st.floats(allow_nan=False),
    st.booleans(),
    st.lists(st.tuples(st.text(), st.integers())).map(tuple),
    st.dictionaries(st.text(), st.text(min_size=1).map(Path)),
    st.none() | inners,
)


@given(outers)
def test_round_trip(value: Outer) -> None:
    assert records.loads(Outer, records.dumps(value), where="x") == value


GOOD = '{"path":"/p","ratio":1,"on":true,"pairs":[["a",1]],"table":{"k":"/v"},"inner":{"kind":"a","size":null}}'


def test_an_integer_will_do_for_a_float() -> None:
    assert records.loads(Outer, GOOD, where="f").ratio == 1.0


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ('"on":true,', "", "f.on"),
        ('"on":true', '"on":1', "f.on"),
        ('"on":true', '"on":true,"off":1', "f.off"),
        ('["a",1]', '["a"]', "f.pairs[0]"),
        ('["a",1]', '["a","1"]', "f.pairs[0][1]"),
        ('"/v"', "3", "f.table.k"),
        ('"kind":"a"', '"kind":"c"', "f.inner.kind"),
        ('"size":null', '"size":true', "f.inner.size"),
        ("{", "", "f"),
        (GOOD, "[]", "f"),
        (GOOD, "[" * 100_000, "f"),
    ],
)
def test_refused_by_path(old: str, new: str, where: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        records.loads(Outer, GOOD.replace(old, new, 1), where="f")
    assert caught.value.where == where
