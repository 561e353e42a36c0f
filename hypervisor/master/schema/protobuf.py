"""Bodies in protobuf, which Go clients send: decoded to what the same body in JSON would be.

The types are those of the published schema; the numbers of fields, which it lacks, are in ``protobuf-fields.txt`` (made
by ``tools/schema/protobuf-fields``). Answers are JSON always: such clients accept both.

Source: Kubernetes, "API Concepts" (protobuf encoding); Protocol Buffers, "Encoding".
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypervisor.kube.errors import ApiError, bad_request
from hypervisor.kube.meta import rfc3339
from hypervisor.master.kinds.table import KINDS
from hypervisor.master.schema.load import META, Schema
from hypervisor.master.schema.types import ListOf, MapOf, Scalar, Struct, Type

MAGIC = b"k8s\x00"
TABLE = Path(__file__).with_name("protobuf-fields.txt")
MAX_DEPTH = 64
_OTHER = {
    ("policy/v1", "Eviction"): "io.k8s.api.policy.v1.Eviction",
    ("v1", "Binding"): "io.k8s.api.core.v1.Binding",
    ("authentication.k8s.io/v1", "TokenRequest"): "io.k8s.api.authentication.v1.TokenRequest",
    ("autoscaling/v1", "Scale"): "io.k8s.api.autoscaling.v1.Scale",
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_UTF8 = "utf-8"


class _Malformed(Exception):
    """No protobuf, or not of the type that it says."""


@dataclass(frozen=True, slots=True)
class _Field:
    """:ivar name: in JSON; of an inline field the message whose fields JSON has here
    :ivar mark: see ``tools/schema/protobuf-fields``
    """

    name: str
    mark: str


def decode_protobuf(body: bytes) -> dict[str, Any]:
    """The object in `body`, with apiVersion and kind.

    :raises ApiError: 400, it is no object in protobuf, or of a kind that is not served
    """
    if not body.startswith(MAGIC):
        raise bad_request("the body is no protobuf of the API: it must begin with the bytes 'k8s' and 0")
    try:
        version, kind, raw = _envelope(body[len(MAGIC) :])
        name = _schema_name(version, kind)
        if name not in table():
            raise ApiError("UnsupportedMediaType", f"a {kind} is not taken in protobuf: send it as JSON or YAML")
        value = _message(raw, Schema.load().type_of(name), name, 0)
    except (_Malformed, UnicodeDecodeError, OverflowError) as e:
        raise bad_request(f"the protobuf body cannot be decoded: {e}") from e
    return {"apiVersion": version, "kind": kind} | value


def _envelope(body: bytes) -> tuple[str, str, bytes]:
    version = kind = ""
    raw = b""
    for number, value in _parts(body):
        if number == 1 and isinstance(value, bytes):
            for inner, text in _parts(value):
                if isinstance(text, bytes):
                    version = text.decode() if inner == 1 else version
                    kind = text.decode() if inner == 2 else kind
        elif number == 2 and isinstance(value, bytes):
            raw = value
        elif number == 3 and value:
            raise _Malformed("an encoding of the content is not known")
    return version, kind, raw


def _schema_name(version: str, kind: str) -> str:
    if kind == "DeleteOptions":
        return META + kind
    if (version, kind) in _OTHER:
        return _OTHER[version, kind]
    group, _, short = version.rpartition("/")
    found = KINDS.of_kind(group, short, kind)
    if found is None:
        raise _Malformed(f'no kind "{kind[:80]}" is served in version "{version[:80]}"')
    return found.schema


def _parts(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        value: int | bytes
        if kind == _VARINT:
            value, place = _varint(data, place)
        elif kind in (_FIXED64, _FIXED32):
            end = place + (8 if kind == _FIXED64 else 4)
            value, place = int.from_bytes(data[place:end], "little"), end
        elif kind == _BYTES:
            length, place = _varint(data, place)
            value, place = data[place : place + length], place + length
        else:
            raise _Malformed(f"wire type {kind}")
        if place > len(data):
            raise _Malformed("it ends too early")
        yield key >> 3, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise _Malformed("it ends too early")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, place
    raise _Malformed("a number is too long")


def _message(data: bytes, struct: Struct, name: str, depth: int) -> dict[str, Any]:
    if depth > MAX_DEPTH:
        raise _Malformed(f"nested more than {MAX_DEPTH} levels deep")
    fields = table().get(name, {})
    made: dict[str, Any] = {}
    for number, value in _parts(data):
        field = fields.get(number)
        if field is None:
            continue  # a newer client's, as upstream's decoder passes over it
        if field.mark == "~":
            made |= _message(_bytes(value), struct, field.name, depth + 1)
        else:
            _put(made, field, value, struct.fields.get(field.name), depth)
    return {key: value for key, value in made.items() if value is not None}


def _put(made: dict[str, Any], field: _Field, value: int | bytes, kind: Type | None, depth: int) -> None:
    if isinstance(kind, ListOf):
        made.setdefault(field.name, []).append(_value(value, kind.item, depth))
    elif isinstance(kind, MapOf):
        key, item = _entry(_bytes(value), kind.item, depth)
        made.setdefault(field.name, {})[key] = item
    elif kind is not None:
        decoded = _value(value, kind, depth)
        zero = decoded in ("", 0, {}) or decoded is None
        if not (zero and field.mark == ":"):
            made[field.name] = decoded


def _entry(data: bytes, kind: Type, depth: int) -> tuple[str, Any]:
    parts = dict(_parts(data))
    value = parts.get(2, b"")
    if isinstance(kind, ListOf):  # a message of its own, whose one field is the list
        return _text(parts.get(1, b"")), [_value(v, kind.item, depth) for n, v in _parts(_bytes(value)) if n == 1]
    return _text(parts.get(1, b"")), _value(value, kind, depth)


def _value(value: int | bytes, kind: Type, depth: int) -> Any:
    if isinstance(kind, Struct):
        return _message(_bytes(value), kind, kind.name, depth + 1)
    if isinstance(kind, Scalar):
        return _SCALARS[kind.kind](value)
    if isinstance(kind, (ListOf, MapOf)):
        raise _Malformed("a list in a list")
    return _any(_bytes(value))


def _any(data: bytes) -> Any:
    """What has no type: its one field holds JSON."""
    from hypervisor.master.schema.decode import decode_json

    for number, value in _parts(data):
        if number == 1 and value:
            return decode_json(_bytes(value))[0]
    return None


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise _Malformed("a number where a message is expected")
    return value


def _text(value: int | bytes) -> str:
    return _bytes(value).decode(_UTF8)


def _integer(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise _Malformed("a message where a number is expected")
    return value - (1 << 64) if value >> 63 else value


def _quantity(value: int | bytes) -> str:
    return next((_text(v) for n, v in _parts(_bytes(value)) if n == 1), "0")


def _int_or_string(value: int | bytes) -> int | str:
    parts = dict(_parts(_bytes(value)))
    return _text(parts.get(3, b"")) if parts.get(1) == 1 else _integer(parts.get(2, 0))


def _time(value: int | bytes, *, micro: bool = False) -> str | None:
    parts = {n: _integer(v) for n, v in _parts(_bytes(value))}
    if not parts:
        return None
    return rfc3339(parts.get(1, 0) + (parts.get(2, 0) / 1e9 if micro else 0), micro=micro)


_SCALARS: Mapping[str, Callable[[int | bytes], Any]] = {
    "string": _text,
    "integer": _integer,
    "number": _integer,
    "boolean": lambda value: bool(_integer(value)),
    "bytes": lambda value: base64.b64encode(_bytes(value)).decode(),
    "quantity": _quantity,
    "int-or-string": _int_or_string,
    "time": _time,
    "micro-time": lambda value: _time(value, micro=True),
}


@functools.cache
def table() -> Mapping[str, Mapping[int, _Field]]:
    """Fields by message and number."""
    lines = (line.split() for line in TABLE.read_text().splitlines() if not line.startswith("#"))
    return {name: dict(map(_parse, fields)) for name, *fields in lines}


def _parse(text: str) -> tuple[int, _Field]:
    digits = len(text) - len(text.lstrip("0123456789"))
    return int(text[:digits]), _Field(text[digits + 1 :], text[digits])


def reached(messages: Mapping[str, str]) -> set[str]:
    """Of all messages those that requests are made of; for the tool that makes the table."""
    schema, found = Schema.load(), set[str]()
    todo = [kind.schema for kind in KINDS] + [*_OTHER.values(), META + "DeleteOptions"]
    while todo:
        name = todo.pop()
        if name in found or name not in messages:
            continue
        found.add(name)
        todo += [field.name for _, field in map(_parse, messages[name].split()) if field.mark == "~"]
        try:
            todo += [s.name for kind in schema.type_of(name).fields.values() for s in _structs(kind)]
        except KeyError:
            continue
    return found


def _structs(kind: Type) -> Iterator[Struct]:
    while isinstance(kind, (ListOf, MapOf)):
        kind = kind.item
    if isinstance(kind, Struct):
        yield kind
