"""Hostile YAML is refused before it takes memory, time or the process."""

from __future__ import annotations

import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.controller import yaml_bounds
from hypervisor.controller.manifest import load_documents
from hypervisor.errors import InvalidInput

POWERS = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]" for i in range(12))
HOSTILE = {
    "powers of ten": (POWERS, "line .*stands for more than"),
    "deep lists": ("a: " + "[" * 100_000, "line 1: is nested more than"),
    "deep maps": ("{a: " * 100_000, "line 1: is nested more than"),
    "deep blocks": ("- " * 100_000, "line 1: is nested more than"),
    "deep and closed": ("a: " + "[" * 50_000 + "]" * 50_000, "line 1: is nested more than"),
    "an alias within its own anchor": ("a: &a [*a]", "within its own anchor"),
    "an alias of nothing": ("a: *b", "undefined alias"),
    "no end": ("a: [1", "not YAML: line"),
}


@pytest.mark.parametrize(("text", "said"), HOSTILE.values(), ids=HOSTILE.keys())
def test_refused_quickly(text: str, said: str) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidInput, match=said):
        load_documents(text)
    assert time.monotonic() - began < 20


def size(value: object) -> int:
    """Values, keys included."""
    if isinstance(value, dict):
        return 1 + sum(size(k) + size(v) for k, v in value.items())
    return 1 + sum(map(size, value)) if isinstance(value, list) else 1


NAMES = st.text("ab", min_size=1, max_size=3)
SHARED = st.recursive(NAMES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))


@given(SHARED, st.integers(0, 5))
def test_aliases_count_as_what_they_stand_for(value: object, times: int) -> None:
    document = [value] * (times + 1)  # dumped as an anchor and its aliases, where it is a collection
    text = yaml.safe_dump(document)
    assert yaml_bounds.count(yaml.parse(text)) == size(document)
