"""What a request asks for, read from its method, path and query.

Source: Kubernetes, "API Concepts" (resource URIs) and upstream's RequestInfo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

from hypervisor.kube.errors import ApiError, bad_request
from hypervisor.master.auth.user import Attributes, User
from hypervisor.master.kinds.kind import Kind

_VERBS = {"GET": "get", "HEAD": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_TRUE = frozenset(("true", "1", "t", "T", "TRUE", "True"))
_FALSE = frozenset(("", "false", "0", "f", "F", "FALSE", "False"))
_OF_NAMESPACE = frozenset(("status", "finalize"))
"""What may follow a namespace's name and is no resource in it."""
MAX_QUERY_FIELDS = 20_000
"""Each word of a command is one (``kubectl exec``)."""

Routes = Mapping[tuple[str, str], Mapping[str, Kind]]
"""By group and version, then by plural."""


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """:ivar kind: None for a path that is no resource, and for a resource that is not served (then `plural` is set)
    :ivar rest: what follows the subresource (of a proxy)
    """

    verb: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    kind: Kind | None = None
    group: str = ""
    version: str = ""
    plural: str = ""
    namespace: str = ""
    name: str = ""
    subresource: str = ""
    rest: str = ""

    def attributes(self, user: User) -> Attributes:
        """As authorizers see it."""
        if not self.plural:
            return Attributes(user, self.verb, path=self.path)
        selector = self.query.get("fieldSelector", "")
        return Attributes(
            user,
            self.verb,
            self.group,
            self.version,
            self.plural,
            self.subresource,
            self.namespace,
            self.name,
            field_selector=selector,
        )

    def flag(self, name: str) -> bool:
        """A boolean of the query.

        :raises ApiError: it is none
        """
        text = self.query.get(name, "")
        if text in _TRUE:
            return True
        if text in _FALSE:
            return False
        raise bad_request(f'invalid value "{text[:40]}" of query parameter {name}: it must be true or false')

    def number(self, name: str, default: int = 0) -> int:
        """A whole number of the query, from 0.

        :raises ApiError: it is none
        """
        text = self.query.get(name, "")
        if not text:
            return default
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise bad_request(f'invalid value "{text[:40]}" of query parameter {name}: it must be a whole number')
        return int(text)


def parse(method: str, raw_path: str, query_string: str, routes: Routes) -> RequestInfo:
    """Reads a request.

    :param raw_path: still quoted
    :raises ApiError: a method or a query that no request has
    """
    query = _query(query_string) if query_string else {}
    path = unquote(raw_path) if "%" in raw_path else raw_path
    parts = [unquote(p) if "%" in p else p for p in raw_path.strip("/").split("/")]
    if parts[0] == "api" and len(parts) > 2:
        group, version, rest = "", parts[1], parts[2:]
    elif parts[0] == "apis" and len(parts) > 3:
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        return RequestInfo(method.lower(), path, query)
    if any(p in (".", "..") or "/" in p or "\0" in p for p in rest):
        raise bad_request("a part of the path is no name: it must not be . or .. nor contain / or NUL")
    return _resource(method, path, query, group, version, rest, routes)


def _query(text: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS)
    except ValueError as e:
        raise bad_request(f"the query cannot be read: {e}") from e
    found: dict[str, str] = {}
    for key, value in pairs:  # the first of several counts, as upstream has it
        found.setdefault(key, value)
    return found


def _resource(
    method: str, path: str, query: dict[str, str], group: str, version: str, rest: list[str], routes: Routes
) -> RequestInfo:
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 1:
        if len(rest) == 2 or (len(rest) == 3 and rest[2] in _OF_NAMESPACE and not group):
            namespace = rest[1]  # the namespace itself; authorizers see it in its own namespace
        else:
            namespace, rest = rest[1], rest[2:]
    plural, name, subresource, tail = (*rest[:3], *[""] * (3 - len(rest[:3])), "/".join(rest[3:]))
    kind = routes.get((group, version), {}).get(plural)
    verb = _VERBS.get(method)
    if verb is None:
        raise ApiError("MethodNotAllowed", f"the server does not allow this method on the requested resource: {method}")
    if not name:
        verb, name = _of_collection(verb, query)
    return RequestInfo(verb, path, query, kind, group, version, plural, namespace, name, subresource, tail)


def _of_collection(verb: str, query: Mapping[str, str]) -> tuple[str, str]:
    """Verb and, where a field selector names one object, its name: a rule for that name then allows the request."""
    if verb == "delete":
        return "deletecollection", ""
    if verb != "get":
        return verb, ""
    name = ""
    for part in query.get("fieldSelector", "").split(","):
        if part.startswith("metadata.name="):
            name = part.removeprefix("metadata.name=").removeprefix("=")
    return ("watch" if query.get("watch", "") in _TRUE else "list"), name
