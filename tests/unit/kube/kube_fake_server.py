"""A small API server for clients' tests: objects in memory, revisions, watches; faults on demand."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from hypervisor.kube.errors import ApiError, already_exists, conflict, expired, not_found
from hypervisor.kube.selectors import parse_fields, parse_labels

Object = dict[str, Any]
Where = tuple[str, str]  # path of the collection without namespaces, as "/api/v1/pods"; namespace


def merged(obj: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(obj) if isinstance(obj, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


MERGE_KEYS = {"conditions": "type", "podIPs": "ip", "hostIPs": "ip", "addresses": "type"}


def strategic(obj: Any, patch: Any) -> Any:
    """As much of a strategic merge as statuses need: lists that merge by a key."""
    if not isinstance(patch, dict) or not isinstance(obj, dict):
        return patch
    result = merged(obj, {k: v for k, v in patch.items() if not isinstance(v, (dict, list))})
    for key, value in patch.items():
        if isinstance(value, dict):
            result[key] = strategic(obj.get(key) or {}, value)
        elif isinstance(value, list):
            result[key] = by_key(obj.get(key) or [], value, MERGE_KEYS[key]) if key in MERGE_KEYS else value
    return result


def by_key(old: list[Any], new: list[Any], key: str) -> list[Any]:
    items = {item[key]: item for item in old}
    for item in new:
        if item.get("$patch") == "delete":
            items.pop(item[key], None)
        else:
            items[item[key]] = merged(items.get(item[key], {}), item)
    return list(items.values())


class FakeServer:
    """`objects` is the truth, by (collection, namespace, name)."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Object] = {}
        self.log: list[tuple[int, str, str, Object]] = []  # revision, type, collection, object
        self.revision = 100
        self.forgotten = 0  # watches from before this revision get 410
        self.requests: list[tuple[str, str, Any]] = []
        self.refuse: Callable[[web.Request], web.Response | None] = lambda _: None
        self.page: int | None = None
        self._snapshots: dict[int, list[Object]] = {}
        self._changed = asyncio.Event()
        self._cut = asyncio.Event()

    # ---- what tests do -----------------------------------------------------------------------------------------------

    def put(self, collection: str, obj: Object) -> Object:
        """Creates or replaces."""
        meta = obj.setdefault("metadata", {})
        key = (collection, meta.get("namespace", ""), meta["name"])
        old = self.objects.get(key)
        self.revision += 1
        obj = copy.deepcopy(obj)
        meta = obj["metadata"]
        meta.setdefault("uid", old["metadata"]["uid"] if old else f"{self.revision:08d}-0000-4000-8000-000000000000")
        meta.setdefault("creationTimestamp", "2024-01-01T00:00:00Z")
        meta["resourceVersion"] = str(self.revision)
        self.objects[key] = obj
        self._note("MODIFIED" if old else "ADDED", collection, obj)
        return obj

    def remove(self, collection: str, namespace: str, name: str) -> None:
        """Deletes at once."""
        self.revision += 1
        obj = copy.deepcopy(self.objects.pop((collection, namespace, name)))
        obj["metadata"]["resourceVersion"] = str(self.revision)
        self._note("DELETED", collection, obj)

    def forget(self) -> None:
        """What happened so far cannot be watched any more."""
        self.forgotten = self.revision

    def cut(self) -> None:
        """Breaks every watch."""
        self._cut.set()
        self._cut = asyncio.Event()

    def _note(self, kind: str, collection: str, obj: Object) -> None:
        self.log.append((self.revision, kind, collection, obj))
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- the server --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Its URL."""
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._handle)
        server = TestServer(app)
        await server.start_server(shutdown_timeout=0.1)
        try:
            yield str(server.make_url("")).rstrip("/")
        finally:
            await server.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read() or b"null")
        self.requests.append((request.method, request.path, body))
        refused = self.refuse(request)
        if refused is not None:
            return refused
        try:
            return await self._route(request, body)
        except ApiError as e:
            return web.json_response(e.status(), status=e.code)

    async def _route(self, request: web.Request, body: Any) -> web.StreamResponse:
        collection, namespace, name, subresource = _parse(request.path)
        if request.method == "POST":
            return self._post(collection, namespace, name, subresource, body)
        if not name:
            if "watch" in request.query:
                return await self._watch(request, collection, namespace)
            return self._list(request, collection, namespace)
        key = (collection, namespace, name)
        old = self.objects.get(key)
        if old is None:
            raise not_found("", collection.rsplit("/", 1)[-1], name)
        match request.method:
            case "GET":
                if subresource:
                    raise ApiError("Forbidden", "subresources are not to be read")
                return web.json_response(old)
            case "PATCH":
                uid = (body.get("metadata") or {}).get("uid")
                if uid and uid != old["metadata"]["uid"]:
                    raise conflict("", collection.rsplit("/", 1)[-1], name, "another uid")
                patched = strategic if "strategic" in request.content_type else merged
                new = patched(old, body)
                return web.json_response(old if new == old else self.put(collection, new))
            case "PUT":
                version = body["metadata"].get("resourceVersion")
                if version and version != old["metadata"]["resourceVersion"]:
                    raise conflict("", collection.rsplit("/", 1)[-1], name)
                return web.json_response(self.put(collection, body))
            case "DELETE":
                wanted = ((body or {}).get("preconditions") or {}).get("uid")
                if wanted and wanted != old["metadata"]["uid"]:
                    raise conflict("", collection.rsplit("/", 1)[-1], name, "the UID in the precondition differs")
                self.remove(*key)
                return web.json_response(old)
        raise ApiError("MethodNotAllowed", request.method)

    def _post(self, collection: str, namespace: str, name: str, subresource: str, body: Object) -> web.Response:
        if subresource == "token":
            return web.json_response({"status": {"token": "a-token", "expirationTimestamp": "2099-01-01T00:00:00Z"}})
        if subresource or collection.endswith("reviews"):
            return web.json_response(body | {"status": {"allowed": True}}, status=201)
        named = body["metadata"].get("name") or f"{body['metadata'].get('generateName', 'x-')}{self.revision}"
        if (collection, namespace, named) in self.objects:
            raise already_exists("", collection.rsplit("/", 1)[-1], named)
        metadata = body["metadata"] | {"name": named} | ({"namespace": namespace} if namespace else {})
        return web.json_response(self.put(collection, body | {"metadata": metadata}), status=201)

    def _selected(self, request: web.Request, collection: str, namespace: str) -> list[Object]:
        return [
            obj
            for (c, n, _), obj in sorted(self.objects.items())
            if c == collection and namespace in ("", n) and _selects(request, obj)
        ]

    def _list(self, request: web.Request, collection: str, namespace: str) -> web.Response:
        start, version = map(int, request.query.get("continue", f"0.{self.revision}").split("."))
        if not start:  # all pages of a list are of one moment
            self._snapshots[version] = self._selected(request, collection, namespace)
        items = self._snapshots[version]
        end = start + (self.page or int(request.query.get("limit") or 0) or len(items) + 1)
        metadata = {"resourceVersion": str(version)} | ({"continue": f"{end}.{version}"} if end < len(items) else {})
        return web.json_response({"kind": "List", "metadata": metadata, "items": items[start:end]})

    async def _watch(self, request: web.Request, collection: str, namespace: str) -> web.StreamResponse:
        at, cut = int(request.query.get("resourceVersion") or self.revision), self._cut
        if at < self.forgotten:
            raise expired("too old resource version")
        response = web.StreamResponse()
        await response.prepare(request)
        while not cut.is_set():
            changed = self._changed
            for revision, kind, c, obj in [e for e in self.log if e[0] > at]:
                at = revision
                if c == collection and namespace in ("", obj["metadata"].get("namespace", "")):
                    await self._send(request, response, kind, obj)
            waits = [asyncio.create_task(e.wait()) for e in (changed, cut)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        if request.transport is not None:
            request.transport.abort()
        return response

    async def _send(self, request: web.Request, response: web.StreamResponse, kind: str, obj: Object) -> None:
        """One event; an object that does not match any more is told as deleted, as real servers do."""
        if not _selects(request, obj):
            kind = "DELETED"
        await response.write(json.dumps({"type": kind, "object": obj}).encode() + b"\n")


def _selects(request: web.Request, obj: Object) -> bool:
    labels = parse_labels(request.query.get("labelSelector", ""))
    fields = parse_fields(request.query.get("fieldSelector", ""))
    return labels.matches_object(obj) and fields.matches_object(obj)


def _parse(path: str) -> tuple[str, str, str, str]:
    """Collection, namespace, name and subresource of a URL path."""
    parts = path.strip("/").split("/")
    depth = 2 if parts[0] == "api" else 3
    root, rest = parts[:depth], parts[depth:]
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in ("status", "finalize"):
        namespace, rest = rest[1], rest[2:]
    rest += ["", ""]
    return "/" + "/".join([*root, rest[0]]), namespace, rest[1], rest[2]
