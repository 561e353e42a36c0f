"""Who calls this node's server, and whether they may: certificates first, then the API server is asked.

Theory of operation
-------------------
::

    client certificate of the cluster's CA --> CN and O
    else a bearer token --TokenReview-------> name and groups      neither: 401
                                                  |
    kube-apiserver-kubelet-client, system:masters: allowed; anyone else: SubjectAccessReview on nodes/SUBRESOURCE

Answers of the API server are kept for `ALLOWED_S` and `DENIED_S`, so that a stream of requests does not double its
load; a node that cannot ask refuses (503). Source: Kubernetes documentation, "Kubelet authentication/authorization".
"""

from __future__ import annotations

import hashlib
import ssl
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

from hypervisor.kube.client import ApiClient, Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.meta import get
from hypervisor.kube.resources import SUBJECT_ACCESS_REVIEWS, TOKEN_REVIEWS

OPEN_PATHS = frozenset({"/healthz"})
API_SERVER = "kube-apiserver-kubelet-client"
MASTERS = "system:masters"
ALLOWED_S = 300.0
DENIED_S = 30.0
REMEMBERED = 1024
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_VERBS = {"GET": "get", "HEAD": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_SUBRESOURCES = {"stats": "stats", "metrics": "metrics", "logs": "log", "debug": "debug", "healthz": "healthz"}
"""By a path's first part; everything else is ``proxy``."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who has proved who they are."""

    name: str
    groups: tuple[str, ...] = ()


class Remembered:
    """A bounded memory of answers with their time."""

    def __init__(self) -> None:
        self._answers: OrderedDict[Any, tuple[float, Any]] = OrderedDict()

    def get(self, key: Any) -> Any:
        """None when there is none, or it is too old."""
        until, answer = self._answers.get(key, (0.0, None))
        return answer if time.monotonic() < until else None

    def put(self, key: Any, answer: Any, seconds: float) -> None:
        """Keeps an answer for a while."""
        self._answers[key] = (time.monotonic() + seconds, answer)
        self._answers.move_to_end(key)
        while len(self._answers) > REMEMBERED:
            self._answers.popitem(last=False)


class Callers:
    """Decides on requests to this node."""

    def __init__(self, client: ApiClient, node: str) -> None:
        self._client = client
        self._node = node
        self._tokens = Remembered()
        self._decisions = Remembered()

    def middleware(self) -> Middleware:
        """Refuses with 401 or 403."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.path not in OPEN_PATHS:
                await self._check(request)
            return await handler(request)

        return check

    async def _check(self, request: web.Request) -> None:
        caller = _by_certificate(request) or await self._by_token(request.headers.get("Authorization", ""))
        if caller is None:
            raise ApiError("Unauthorized", "Unauthorized")
        if caller.name == API_SERVER or MASTERS in caller.groups:
            return
        verb = _VERBS.get(request.method, request.method.lower())
        subresource = _SUBRESOURCES.get(request.path.strip("/").split("/")[0], "proxy")
        if not await self._allowed(caller, verb, subresource):
            why = f"user={caller.name}, verb={verb}, resource=nodes, subresource={subresource}"
            raise ApiError("Forbidden", f"Forbidden ({why})")

    async def _by_token(self, header: str) -> Caller | None:
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            return None
        key = hashlib.sha256(token.encode("utf-8", "replace")).digest()
        known: tuple[Caller | None] | None = self._tokens.get(key)
        if known is None:
            spec = {"token": token.strip()}
            review = await self._client.create(TOKEN_REVIEWS, _review(TOKEN_REVIEWS.api_version, "TokenReview", spec))
            known = (_reviewed(review),)
            self._tokens.put(key, known, ALLOWED_S / 5 if known[0] else DENIED_S)
        return known[0]

    async def _allowed(self, caller: Caller, verb: str, subresource: str) -> bool:
        key = (caller, verb, subresource)
        known: bool | None = self._decisions.get(key)
        if known is None:
            asked = {"verb": verb, "resource": "nodes", "subresource": subresource, "name": self._node, "version": "*"}
            spec = {"user": caller.name, "groups": list(caller.groups), "resourceAttributes": asked}
            body = _review(SUBJECT_ACCESS_REVIEWS.api_version, "SubjectAccessReview", spec)
            answer = await self._client.create(SUBJECT_ACCESS_REVIEWS, body)
            known = bool(get(answer, "status", "allowed"))
            self._decisions.put(key, known, ALLOWED_S if known else DENIED_S)
        return known


def _review(api_version: str, kind: str, spec: Mapping[str, Any]) -> Object:
    return {"apiVersion": api_version, "kind": kind, "metadata": {}, "spec": dict(spec)}


def _reviewed(review: Mapping[str, Any]) -> Caller | None:
    if not get(review, "status", "authenticated"):
        return None
    groups: Iterable[str] = get(review, "status", "user", "groups", default=())
    return Caller(str(get(review, "status", "user", "username", default="")), tuple(groups))


def _by_certificate(request: web.Request) -> Caller | None:
    """From the certificate that TLS has verified."""
    connection = request.get_extra_info("ssl_object")
    if not isinstance(connection, (ssl.SSLObject, ssl.SSLSocket)):
        return None
    return caller_of(connection.getpeercert() or {})


def caller_of(certificate: Mapping[str, Any]) -> Caller | None:
    """Name and groups in a certificate's subject, as `ssl` gives it."""
    pairs = [pair for part in certificate.get("subject", ()) for pair in part]
    names = [value for key, value in pairs if key == "commonName"]
    return Caller(names[-1], tuple(v for k, v in pairs if k == "organizationName")) if names else None
