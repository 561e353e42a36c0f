"""Selectors as text and as objects: what they match, and what is said of those that cannot be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.kube.errors import ApiError
from hypervisor.kube.selectors import LabelSelector, parse_fields, parse_labels

LABELS = {"app": "web", "tier": "front", "empty": "", "n": "7"}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("app=web", True),
        ("app==web,tier=front", True),
        (" app = web , !gone ", True),
        ("app!=web", False),
        ("gone!=web", True),
        ("app in (web,api)", True),
        ("app in (api)", False),
        ("gone notin (a)", True),
        ("app notin (web)", False),
        ("app", True),
        ("!app", False),
        ("gone", False),
        ("empty=", True),
        ("empty in (,x)", True),
        ("n>6", True),
        ("n<7", False),
        ("app>1", False),
        ("example.com/x!=1", True),
    ],
)
def test_labels(text: str, matches: bool) -> None:
    assert parse_labels(text).matches(LABELS) is matches


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a b", "found 'b', expected: in, notin, =, ==, !=, gt, lt"),
        ("a=b=c", "found '=', expected: ',' or 'end of string'"),
        ("a=b,", "found '', expected: identifier after ','"),
        ("a in b", "found 'b' expected: '('"),
        ("a in (b", "found '', expected: ',' or ')'"),
        ("=a", "found '=', expected: !, identifier, or 'end of string'"),
        ("-a=b", 'key: Invalid value: "-a": name part must consist of'),
        ("a=-b", 'values[0][a]: Invalid value: "-b": a valid label must be'),
        ("a>x", "the value must be an integer"),
        ("a=" + "x" * 64, "must be no more than 63 bytes"),
        ("A.B/c=d", "prefix part"),
    ],
)
def test_unreadable_labels(text: str, said: str) -> None:
    with pytest.raises(ApiError) as e:
        parse_labels(text)
    assert e.value.reason == "BadRequest" and said in str(e.value)


@given(st.text(alphabet="ab-=!,() <>in/.", max_size=20))
def test_any_text_is_a_selector_or_an_error_and_reads_back(text: str) -> None:
    try:
        selector = parse_labels(text)
    except ApiError:
        return
    assert parse_labels(str(selector)) == selector


def test_objects() -> None:
    assert LabelSelector.of({}).matches(LABELS)
    assert not LabelSelector.of(None).matches(LABELS)
    selector = LabelSelector.of(
        {
            "matchLabels": {"app": "web"},
            "matchExpressions": [
                {"key": "tier", "operator": "In", "values": ["front", "back"]},
                {"key": "gone", "operator": "DoesNotExist"},
            ],
        }
    )
    assert selector.matches(LABELS) and not selector.matches({"app": "web"})
    assert parse_labels(str(selector)) == selector


@pytest.mark.parametrize(
    "item",
    [
        {"key": "a", "operator": "In"},
        {"key": "a", "operator": "Exists", "values": ["b"]},
        {"key": "a", "operator": "Near", "values": ["b"]},
        {"key": "a b", "operator": "Exists"},
    ],
)
def test_objects_that_cannot_be(item: dict[str, object]) -> None:
    with pytest.raises(ApiError):
        LabelSelector.of({"matchExpressions": [item]})


POD = {"metadata": {"name": "a,b", "namespace": "x"}, "spec": {"nodeName": "n", "hostNetwork": True}, "status": {}}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("spec.nodeName=n", True),
        ("spec.nodeName==n,metadata.namespace=x", True),
        ("spec.nodeName!=n", False),
        ("status.phase=", True),
        ("status.phase!=Failed", True),
        (r"metadata.name=a\,b", True),
        ("spec.hostNetwork=true", True),
    ],
)
def test_fields(text: str, matches: bool) -> None:
    selector = parse_fields(text)
    assert selector.matches_object(POD) is matches
    assert parse_fields(str(selector)) == selector


@pytest.mark.parametrize("text", ["a", "a=b,c", "a=b=c"])
def test_unreadable_fields(text: str) -> None:
    with pytest.raises(ApiError, match="invalid selector"):
        parse_fields(text)


@given(st.text(alphabet="ab.=!\\,", max_size=20))
def test_any_text_is_fields_or_an_error(text: str) -> None:
    try:
        selector = parse_fields(text)
    except ApiError:
        return
    assert parse_fields(str(selector)) == selector
