"""The Swagger 2.0 document in protobuf, the only form of it that kubectl and helm ask for.

kubectl checks a ``kind: List`` against it, and everything where it finds no OpenAPI 3 document. What is encoded is the
definitions, which is all that such checks read; the paths are in the JSON form.

Source: the message types of gnostic, openapiv2/OpenAPIv2.proto (field numbers), and the protobuf encoding
(https://protobuf.dev/programming-guides/encoding/).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MEDIA = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf"
ANSWERED = MEDIA.replace("@", ".")
"""What upstream's server calls it: Go does not take the other name for a media type."""
_LENGTH = 2
_DOCUMENT = {"swagger": 1, "info": 2, "paths": 8, "definitions": 9}
_TEXTS = {"$ref": 1, "format": 2, "title": 3, "description": 4, "pattern": 13}
_COUNTS = {"maxLength": 11, "minLength": 12, "maxItems": 14, "minItems": 15, "maxProperties": 17, "minProperties": 18}
_FLAGS = {"uniqueItems": 16, "readOnly": 27}
_REQUIRED, _ENUM, _MORE, _TYPE, _ITEMS, _ALL_OF, _PROPERTIES, _EXTENSION = 19, 20, 21, 22, 23, 24, 25, 31


def encode_swagger(document: Mapping[str, Any]) -> bytes:
    """The message ``openapi.v2.Document`` of a Swagger document."""
    info = document["info"]
    definitions = b"".join(_field(1, _named(name, _schema(s))) for name, s in document["definitions"].items())
    return b"".join(
        (
            _text(_DOCUMENT["swagger"], document["swagger"]),
            _field(_DOCUMENT["info"], _text(1, info["title"]) + _text(2, info["version"])),
            _field(_DOCUMENT["paths"], b""),
            _field(_DOCUMENT["definitions"], definitions),
        )
    )


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH) + _varint(len(value)) + value


def _text(number: int, value: str) -> bytes:
    return _field(number, value.encode())


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _named(name: str, value: bytes) -> bytes:
    return _text(1, name) + _field(2, value)


def _any(value: object) -> bytes:
    """``openapi.v2.Any``: YAML, which JSON is."""
    return _text(2, json.dumps(value))


def _schema(schema: Mapping[str, Any]) -> bytes:
    return b"".join(_parts(schema))


def _parts(schema: Mapping[str, Any]) -> Iterator[bytes]:
    for key, value in schema.items():
        if key in _TEXTS:
            yield _text(_TEXTS[key], value)
        elif key in _COUNTS:
            yield _number(_COUNTS[key], value)
        elif key in _FLAGS:
            yield _number(_FLAGS[key], int(value))
        elif key in _NESTED:
            yield from _NESTED[key](value)
        elif key.startswith("x-"):
            yield _field(_EXTENSION, _named(key, _any(value)))


def _types(value: str | list[str]) -> Iterator[bytes]:
    names = [value] if isinstance(value, str) else value
    yield _field(_TYPE, b"".join(_text(1, name) for name in names))


def _more(value: bool | Mapping[str, Any]) -> Iterator[bytes]:
    yield _field(_MORE, _number(2, int(value)) if isinstance(value, bool) else _field(1, _schema(value)))


def _properties(value: Mapping[str, Any]) -> Iterator[bytes]:
    yield _field(_PROPERTIES, b"".join(_field(1, _named(name, _schema(s))) for name, s in value.items()))


_NESTED: dict[str, Callable[[Any], Iterator[bytes]]] = {
    "required": lambda names: (_text(_REQUIRED, name) for name in names),
    "enum": lambda values: (_field(_ENUM, _any(value)) for value in values),
    "type": _types,
    "items": lambda schema: iter([_field(_ITEMS, _field(1, _schema(schema)))]),
    "allOf": lambda schemas: (_field(_ALL_OF, _schema(schema)) for schema in schemas),
    "additionalProperties": _more,
    "properties": _properties,
}
