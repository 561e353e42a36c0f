"""Values without parts: what is accepted for each, and the one form in which it is kept.

Kept forms follow upstream's encoder, so that what a client wrote twice is equal twice: quantities canonical
(``1000m`` is ``1``), times in UTC.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

from hypervisor.master.schema.types import Scalar

_BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_DECIMAL = ("n", "u", "m", "", "k", "M", "G", "T", "P", "E")
_FACTORS = {suffix: Fraction(1024) ** power for power, suffix in enumerate(_BINARY)} | {
    suffix: Fraction(1000) ** (power - 3) for power, suffix in enumerate(_DECIMAL)
}
_QUANTITY = re.compile(
    r"([+-]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40}))(?:[eE]([+-]?[0-9]{1,2})|([numkMGTPE]|[KMGTPE]i)?)"
)
_UTC = re.compile(r"[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z")
_MICRO = re.compile(r"[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]\.[0-9]{6}Z")
_RANGE = {32: range(-(2**31), 2**31), 64: range(-(2**63), 2**63)}
NO_QUANTITY = "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
"""Upstream's message for a string that is no quantity."""


class Unfit(ValueError):
    """A value that its type does not have; the message is the reason, without the path."""


def accept(value: Any, scalar: Scalar) -> Any:
    """`value` in the form in which it is kept.

    :raises Unfit: it is of another type, or not in its range or format
    """
    return _ACCEPT[scalar.kind](value, scalar)


def _string(value: Any, scalar: Scalar) -> str:
    if type(value) is str:
        return value
    raise Unfit(_mismatch(value, scalar))


def _boolean(value: Any, scalar: Scalar) -> bool:
    if type(value) is bool:
        return value
    raise Unfit(_mismatch(value, scalar))


def _integer(value: Any, scalar: Scalar) -> int:
    if type(value) is not int:
        raise Unfit(_mismatch(value, scalar))
    if value not in _RANGE[scalar.bits]:
        raise Unfit(f"json: cannot unmarshal number {value} into Go struct field {{field}} of type {scalar.go}")
    return value


def _number(value: Any, scalar: Scalar) -> float:
    if type(value) in (int, float):
        return float(value)
    raise Unfit(_mismatch(value, scalar))


def _int_or_string(value: Any, scalar: Scalar) -> int | str:
    return _integer(value, Scalar("integer", 32)) if type(value) is int else _string(value, scalar)


def _bytes(value: Any, scalar: Scalar) -> str:
    text = _string(value, scalar)
    try:
        base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Unfit("illegal base64 data") from None
    return text


def _quantity(value: Any, scalar: Scalar) -> str:
    if type(value) is str:
        return canonical_quantity(value)
    if type(value) in (int, float):
        return canonical_quantity(repr(value))
    raise Unfit(_mismatch(value, scalar))


def _time(value: Any, scalar: Scalar) -> str:
    text = _string(value, scalar)
    return text if _UTC.fullmatch(text) else _parsed(text).strftime("%Y-%m-%dT%H:%M:%SZ")


def _micro_time(value: Any, scalar: Scalar) -> str:
    text = _string(value, scalar)
    return text if _MICRO.fullmatch(text) else _parsed(text).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _parsed(text: str) -> datetime:
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        parsed = None
    if parsed is None or parsed.tzinfo is None or "T" not in text:
        raise Unfit(f'parsing time "{text}" as "2006-01-02T15:04:05Z07:00": cannot parse "{text}"')
    return parsed.astimezone(UTC)


_ACCEPT = {
    "string": _string,
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
    "int-or-string": _int_or_string,
    "bytes": _bytes,
    "quantity": _quantity,
    "time": _time,
    "micro-time": _micro_time,
}


def json_type(value: Any) -> str:
    """What upstream's decoder calls a JSON value's type."""
    if isinstance(value, bool):
        return "bool"
    named = {str: "string", int: "number", float: "number", dict: "object", list: "array"}
    return named.get(type(value), "null")


def _mismatch(value: Any, scalar: Scalar) -> str:
    return f"json: cannot unmarshal {json_type(value)} into Go struct field {{field}} of type {scalar.go}"


@functools.lru_cache(maxsize=4096)
def quantity_value(text: str) -> Fraction:
    """The exact number of a quantity.

    :raises Unfit: it is none
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise Unfit(NO_QUANTITY)
    number, exponent, suffix = match.groups()
    scale = Fraction(10) ** int(exponent) if exponent else _FACTORS[suffix or ""]
    return Fraction(number) * scale


@functools.lru_cache(maxsize=4096)
def canonical_quantity(text: str) -> str:
    """The one way to write this quantity in the notation that `text` has: no fraction, the greatest unit.

    Finer than a billionth is rounded up, as upstream does.

    :raises Unfit: it is none
    """
    value = quantity_value(text)
    if "i" in text and value.denominator == 1 and abs(value) >= 1024:
        return _binary(value.numerator)
    nano = (
        -(-value.numerator * 10**9 // value.denominator) if value >= 0 else value.numerator * 10**9 // value.denominator
    )
    power = -9
    while nano and nano % 1000 == 0 and power < 18:
        nano, power = nano // 1000, power + 3
    if not nano:
        return "0"
    if "e" in text.lower() and text[-1] not in "Ei":
        return f"{nano}e{power}" if power else str(nano)
    return f"{nano}{_DECIMAL[power // 3 + 3]}"


def _binary(count: int) -> str:
    power = 0
    while count % 1024 == 0 and power < 6:
        count, power = count // 1024, power + 1
    return f"{count}{_BINARY[power]}"
