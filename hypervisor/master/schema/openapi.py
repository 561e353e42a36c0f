"""The OpenAPI documents of what is served: ``/openapi/v2`` whole, ``/openapi/v3`` an index and one per group version.

`kubectl explain` reads schemas; kubectl's other commands read *paths*: whether ``patch`` of a kind takes a strategic
merge patch, and which query parameters it has (``dryRun``, ``fieldValidation``). Documents are made when first asked
for and kept encoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hypervisor.kube.published import newest
from hypervisor.master.custom.openapi import definitions_of
from hypervisor.master.kinds.kind import Kind
from hypervisor.master.schema.load import META, definitions, referred
from hypervisor.master.schema.swagger_protobuf import encode_swagger

Json = dict[str, Any]
_GVK = "x-kubernetes-group-version-kind"
_ALWAYS = tuple(META + name for name in ("DeleteOptions", "Status", "WatchEvent", "APIResourceList", "APIGroup"))
_SUBRESOURCE_SCHEMAS = {
    "scale": "io.k8s.api.autoscaling.v1.Scale",
    "eviction": "io.k8s.api.policy.v1.Eviction",
    "binding": "io.k8s.api.core.v1.Binding",
    "token": "io.k8s.api.authentication.v1.TokenRequest",
}
_STREAMS = frozenset({"attach", "debug", "exec", "log", "portforward", "proxy"})
_POSTED = frozenset({"binding", "eviction", "token"})
_PATCHES = (
    "application/apply-patch+yaml",
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
)
_STRATEGIC = "application/strategic-merge-patch"
"""Not for kinds that users define: their schema has no merge keys."""
_QUERY = {
    "pretty": "If 'true', then the output is pretty printed.",
    "dryRun": "When present, indicates that modifications should not be persisted.",
    "fieldManager": "A name associated with the actor or entity that is making these changes.",
    "fieldValidation": "What to do about unknown and duplicate fields in the body: Ignore, Warn or Strict.",
    "force": 'Force is going to "force" Apply requests: fields that others own are taken over.',
    "labelSelector": "A selector to restrict the list of returned objects by their labels.",
    "fieldSelector": "A selector to restrict the list of returned objects by their fields.",
    "limit": "A maximum number of responses to return for a list call.",
    "continue": "Where a list that was limited goes on.",
    "watch": "Watch for changes to the described resources.",
    "resourceVersion": "A constraint on what resource versions a request may be served from.",
    "timeoutSeconds": "Timeout for the list/watch call.",
    "allowWatchBookmarks": 'Requests watch events with type "BOOKMARK".',
}
_QUERY_TYPES = {
    "force": "boolean",
    "watch": "boolean",
    "allowWatchBookmarks": "boolean",
    "limit": "integer",
    "timeoutSeconds": "integer",
}
_WRITE = ("pretty", "dryRun", "fieldManager", "fieldValidation")
_LIST = (
    "pretty",
    "labelSelector",
    "fieldSelector",
    "limit",
    "continue",
    "watch",
    "resourceVersion",
    "timeoutSeconds",
    "allowWatchBookmarks",
)
# HTTP method of each action on one object: x-kubernetes-action, parameters.
_ITEM = {
    "get": ("get", "get", ("pretty",)),
    "update": ("put", "put", _WRITE),
    "patch": ("patch", "patch", (*_WRITE, "force")),
    "delete": ("delete", "delete", ("pretty", "dryRun")),
}
_COLLECTION = {
    "list": ("get", "list", _LIST),
    "create": ("post", "post", _WRITE),
    "deletecollection": ("delete", "deletecollection", (*_LIST, "dryRun")),
}


class Documents:
    """Documents of a set of kinds. Used by one thread at a time."""

    def __init__(self, kinds: Iterable[Kind]) -> None:
        self._kinds = tuple(kinds)
        self._encoded: dict[str, bytes] = {}

    def v2(self) -> bytes:
        """The Swagger 2.0 document of everything, as JSON."""
        if "v2" not in self._encoded:
            self._encoded["v2"] = _encode(_swagger(self._kinds))
        return self._encoded["v2"]

    def v2_protobuf(self) -> bytes:
        """The definitions of everything, as a protobuf message."""
        return encode_swagger(_swagger(self._kinds))

    def v3_index(self) -> bytes:
        """Where the document of each group version is; its hash changes when its content may have."""
        paths = {path: {"serverRelativeURL": f"/openapi/v3/{path}?hash={self.hash(path)}"} for path in self.paths()}
        return _encode({"paths": paths})

    def paths(self) -> list[str]:
        """``api/v1``, ``apis/apps/v1``, ..."""
        return sorted({_root(kind).lstrip("/") for kind in self._kinds})

    def hash(self, path: str) -> str:
        """Of what the document at `path` is made from."""
        made_of = [newest()[0], path, *(f"{k.resource}{k.verbs}{k.subresources}{k.openapi}" for k in self._of(path))]
        return hashlib.sha512("\n".join(made_of).encode()).hexdigest().upper()

    def v3(self, path: str) -> bytes | None:
        """The OpenAPI 3.0 document of one group version, as JSON; None of one that is not served."""
        if path not in self._encoded and self._of(path):
            self._encoded[path] = _encode(_openapi(self._of(path)))
        return self._encoded.get(path)

    def _of(self, path: str) -> list[Kind]:
        return [kind for kind in self._kinds if _root(kind) == f"/{path}"]


def _encode(document: Json) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _root(kind: Kind) -> str:
    resource = kind.resource
    return f"/apis/{resource.group}/{resource.version}" if resource.group else f"/api/{resource.version}"


# ---- schemas ---------------------------------------------------------------------------------------------------------


def _reached(kinds: Iterable[Kind], source: Mapping[str, Json]) -> list[str]:
    """The definitions that requests and answers of these kinds are made of."""
    todo = list(_ALWAYS)
    for kind in kinds:
        todo += [kind.schema, kind.schema + "List"]
        todo += [_SUBRESOURCE_SCHEMAS[name] for name in kind.subresources if name in _SUBRESOURCE_SCHEMAS]
    found: dict[str, None] = {}
    while todo:
        name = todo.pop()
        if name in source and name not in found:
            found[name] = None
            todo.extend(_references(source[name]))
    return sorted(found)


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield referred(schema)
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _definition(name: str, schema: Json, served: frozenset[tuple[str, str]], *, v3: bool) -> Json:
    """A definition as documents have it: types without null, references in the document's own form."""
    if name.endswith(".Quantity") and not v3:
        return {"type": "string"} | _prose(schema)
    if name.endswith(".IntOrString"):
        either: Json = {"oneOf": [{"type": "integer"}, {"type": "string"}]} if v3 else {"type": "string"}
        return either | {"format": "int-or-string"} | _prose(schema)
    made: Json = _plain(schema, v3)
    if _GVK in made:
        made[_GVK] = [gvk for gvk in made[_GVK] if (gvk["group"], gvk["version"]) in served] or made[_GVK][:1]
    return made


