"""What the API server refuses: one clear Status each, and nothing changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from masterkit import Api, pod

MERGE = "application/merge-patch+json"
GOOD = {"metadata": {"name": "x"}, "data": {"a": "b"}}

BODIES: list[tuple[str, bytes, str, int, str, str]] = [
    ("malformed JSON", b'{"metadata":', "application/json", 400, "BadRequest", "json"),
    ("no object", b"[1]", "application/json", 400, "BadRequest", "no object"),
    ("empty", b"", "application/json", 400, "BadRequest", "no body"),
    ("malformed YAML", b"a: [1", "application/yaml", 400, "BadRequest", "YAML"),
    ("two documents", b"a: 1\n---\nb: 2\n", "application/yaml", 400, "BadRequest", "YAML"),
    ("not UTF-8", b'{"data":{"a":"\xff"}}', "application/json", 400, "BadRequest", "UTF-8"),
    ("content type", b"<xml/>", "application/xml", 415, "UnsupportedMediaType", "application/json"),
    ("no protobuf", b"hello", "application/vnd.kubernetes.protobuf", 400, "BadRequest", "protobuf"),
    ("cut protobuf", b"k8s\x00\n\xff\xff", "application/vnd.kubernetes.protobuf", 400, "BadRequest", "protobuf"),
    ("oversized", b" " * (3 << 20) + b"{}", "application/json", 413, "RequestEntityTooLarge", "3145728"),
    ("another kind", json.dumps(GOOD | {"kind": "Secret"}).encode(), "application/json", 400, "BadRequest", "Secret"),
    ("a wrong type", b'{"metadata":{"name":"x"},"data":{"a":1}}', "application/json", 400, "BadRequest", "unmarshal"),
    ("no name", b'{"data":{}}', "application/json", 422, "Invalid", "name"),
    ("a bad name", b'{"metadata":{"name":"No_Good"}}', "application/json", 422, "Invalid", "metadata.name"),
    ("a bad label", b'{"metadata":{"name":"x","labels":{"a b":"c"}}}', "application/json", 422, "Invalid", "labels"),
    (
        "another namespace",
        b'{"metadata":{"name":"x","namespace":"other"}}',
        "application/json",
        400,
        "BadRequest",
        "namespace",
    ),
]


@pytest.mark.parametrize(
    ("body", "kind", "code", "reason", "said"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES]
)
async def test_bad_bodies(api: Api, body: bytes, kind: str, code: int, reason: str, said: str) -> None:
    answer = await api.send("POST", api.maps, body, kind)
    status = answer.json
    assert (answer.status, status["code"], status["reason"], status["kind"]) == (code, code, reason, "Status")
    assert said in status["message"]
    assert (await api.get(api.maps)).json["items"] == []


QUERIES = [
    ("labelSelector=a in b", 400),
    ("labelSelector=a==b==c", 400),
    ("fieldSelector=spec.nothing=x", 400),
    ("fieldSelector=metadata.name", 400),
    ("limit=-1", 400),
    ("limit=many", 400),
    ("continue=garbage", 400),
    ("resourceVersion=new", 422),
    ("resourceVersion=1&resourceVersionMatch=Sometimes", 422),
    ("watch=maybe", 400),
]


@pytest.mark.parametrize(("query", "code"), QUERIES)
async def test_bad_queries(api: Api, query: str, code: int) -> None:
    answer = await api.get(f"{api.maps}?{query}")
    if query == "watch=maybe":  # anything but true is a list, as upstream reads it
        assert answer.status == 200
        return
    assert (answer.status, answer.json["status"]) == (code, "Failure"), answer.body


UNKNOWN = {"metadata": {"name": "x"}, "data": {"a": "b"}, "dada": {}}


async def test_unknown_fields_strict(api: Api) -> None:
    answer = await api.send("POST", f"{api.maps}?fieldValidation=Strict", UNKNOWN)
    assert (answer.status, answer.json["reason"]) == (400, "BadRequest")
    assert 'unknown field "dada"' in answer.json["message"]
    assert (await api.get(f"{api.maps}/x")).status == 404


async def test_unknown_fields_warn(api: Api) -> None:
    answer = await api.send("POST", f"{api.maps}?fieldValidation=Warn", UNKNOWN)
    assert answer.status == 201
    assert answer.headers.getall("Warning") == ['299 - "unknown field \\"dada\\""']
    assert "dada" not in answer.json


async def test_unknown_fields_ignore(api: Api) -> None:
    answer = await api.send("POST", f"{api.maps}?fieldValidation=Ignore", UNKNOWN)
    assert (answer.status, "Warning" in answer.headers) == (201, False)


async def test_double_fields(api: Api) -> None:
    body = b'{"metadata":{"name":"x"},"data":{"a":"1","a":"2"}}'
    strict = await api.send("POST", f"{api.maps}?fieldValidation=Strict", body)
    assert 'duplicate field "data.a"' in strict.json["message"]
    warned = await api.send("POST", api.maps, body)
    assert (warned.status, warned.json["data"]) == (201, {"a": "2"})
    assert 'duplicate field \\"data.a\\"' in warned.headers["Warning"]


async def test_stale_update_is_a_conflict(api: Api) -> None:
    first = await api.make_map("x", a="1")
    changed = await api.send("PUT", f"{api.maps}/x", first | {"data": {"a": "2"}})
    assert changed.status == 200
    stale = await api.send("PUT", f"{api.maps}/x", first | {"data": {"a": "3"}})
    assert (stale.status, stale.json["reason"]) == (409, "Conflict")
    assert "the object has been modified" in stale.json["message"]
    assert (await api.get(f"{api.maps}/x")).json["data"] == {"a": "2"}


async def test_stale_patch_is_a_conflict(api: Api) -> None:
    made = await api.make_map("x", a="1")
    await api.send("PATCH", f"{api.maps}/x", {"data": {"a": "2"}}, MERGE)
    stale = {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"]}, "data": {"a": "3"}}
    answer = await api.send("PATCH", f"{api.maps}/x", stale, MERGE)
    assert answer.status == 409


PATCHES: list[tuple[Any, str, int]] = [
    ({"data": {}}, "application/json", 415),
    ({"op": "add"}, "application/json-patch+json", 400),
    ([{"op": "test", "path": "/data/a", "value": "no"}], "application/json-patch+json", 422),
    ([{"op": "replace", "path": "/nothing/here", "value": 1}], "application/json-patch+json", 422),
    ({"data": {"a": 1}}, MERGE, 400),
    ({"metadata": {"name": "y"}}, MERGE, 400),
    ({"metadata": {"uid": "other"}}, MERGE, 409),
    ({"data": {"$patch": "explode"}}, "application/strategic-merge-patch+json", 400),
    ({"kind": "ConfigMap"}, "application/apply-patch+yaml", 400),
]


@pytest.mark.parametrize(("patch", "kind", "code"), PATCHES)
async def test_bad_patches(api: Api, patch: Any, kind: str, code: int) -> None:
    made = await api.make_map("x", a="1")
    answer = await api.send("PATCH", f"{api.maps}/x", patch, kind)
    assert answer.status == code, answer.body
    assert (await api.get(f"{api.maps}/x")).json == made


async def test_unknown_paths_and_methods(api: Api) -> None:
    for path in ("/nothing", "/apis/none/v1", "/apis/apps/v1/namespaces/default/robots", "/api/v1/pods/x/y/z"):
        answer = await api.get(path)
        assert (answer.status, answer.json["reason"]) in ((404, "NotFound"), (405, "MethodNotAllowed")), path
    answer = await api.send("POST", "/api/v1/pods", pod("x"))
    assert (answer.status, answer.json["reason"]) == (405, "MethodNotAllowed")
    assert (await api.send("BREW", api.maps)).status in (400, 405)


async def test_only_json_and_yaml_are_answered(api: Api) -> None:
    answer = await api.get(api.maps, Accept="application/vnd.kubernetes.protobuf")
    assert (answer.status, answer.json["reason"]) == (406, "NotAcceptable")


async def test_ephemeral_containers_are_refused_with_the_reason(api: Api) -> None:
    await api.send("POST", api.pods, pod("ephemeral"))
    answer = await api.send("PATCH", f"{api.pods}/ephemeral/ephemeralcontainers", {}, MERGE)
    assert (answer.status, "fixed when they start" in answer.json["message"]) == (405, True)


async def test_a_failure_inside_is_a_status_with_a_number(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypervisor.master.api import server

    async def broken(_exchange: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(server._VERBS, "list", broken)  # type: ignore[arg-type]
    answer = await api.get(api.maps)
    assert (answer.status, answer.json["reason"]) == (500, "InternalError")
    assert "id " in answer.json["message"]
    assert "ZeroDivision" not in answer.json["message"]
