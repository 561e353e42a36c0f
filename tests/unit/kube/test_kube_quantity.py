"""Quantities: exact, whatever their spelling; a clear refusal for what people get wrong."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.errors import InvalidInput
from hypervisor.kube.quantity import format_bytes, parse_bytes, parse_cpu_millis, parse_quantity

BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
DECIMAL = {"m": Fraction(1, 1000), "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@pytest.mark.parametrize(
    ("text", "value"),
    [("128Mi", 134217728), ("1e3", 1000), ("1E3", 1000), ("1E", 10**18), ("1.5Gi", 1610612736), ("+5k", 5000)],
)
def test_bytes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    ("value", "millis"), [("500m", 500), (1, 1000), (0.1, 100), ("0.0001", 1), ("2", 2000), ("100u", 1)]
)
def test_cpu_rounds_up_to_thousandths(value: object, millis: int) -> None:
    assert parse_cpu_millis(value) == millis


@given(st.integers(0, 10**6), st.sampled_from(sorted(BINARY | DECIMAL)))
def test_a_whole_number_and_a_unit_is_their_product(number: int, unit: str) -> None:
    assert parse_quantity(f"{number}{unit}") == number * Fraction((BINARY | DECIMAL)[unit])


@given(st.decimals(0, 10**9, allow_nan=False, places=6))
def test_decimals_are_exact(number: object) -> None:
    assert parse_quantity(str(number)) == Fraction(str(number))


@given(st.integers(0, 2**53))
def test_format_reads_back(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == count


@given(st.text(max_size=20))
def test_any_text_is_a_quantity_or_a_clear_error(text: str) -> None:
    try:
        assert parse_quantity(text, where="here") >= 0
    except InvalidInput as e:
        assert str(e).startswith("here: ")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("128MB", "did you mean 'M'?"),
        ("128mb", "did you mean"),
        ("1K", "did you mean 'k'?"),
        ("128m", "fraction of a byte"),
        ("-1", "negative"),
        ("9Ei", "more than a quantity can hold"),
        ("1e999", "more than a quantity can hold"),
        ("lots", "no quantity"),
        ("", "no quantity"),
        (True, "not bool"),
        (None, "not NoneType"),
    ],
)
def test_refusals_say_what_is_wrong(value: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=message.replace("?", r"\?")):
        parse_bytes(value, where="spec.x")