def _prose(schema: Json) -> Json:
    return {"description": schema["description"]} if "description" in schema else {}


def _plain(schema: Json, v3: bool) -> Json:
    if "$ref" in schema:
        return _reference(schema, v3)
    made = {key: value for key, value in schema.items() if key not in ("properties", "items", "additionalProperties")}
    if isinstance(made.get("type"), list):
        made["type"] = next(t for t in made["type"] if t != "null")
    if "oneOf" in made:
        made["oneOf"] = [_plain(one, v3) for one in made["oneOf"]]
    if "properties" in schema:
        made["properties"] = {key: _property(key, value, v3) for key, value in schema["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            made[key] = _plain(schema[key], v3)
    return made


def _property(key: str, schema: Json, v3: bool) -> Json:
    made = _plain(schema, v3)
    if key in ("apiVersion", "kind"):
        made.pop("enum", None)  # the validator's own addition
    return made


def _reference(schema: Json, v3: bool) -> Json:
    target = {"$ref": _ref(referred(schema), v3)}
    rest = {key: value for key, value in schema.items() if key != "$ref"}
    return ({"allOf": [target]} if v3 else target) | rest if rest else target


def _ref(name: str, v3: bool) -> str:
    return f"#/components/schemas/{name}" if v3 else f"#/definitions/{name}"


def _definitions(kinds: Iterable[Kind], *, v3: bool) -> Json:
    source, listed = definitions(), tuple(kinds)
    for kind in listed:
        source |= definitions_of(kind, v3=v3) if kind.struct is not None else {}
    served = frozenset((kind.resource.group, kind.resource.version) for kind in listed)
    return {name: _definition(name, source[name], served, v3=v3) for name in _reached(listed, source)}


# ---- paths -----------------------------------------------------------------------------------------------------------


def _swagger(kinds: tuple[Kind, ...]) -> Json:
    return {
        "swagger": "2.0",
        "info": {"title": "Kubernetes", "version": f"v{newest()[0]}.0"},
        "paths": {path: item for kind in kinds for path, item in _paths(kind, v3=False)},
        "definitions": _definitions(kinds, v3=False),
    }


def _openapi(kinds: list[Kind]) -> Json:
    return {
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": f"v{newest()[0]}.0"},
        "paths": {path: item for kind in kinds for path, item in _paths(kind, v3=True)},
        "components": {"schemas": _definitions(kinds, v3=True)},
    }


def _paths(kind: Kind, *, v3: bool) -> Iterator[tuple[str, Json]]:
    """The paths of a kind, each with its operations."""
    resource, root = kind.resource, _root(kind)
    scope = f"{root}/namespaces/{{namespace}}" if resource.namespaced else root
    fixed = ["namespace"] if resource.namespaced else []
    if resource.namespaced and "list" in kind.verbs:
        everywhere = {"get": _operation(kind, "list", _LIST, f"{resource.kind}ForAllNamespaces", v3)}
        yield f"{root}/{resource.plural}", everywhere | _path_parameters([], v3)
    collection = {
        method: _operation(kind, action, query, "", v3)
        for verb, (method, action, query) in _COLLECTION.items()
        if verb in kind.verbs
    }
    yield f"{scope}/{resource.plural}", collection | _path_parameters(fixed, v3)
    item = {
        method: _operation(kind, action, query, "", v3)
        for verb, (method, action, query) in _ITEM.items()
        if verb in kind.verbs
    }
    if item:
        yield f"{scope}/{resource.plural}/{{name}}", item | _path_parameters([*fixed, "name"], v3)
    for name in kind.subresources:
        below = _subresource(kind, name, v3) | _path_parameters([*fixed, "name"], v3)
        yield f"{scope}/{resource.plural}/{{name}}/{name}", below


def _subresource(kind: Kind, name: str, v3: bool) -> Json:
    if name in _STREAMS:
        methods = {"get": ("get", "get" if name == "log" else "connect", _ITEM["get"][2])}
    elif name in _POSTED:
        methods = {"post": ("post", "post", _WRITE)}
    else:
        methods = {verb: row for verb, row in _ITEM.items() if verb != "delete"}
    return {method: _operation(kind, action, query, name, v3) for method, action, query in methods.values()}


def _path_parameters(names: list[str], v3: bool) -> Json:
    if not names:
        return {}
    return {"parameters": [{"name": n, "in": "path", "required": True} | _typed("string", v3) for n in names]}


def _typed(named: str, v3: bool) -> Json:
    shape: Json = {"type": named}
    return {"schema": shape | {"uniqueItems": True}} if v3 else shape | {"uniqueItems": True}


def _operation(kind: Kind, action: str, query: Iterable[str], below: str, v3: bool) -> Json:
    resource = kind.resource
    schema = _SUBRESOURCE_SCHEMAS.get(below, kind.schema)
    answer = f"{kind.schema}List" if action == "list" else META + "Status" if "delete" in action else schema
    made: Json = {
        "operationId": f"{action}{resource.group.partition('.')[0].title() or 'Core'}{resource.version.title()}"
        f"{'Namespaced' if resource.namespaced else ''}{resource.kind}{below.title()}",
        "tags": [f"{resource.group or 'core'}_{resource.version}"],
        "x-kubernetes-action": action,
        _GVK: {"group": resource.group, "kind": resource.kind, "version": resource.version},
        "parameters": [
            {"name": name, "in": "query", "description": _QUERY[name]} | _typed(_QUERY_TYPES.get(name, "string"), v3)
            for name in query
        ],
    }
    patches = [p for p in _PATCHES if kind.struct is None or not p.startswith(_STRATEGIC)]
    bodies = _bodies(action, schema, answer, v3, patches)
    made["parameters"] += bodies.pop("body", [])
    return made | bodies


def _bodies(action: str, schema: str, answer: str, v3: bool, patches: Iterable[str]) -> Json:
    """What goes in and what comes out of an operation."""
    sent = {"patch": META + "Patch", "post": schema, "put": schema, "delete": META + "DeleteOptions"}.get(action)
    media = patches if action == "patch" else ("application/json", "application/yaml")
    known = {"type": "object"} if action == "patch" else {"$ref": _ref(sent or "", v3)}
    target = {"$ref": _ref(answer, v3)}
    if v3:
        content = {"application/json": {"schema": target}, "application/yaml": {"schema": target}}
        made: Json = {"responses": {"200": {"description": "OK", "content": content}}}
        return made | ({"requestBody": {"content": {m: {"schema": known} for m in media}}} if sent else {})
    made = {
        "responses": {"200": {"description": "OK", "schema": target}},
        "consumes": list(media),
        "produces": ["application/json", "application/yaml"],
    }
    body = {"name": "body", "in": "body", "required": action != "delete", "schema": known}
    return made | ({"body": [body]} if sent else {})
