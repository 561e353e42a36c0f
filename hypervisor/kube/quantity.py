"""Kubernetes quantities (``128Mi``, ``500m``, ``1e3``), parsed exactly: no float ever holds one."""

from __future__ import annotations

import re
from fractions import Fraction

from hypervisor.errors import InvalidInput

_BINARY = {f"{letter}i": Fraction(1024**power) for power, letter in enumerate("KMGTPE", start=1)}
_DECIMAL = {"n": Fraction(1, 10**9), "u": Fraction(1, 10**6), "m": Fraction(1, 1000), "": Fraction(1)} | {
    letter: Fraction(1000**power) for power, letter in enumerate("kMGTPE", start=1)
}
_SUFFIXES = _BINARY | _DECIMAL
UNITS = "m, k, M, G, T, P, E (powers of 1000) and Ki, Mi, Gi, Ti, Pi, Ei (powers of 1024)"

# An exponent has a digit after the letter; `E` alone is exa. Bounded, so that nobody makes us compute 10**999999999.
_QUANTITY = re.compile(
    r"(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))(?:[eE](?P<exponent>[+-]?[0-9]{1,3})|(?P<unit>[A-Za-z]*))"
)
_MAX_LENGTH = 64
_MAX = 2**63 - 1


def parse_quantity(value: object, *, where: str = "") -> Fraction:
    """The exact value of a quantity as a manifest has it: a string, or a plain number.

    :param where: path of the field, for the error
    :raises InvalidInput: not a quantity, an unknown unit, negative, or 2**63 and more
    """
    text = _text(value, where)
    match = _QUANTITY.fullmatch(text) if len(text) <= _MAX_LENGTH else None
    if match is None:
        shown = text[:_MAX_LENGTH]
        raise InvalidInput(f"{shown!r} is no quantity; write a number and a unit out of {UNITS}", where=where)
    number = Fraction(match["number"])
    if match["exponent"] is not None:
        number *= Fraction(10) ** int(match["exponent"])
    else:
        number *= _unit(match["unit"], text, where)
    if number < 0:
        raise InvalidInput(f"{text!r} is negative", where=where)
    if number > _MAX:
        raise InvalidInput(f"{text!r} is more than a quantity can hold (2^63 - 1)", where=where)
    return number


def _text(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(value)  # the shortest text that reads back as this float: 0.1 is 1/10, not its nearest binary
    raise InvalidInput(f"must be a quantity (a string or a number), not {type(value).__name__}", where=where)


def _unit(unit: str, text: str, where: str) -> Fraction:
    factor = _SUFFIXES.get(unit)
    if factor is not None:
        return factor
    hint = _unit_hint(unit)
    raise InvalidInput(f"{text!r} has the unknown unit {unit!r}; {hint}the units are {UNITS}", where=where)


def _unit_hint(unit: str) -> str:
    """What was probably meant: ``MB``, ``mb``, ``MiB``, ``mi`` and ``K`` are what people write."""
    base = unit.rstrip("bB")
    for candidate in (base, base[:1].upper() + base[1:].lower(), base.lower()):
        if candidate and candidate != unit and candidate in _SUFFIXES:
            return f"did you mean {candidate!r}? "
    return "did you mean 'k' or 'Ki'? " if base == "K" else ""


def parse_bytes(value: object, *, where: str = "") -> int:
    """A quantity of bytes.

    :raises InvalidInput: as `parse_quantity`, or a fraction of a byte (``128m`` is 0.128 bytes, which nobody means)
    """
    number = parse_quantity(value, where=where)
    if number.denominator != 1:
        raise InvalidInput(
            f"{str(value)!r} is a fraction of a byte ('m' means one thousandth); did you mean 'M' or 'Mi'?", where=where
        )
    return int(number)


def parse_cpu_millis(value: object, *, where: str = "") -> int:
    """A quantity of CPUs in thousandths, rounded up as Kubernetes does; raises like `parse_quantity`."""
    number = parse_quantity(value, where=where) * 1000
    return -(-number.numerator // number.denominator)


def format_cpu_millis(millis: int) -> str:
    """Thousandths of CPUs as the shortest exact quantity: 1500 is ``1500m``, 2000 is ``2``."""
    return f"{millis}m" if millis % 1000 else str(millis // 1000)


def format_bytes(count: int) -> str:
    """`count` bytes as the shortest exact quantity with a binary unit: 134217728 is ``128Mi``."""
    for unit in reversed(_BINARY):
        factor = int(_BINARY[unit])
        if count and count % factor == 0:
            return f"{count // factor}{unit}"
    return str(count)
