"""The Swagger document in protobuf, read back by a decoder that knows the wire format only."""

from __future__ import annotations

import json
from collections.abc import Iterator

from hypervisor.master.schema.swagger_protobuf import encode_swagger

SCHEMA = {
    "type": "object",
    "description": "A thing.",
    "required": ["name", "size"],
    "properties": {
        "name": {"type": "string", "pattern": "[a-z]+", "maxLength": 300},
        "size": {"type": "integer", "format": "int64", "enum": [1, 2]},
        "tags": {"type": "array", "items": {"$ref": "#/definitions/Tag"}, "uniqueItems": True},
        "more": {"additionalProperties": {"type": "string"}},
        "any": {"additionalProperties": True},
        "both": {"allOf": [{"$ref": "#/definitions/Tag"}]},
    },
    "x-kubernetes-group-version-kind": [{"group": "", "version": "v1", "kind": "Thing"}],
}
DOCUMENT = {"swagger": "2.0", "info": {"title": "T", "version": "v1"}, "definitions": {"Thing": SCHEMA}}


def varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 128:
            return number, at


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        value, at = varint(data, at)
        if key & 7 == 2:
            yield key >> 3, data[at : at + value]
            at += value
        else:
            assert key & 7 == 0
            yield key >> 3, value


def one(data: bytes, number: int) -> bytes:
    (found,) = (value for field, value in fields(data) if field == number)
    assert isinstance(found, bytes)
    return found


def named(data: bytes) -> dict[str, bytes]:
    made = {}
    for number, entry in fields(data):
        assert number == 1
        assert isinstance(entry, bytes)
        made[one(entry, 1).decode()] = one(entry, 2)
    return made


def test_definitions_survive() -> None:
    document = encode_swagger(DOCUMENT)
    assert one(document, 1) == b"2.0"
    thing = named(one(document, 9))["Thing"]
    assert one(thing, 4) == b"A thing."
    assert [value for number, value in fields(thing) if number == 19] == [b"name", b"size"]
    assert one(one(thing, 22), 1) == b"object"
    properties = named(one(thing, 25))
    assert list(properties) == ["name", "size", "tags", "more", "any", "both"]
    assert (11, 300) in list(fields(properties["name"]))
    assert [json.loads(one(v, 2)) for n, v in fields(properties["size"]) if n == 20 and isinstance(v, bytes)] == [1, 2]
    assert one(one(one(properties["tags"], 23), 1), 1) == b"#/definitions/Tag"
    assert (16, 1) in list(fields(properties["tags"]))
    assert one(one(one(one(properties["more"], 21), 1), 22), 1) == b"string"
    assert list(fields(one(properties["any"], 21))) == [(2, 1)]
    assert one(one(properties["both"], 24), 1) == b"#/definitions/Tag"
    extension = one(thing, 31)
    assert one(extension, 1) == b"x-kubernetes-group-version-kind"
    assert json.loads(one(one(extension, 2), 2))[0]["kind"] == "Thing"
