"""The HTTP side of the API server: every request's way, and every failure as a ``Status``.

The way: what is asked (`info`) -> who asks (certificate or token; impersonation) -> may they (authorizer) -> the
handler of the verb or subresource -> a line for the audit log and a count for the metrics. There is no router: a path
that is a resource is one dictionary look-up, everything else another.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web
from aiohttp.web_request import BaseRequest

from hypervisor.errors import HvError, Unavailable
from hypervisor.kube.errors import ApiError, bad_request
from hypervisor.master.api import encode, plain, subresources, usage, verbs, watching
from hypervisor.master.api.exchange import Exchange, not_allowed, unknown
from hypervisor.master.api.info import RequestInfo, parse
from hypervisor.master.api.inside import Inside
from hypervisor.master.auth.authorizer import check
from hypervisor.master.auth.reviews import impersonated
from hypervisor.master.auth.user import ANONYMOUS, User

Handler = Callable[[Exchange], Awaitable[web.StreamResponse]]

_VERBS: dict[str, Handler] = {
    "get": verbs.get,
    "list": verbs.list_,
    "watch": watching.watch,
    "create": verbs.create,
    "update": verbs.update,
    "patch": verbs.patch,
    "delete": verbs.delete,
    "deletecollection": verbs.delete_collection,
}
_DRAINING = "the server is shutting down"


class Server:
    """Give it to `aiohttp.web.Server` as the handler."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside
        self._plain = plain.Plain(inside)
        self._usage = usage.Usage()

    async def __call__(self, request: BaseRequest) -> web.StreamResponse:
        started = time.perf_counter()
        info, user = RequestInfo(request.method.lower(), ""), ANONYMOUS
        try:
            url = request.rel_url
            info = parse(request.method, url.raw_path, url.raw_query_string, self._inside.routes)
            user = self._user(request, info)
            check(self._inside.authorizer, info.attributes(user))
            response = await self._answer(Exchange(self._inside, request, info, user))
        except Exception as e:
            response = _failed(request, e)
        self._note(request, info, user, response.status, time.perf_counter() - started)
        return response

    def _user(self, request: BaseRequest, info: RequestInfo) -> User:
        headers = request.headers
        tls = request.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True) if tls is not None else None
        user = self._inside.authenticator.authenticate(certificate, headers.get("Authorization", ""), info.path)
        if "Impersonate-User" in headers or "Impersonate-Group" in headers or "Impersonate-Uid" in headers:
            groups = tuple(headers.getall("Impersonate-Group", ()))
            lower = {name.lower(): value for name, value in headers.items()}
            if not all(is_text(v) for k, v in headers.items() if k.lower().startswith("impersonate-")):
                raise bad_request("a header of impersonation is not valid UTF-8")
            return impersonated(self._inside.authorizer, user, lower, groups)
        return user

    async def _answer(self, exchange: Exchange) -> web.StreamResponse:
        info = exchange.info
        if not info.plural:
            return await self._plain.answer(exchange)
        if info.group == usage.GROUP:
            return await usage.answer(exchange, self._usage)
        kind = exchange.kind
        if info.subresource:
            if info.subresource not in kind.subresources:
                raise unknown()
            return await subresources.answer(exchange)
        if info.verb not in kind.verbs:
            raise not_allowed()
        if not kind.stored:
            return await subresources.review(exchange)
        if kind.resource.namespaced and not info.namespace and info.verb not in ("list", "watch"):
            raise not_allowed()
        return await _VERBS[info.verb](exchange)

    def _note(self, request: BaseRequest, info: RequestInfo, user: User, code: int, seconds: float) -> None:
        inside, kind = self._inside, info.kind
        plural = kind.resource.qualified if kind is not None else ""
        sub = info.subresource if kind is not None and info.subresource in kind.subresources else ""
        verb = info.verb if plural else "other"
        inside.metrics.observe(verb, plural, sub, code, seconds)
        if not info.plural:
            return
        inside.audit.ended(request, info, user, code, seconds)


def is_text(value: str) -> bool:
    """False of a header that was no UTF-8: its bytes are halves of surrogate pairs then, which no answer can have."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _failed(request: BaseRequest, error: Exception) -> web.StreamResponse:
    """The answer that an error is; one that comes after the head of an answer breaks it off."""
    if isinstance(error, ConnectionError):
        raise error  # the client has gone
    api = _as_api_error(request, error)
    if request.transport is None or request._payload_writer.output_size > 0:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("broken off") from error
    headers = {"Content-Type": "application/json", "Cache-Control": "no-cache, private"}
    if api.code == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="kubernetes"'
    retry = api.details.get("retryAfterSeconds")
    if retry:
        headers["Retry-After"] = str(retry)
    return web.Response(body=encode.dumps(api.status()), status=api.code, headers=headers)


def _as_api_error(request: BaseRequest, error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Unavailable):
        return ApiError("ServiceUnavailable", str(error), details={"retryAfterSeconds": 1})
    if isinstance(error, HvError):
        return ApiError("InternalError", str(error))
    if isinstance(error, RecursionError):  # every walk over an object is as deep as the object
        return ApiError("BadRequest", "the object is nested too deeply")
    number = uuid.uuid4().hex[:12]
    structlog.get_logger().exception("request failed", id=number, method=request.method, path=request.path)
    return ApiError("InternalError", f"an error on the server has prevented the request from succeeding (id {number})")
