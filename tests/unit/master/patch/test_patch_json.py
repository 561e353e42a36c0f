"""JSON patch and merge patch: the examples of their RFCs, and how they fail."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.kube.errors import ApiError
from hypervisor.master.patch.errors import MAX_OPERATIONS
from hypervisor.master.patch.json_patch import json_patch
from hypervisor.master.patch.merge_patch import merge_patch
from hypervisor.master.patch.values import copy

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3),
    max_leaves=12,
)
OBJECT = st.dictionaries(st.text("abc", max_size=2), JSON, max_size=4)


@pytest.mark.parametrize(
    ("doc", "operation", "result"),
    [
        ({"a": 1}, {"op": "add", "path": "/b", "value": 2}, {"a": 1, "b": 2}),
        ({"a": [1, 3]}, {"op": "add", "path": "/a/1", "value": 2}, {"a": [1, 2, 3]}),
        ({"a": [1]}, {"op": "add", "path": "/a/-", "value": 2}, {"a": [1, 2]}),
        ({"a": [1]}, {"op": "add", "path": "/a/1", "value": 2}, {"a": [1, 2]}),
        ({"a": 1, "b": 2}, {"op": "remove", "path": "/a"}, {"b": 2}),
        ({"a": [1, 2]}, {"op": "remove", "path": "/a/0"}, {"a": [2]}),
        ({"a": 1}, {"op": "replace", "path": "/a", "value": None}, {"a": None}),
        ({"a": [1, 2]}, {"op": "replace", "path": "/a/0", "value": 9}, {"a": [9, 2]}),
        ({"a": {"b": 1}, "c": {}}, {"op": "move", "from": "/a/b", "path": "/c/d"}, {"a": {}, "c": {"d": 1}}),
        ({"a": {"b": 1}}, {"op": "copy", "from": "/a", "path": "/c"}, {"a": {"b": 1}, "c": {"b": 1}}),
        ({"a/b": 1, "m~n": 2}, {"op": "replace", "path": "/a~1b", "value": 3}, {"a/b": 3, "m~n": 2}),
        ({"": 1}, {"op": "test", "path": "/", "value": 1}, {"": 1}),
        ({"a": 1}, {"op": "test", "path": "/a", "value": 1.0}, {"a": 1}),
        ({"a": 1}, {"op": "replace", "path": "", "value": {"x": 1}}, {"x": 1}),
        ({}, {"op": "test", "path": "/gone", "value": None}, {}),
    ],
)
def test_operations(doc: Any, operation: Any, result: Any) -> None:
    before = copy(doc)
    assert json_patch(doc, [operation]) == result
    assert doc == before


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        ({"op": "test", "path": "/a", "value": True}, "testing value /a failed: test failed"),
        ({"op": "test", "path": "/x/y", "value": 1}, "doc is missing path"),
        ({"op": "remove", "path": "/x"}, 'doc is missing path: "/x"'),
        ({"op": "replace", "path": "/x", "value": 1}, "missing value"),
        ({"op": "add", "path": "/x/y", "value": 1}, "missing value"),
        ({"op": "add", "path": "/l/2", "value": 1}, "missing value"),
        ({"op": "add", "path": "/l/01", "value": 1}, "missing value"),
        ({"op": "remove", "path": "/l/-"}, "missing value"),
        ({"op": "move", "from": "/o", "path": "/o/p"}, "into itself"),
        ({"op": "add", "path": "a", "value": 1}, "no JSON pointer"),
        ({"op": "add", "path": "/a"}, "has no value"),
        ({"op": "frob", "path": "/a"}, "Unexpected kind"),
        ({"op": ["add"], "path": "/a"}, "Unexpected kind"),
        ({"op": "add"}, "has no path"),
    ],
)
def test_what_does_not_apply(operation: Any, message: str) -> None:
    with pytest.raises(ApiError, match=re.escape(message)) as caught:
        json_patch({"a": 1, "l": [0], "o": {}}, [operation])
    assert (caught.value.reason, caught.value.code) == ("Invalid", 422)


@pytest.mark.parametrize("patch", [{}, "x", 3, [3]])
def test_what_is_no_patch(patch: Any) -> None:
    with pytest.raises(ApiError) as caught:
        json_patch({}, patch)
    assert caught.value.code == 400


def test_too_many_operations() -> None:
    with pytest.raises(ApiError) as caught:
        json_patch({}, [{"op": "test", "path": "/a"}] * (MAX_OPERATIONS + 1))
    assert caught.value.code == 413


def test_copies_cannot_grow_without_bounds() -> None:
    operations = [{"op": "add", "path": "/a", "value": [0] * 10}]
    operations += [{"op": "copy", "from": "/a", "path": "/a/-"}] * 60
    with pytest.raises(ApiError, match="adds more values"):
        json_patch({}, operations)


@given(OBJECT, OBJECT)
def test_a_document_can_be_replaced_member_by_member(old: dict[str, Any], new: dict[str, Any]) -> None:
    operations: list[dict[str, Any]] = [{"op": "remove", "path": f"/{key}"} for key in old]
    operations += [{"op": "add", "path": f"/{key}", "value": value} for key, value in new.items()]
    assert json_patch(old, operations) == new


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_the_examples_of_rfc_7386(target: Any, patch: Any, result: Any) -> None:
    assert merge_patch(target, patch) == result


@pytest.mark.parametrize("patch", [["c"], "bar", None])
def test_a_merge_patch_is_an_object(patch: Any) -> None:
    with pytest.raises(ApiError) as caught:
        merge_patch({"a": "foo"}, patch)
    assert caught.value.code == 400


@given(OBJECT, OBJECT)
def test_merging_twice_is_merging_once(old: dict[str, Any], patch: dict[str, Any]) -> None:
    once = merge_patch(old, patch)
    assert merge_patch(once, patch) == once
