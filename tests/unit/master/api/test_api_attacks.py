"""Hostile requests over the wire: a clear Status each, quickly, and the server goes on serving."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
from masterkit import Api, MasterThread, pod, tls_of, write_pair

from hypervisor.master import listening
from hypervisor.master.api import exchange
from hypervisor.master.auth import parties
from hypervisor.master.auth.tokens import ISSUER
from hypervisor.master.daemon import Master

JSON, YAML = "application/json", "application/yaml"
MERGE, STRATEGIC, PATCH = (
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/json-patch+json",
)
DEEP = 100_000
QUICK_S = 8.0
ANCHORS = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 9)) for n in range(ord("b"), ord("k"))
)

BODIES: list[tuple[str, bytes, str]] = [
    ("deep JSON lists", b'{"data":' + b"[" * DEEP + b"]" * DEEP + b"}", JSON),
    ("deep JSON objects", b'{"a":' * DEEP + b"1" + b"}" * DEEP, JSON),
    ("deep YAML", b"a: " + b"[" * DEEP + b"]" * DEEP, YAML),
    ("YAML anchors that multiply", ANCHORS, YAML),
    ("YAML that holds itself", b"&a [*a]", YAML),
    ("a YAML object of Python's", b"!!python/object/apply:os.system ['true']", YAML),
    ("a number of a million digits", b'{"metadata":{"name":"x","generation":' + b"9" * 1_000_000 + b"}}", JSON),
    ("an infinite number", b'{"metadata":{"name":"x","generation":1e999}}', JSON),
    ("NaN", b'{"metadata":{"name":"x","generation":NaN}}', JSON),
    ("NUL in a name", b'{"metadata":{"name":"x\\u0000y"}}', JSON),
    ("half a surrogate in a name", b'{"metadata":{"name":"\\ud800"}}', JSON),
    ("half a surrogate as it is", b'{"metadata":{"name":"\xed\xa0\x80","annotations":{"a":"\xed\xa0\x80"}}}', JSON),
    ("a path as name", b'{"metadata":{"name":"../x"}}', JSON),
    ("metadata is a list", b'{"metadata":[]}', JSON),
    ("labels are a list", b'{"metadata":{"name":"x","labels":["a"]}}', JSON),
]


@pytest.mark.parametrize(("body", "kind"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
async def test_bombs(api: Api, body: bytes, kind: str) -> None:
    started = time.monotonic()
    answer = await api.send("POST", api.maps, body, kind)
    assert (answer.status in (400, 413, 422), answer.json["kind"]) == (True, "Status"), answer.body[:300]
    assert len(answer.body) < 5000
    assert time.monotonic() - started < QUICK_S
    assert (await api.get(api.maps)).json["items"] == []


COPIES = [{"op": "copy", "from": "/data", "path": "/metadata/annotations"}] + [
    {"op": "copy", "from": "/metadata/annotations", "path": f"/metadata/annotations/x{n}"} for n in range(40)
]
PATCHES: list[tuple[str, Any, str]] = [
    ("copies that double", COPIES, PATCH),
    ("ten thousand and more operations", [{"op": "test", "path": "/kind", "value": "ConfigMap"}] * 20_000, PATCH),
    ("a copy into itself", [{"op": "move", "from": "/metadata", "path": "/metadata/labels"}], PATCH),
    ("an index that is none", [{"op": "add", "path": "/metadata/ownerReferences/99999999999999", "value": {}}], PATCH),
    ("an operation that is none", [{"op": "explode", "path": "/"}], PATCH),
    ("operations that are none", [1, None, "x"], PATCH),
    ("the whole object", [{"op": "replace", "path": "", "value": 1}], PATCH),
    ("the whole object removed", [{"op": "remove", "path": ""}], PATCH),
    ("a merge into a string", {"metadata": "x"}, STRATEGIC),
    ("a map where a list is", {"metadata": {"ownerReferences": {"a": "b"}}}, STRATEGIC),
    ("a merge key that is no text", {"metadata": {"ownerReferences": [{"uid": {"a": 1}}]}}, STRATEGIC),
    ("a list of no objects", {"metadata": {"ownerReferences": [1]}}, STRATEGIC),
    ("a delete of no list", {"data": {"$deleteFromPrimitiveList/a": 1}}, STRATEGIC),
    ("an order of no list", {"metadata": {"$setElementOrder/finalizers": {"a": 1}}}, STRATEGIC),
    ("a list as patch", [1], MERGE),
    ("null as patch", None, MERGE),
]


@pytest.mark.parametrize(("patch", "kind"), [p[1:] for p in PATCHES], ids=[p[0] for p in PATCHES])
async def test_hostile_patches(api: Api, patch: Any, kind: str) -> None:
    made = await api.make_map("x", a="1")
    started = time.monotonic()
    answer = await api.send("PATCH", f"{api.maps}/x", json.dumps(patch).encode(), kind)
    assert (answer.status in (400, 413, 422), answer.json["kind"]) == (True, "Status"), answer.body[:300]
    assert time.monotonic() - started < QUICK_S
    assert (await api.get(f"{api.maps}/x")).json == made


async def raw(master: Master, data: bytes, *, wait_s: float = 5) -> bytes:
    """Bytes as they are, and what the server says to them."""
    tls = await asyncio.to_thread(tls_of, master, parties.admin(master.auth.ca))
    reader, writer = await asyncio.open_connection("127.0.0.1", master.port, ssl=tls)
    try:
        writer.write(data)
        await writer.drain()
        return await asyncio.wait_for(reader.read(65536), wait_s)
    finally:
        writer.close()


@pytest.mark.parametrize(
    "path",
    [
        b"/api/v1/namespaces/default/../../../../etc/passwd",
        b"/api/v1/namespaces/default/configmaps/%2e%2e",
        b"/api/v1/namespaces/default/configmaps/a%2fb",
        b"/api/v1/namespaces/default/configmaps/a%00b",
        b"/api/v1/namespaces/..%2fkube-system/secrets",
        b"/api/v1/namespaces//configmaps/x",
        b"/api/v1/namespaces/default/configmaps/%ff%fe",
        b"//api/v1/pods/../..",
    ],
)
async def test_tricks_with_paths(master: Master, path: bytes) -> None:
    head = await raw(master, b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert int(head.split()[1]) in (301, 400, 404, 405), head


HEADERS = [
    (b"Impersonate-User: \xff", 400),
    (b"Impersonate-User: x\r\nImpersonate-Group: \xed\xa0\x80", 400),
    (b"Impersonate-User: x\r\nImpersonate-Extra-A: \xff", 400),
    (b"Content-Encoding: gzip", 400),
    (b"Content-Encoding: deflate", 201),
    (b"Content-Encoding: br", 201),
    (b"User-Agent: \xff\xfe", 201),
    (b"Accept: \xff", 406),
    (b"Transfer-Encoding: chunked", 400),
    (b"Content-Length: 3", 400),
]


@pytest.mark.parametrize(("header", "code"), HEADERS, ids=[h[0].decode("latin-1") for h in HEADERS])
async def test_tricks_with_headers(master: Master, api: Api, header: bytes, code: int) -> None:
    body = json.dumps({"metadata": {"name": "x"}}).encode()
    if header.endswith(b"gzip"):
        body = gzip.compress(body + b" " * (64 << 20))
    request = f"POST {api.maps}?dryRun=All HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n".encode()
    head = await raw(master, request + header + b"\r\n\r\n" + (b"{}" if b"Impersonate" in header else body))
    assert int(head.split()[1]) == code, head


async def test_a_body_that_comes_byte_by_byte_holds_up_nobody(master: Master, api: Api) -> None:
    tls = await asyncio.to_thread(tls_of, master, parties.admin(master.auth.ca))
    slow = []
    for _ in range(20):
        _, writer = await asyncio.open_connection("127.0.0.1", master.port, ssl=tls)
        writer.write(f"POST {api.maps} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{{\r\n".encode())
        slow.append(writer)
    started = time.monotonic()
    await api.make_map("quick")
    assert time.monotonic() - started < 2
    for writer in slow:
        writer.close()


async def test_a_body_that_never_ends_is_given_up(master: Master, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_S", 0.2)
    request = f"POST {api.maps} HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: 100\r\n\r\n{{"
    head = await raw(master, request.encode(), wait_s=30)
    assert head.split()[1] == b"504", head


@pytest.mark.parametrize("begun", [b"", b"GET /api HTTP/1.1\r\nHost: x\r\n"])
async def test_who_connects_and_asks_nothing_is_sent_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(listening, "SILENCE_S", 0.2)
    with MasterThread(tmp_path / "m") as thread:
        async with asyncio.timeout(30):
            assert await raw(thread.master, begun, wait_s=30) == b""


async def test_an_endless_chunked_body_is_refused(master: Master, api: Api) -> None:
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    request = f"POST {api.maps} HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nTransfer-Encoding: chunked\r\n\r\n"
    head = await raw(master, request.encode() + chunk * 4)
    assert head.split()[1] == b"413", head[:200]


def unsigned(claims: dict[str, Any]) -> str:
    parts = ({"alg": "none", "typ": "JWT"}, claims)
    return ".".join(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts) + "."


async def test_a_token_without_signature_is_nobody(api: Api, master: Master) -> None:
    claims = {"iss": ISSUER, "sub": "system:serviceaccount:kube-system:default", "exp": 4e9}
    base = await anonymous(master)
    for token in (unsigned(claims), "", "x", "a.b.c", "\u00e9" * 10, "x" * 9000):
        answer = await base(f"Bearer {token}")
        assert answer == 401, token[:50]


async def anonymous(master: Master) -> Any:
    """GETs pods with an Authorization header and no certificate; the status."""
    import ssl

    import aiohttp

    tls = ssl.create_default_context(cafile=str(master.auth.ca.certificate_file))

    async def get(authorization: str) -> int:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as session:
            headers = {"Authorization": authorization}
            async with session.get(f"https://127.0.0.1:{master.port}/api/v1/pods", headers=headers) as answer:
                return answer.status

    return get


async def as_user(master: Master, api: Api, folder: Any, name: str, groups: tuple[str, ...] = ()) -> Api:
    import aiohttp

    pair = write_pair(folder, parties.user(master.auth.ca, name, groups))
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls_of(master, pair)))
    return Api(session, api.base, api.namespace)


EDITS = ["get", "create", "update", "patch"]


async def test_rights_do_not_grow(api: Api, master: Master, tmp_path: Any) -> None:
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{api.namespace}"
    rule = {"apiGroups": ["rbac.authorization.k8s.io"], "resources": ["roles", "rolebindings"], "verbs": EDITS}
    await api.send("POST", f"{rbac}/roles", {"metadata": {"name": "editor"}, "rules": [rule]})
    group = "rbac.authorization.k8s.io"
    mallory = [{"kind": "User", "name": "mallory", "apiGroup": group}]
    bind = {"metadata": {"name": "b"}, "subjects": mallory}
    bind["roleRef"] = {"kind": "Role", "name": "editor", "apiGroup": group}
    assert (await api.send("POST", f"{rbac}/rolebindings", bind)).status == 201
    user = await as_user(master, api, tmp_path, "mallory")
    async with user.session:
        more = [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}]
        answer = await user.send("POST", f"{rbac}/roles", {"metadata": {"name": "more"}, "rules": more})
        assert answer.status == 403
        admin = bind | {
            "metadata": {"name": "c"},
            "roleRef": {"kind": "ClusterRole", "name": "admin", "apiGroup": group},
        }
        assert (await user.send("POST", f"{rbac}/rolebindings", admin)).status == 403
        assert (await user.get(f"/api/v1/namespaces/{api.namespace}/secrets")).status == 403
        assert (await user.get(user.maps, Impersonate_User="kubernetes-admin")).status == 403
        assert (await user.get(user.maps, Impersonate_User="x", Impersonate_Group="system:masters")).status == 403
        assert (await user.get(user.maps, Impersonate_Group="system:masters")).status in (400, 403)


async def test_a_node_touches_nothing_of_another(api: Api, master: Master, tmp_path: Any) -> None:
    name = f"of-{api.namespace}"
    await api.send("POST", "/api/v1/nodes", {"metadata": {"name": name}})
    await api.send("POST", api.pods, pod(name, nodeName=name))
    other = await as_user(master, api, tmp_path, "system:node:other", ("system:nodes",))
    async with other.session:
        status = {"status": {"phase": "Failed"}}
        assert (await other.send("PATCH", f"{api.pods}/{name}/status", status, MERGE)).status == 403
        assert (await other.send("DELETE", f"{api.pods}/{name}")).status == 403
        assert (await other.get(f"{api.pods}/{name}")).status == 403
        assert (await other.get("/api/v1/pods")).status == 403
        assert (await other.send("PATCH", f"/api/v1/nodes/{name}/status", status, MERGE)).status == 403
        own = pod("mine", nodeName="other")
        assert (await other.send("POST", api.pods, own)).status == 403  # no mirror pod
    assert (await api.get(f"{api.pods}/{name}")).json["status"]["phase"] == "Pending"


async def test_continue_tokens_are_checked(api: Api) -> None:
    for name in "abc":
        await api.make_map(name)
    token = (await api.get(f"{api.maps}?limit=1")).json["metadata"]["continue"]
    decoded = json.loads(base64.urlsafe_b64decode(token + "=="))
    for change in (
        {"start": "/registry/core/secrets/kube-system/x"},
        {"start": 1},
        {"rv": "x"},
        {"rv": 1 << 70},
        {"v": 9},
    ):
        forged = base64.urlsafe_b64encode(json.dumps(decoded | change).encode()).decode().rstrip("=")
        answer = await api.get(f"{api.maps}?limit=1&continue={forged}")
        names = {i["metadata"].get("namespace") for i in answer.json.get("items", ())}
        assert answer.status in (200, 400, 410, 504) and names <= {api.namespace}, (change, answer.body[:300])
