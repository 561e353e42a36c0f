"""One HTTP request while it is served: what was asked, by whom, in which form the answer goes back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.web_request import BaseRequest
from multidict import CIMultiDict

from hypervisor.kube.client import Object
from hypervisor.kube.errors import ApiError, bad_request
from hypervisor.master.api import encode
from hypervisor.master.api.call import Call, of_request
from hypervisor.master.api.fit import BODY_LIMIT
from hypervisor.master.api.info import RequestInfo
from hypervisor.master.api.inside import Inside
from hypervisor.master.api.negotiate import PLAIN, Representation, not_acceptable, representation
from hypervisor.master.auth.user import User
from hypervisor.master.kinds.kind import Kind

BODY_S = 60.0
"""A body that takes longer is given up."""
_PRETTY = Representation(indent=True)
_NO_CACHE = "no-cache, private"


@dataclass(frozen=True, slots=True)
class Exchange:
    """See the module."""

    inside: Inside
    request: BaseRequest
    info: RequestInfo
    user: User

    @property
    def kind(self) -> Kind:
        """Of the resource that was asked for.

        :raises ApiError: NotFound, it is not served
        """
        if self.info.kind is None:
            raise unknown()
        return self.info.kind

    def call(self) -> Call:
        """The request as a call for objects."""
        return of_request(self.info, self.user, self.request.headers.get("User-Agent", ""), self.kind)

    def form(self) -> Representation:
        """What the client wants.

        :raises ApiError: NotAcceptable
        """
        form = representation(self.request.headers.get("Accept", ""))
        if form is PLAIN or (not form.as_ and form.media == PLAIN.media):
            pretty = self.info.query.get("pretty", "")
            return _PRETTY if pretty and self.info.flag("pretty") else PLAIN
        return form

    async def body(self) -> bytes:
        """The whole body.

        :raises ApiError: RequestEntityTooLarge, Timeout, BadRequest: its encoding for the way is broken
        """
        if not self.request.can_read_body:
            return b""
        try:
            async with asyncio.timeout(BODY_S):
                return await self.request.read()
        except TimeoutError as e:
            raise ApiError("Timeout", f"the body did not come within {BODY_S:g} s") from e
        except web.RequestPayloadError as e:
            raise bad_request(f"the body cannot be read: {e}") from e
        except web.HTTPRequestEntityTooLarge as e:
            message = f"limit is {BODY_LIMIT} bytes; Request entity too large"
            raise ApiError("RequestEntityTooLarge", message) from e

    @property
    def content_type(self) -> str:
        """Of the body."""
        return self.request.headers.get("Content-Type", "")

    def raw(
        self, body: bytes, status: int = 200, *, media: str = PLAIN.media, warnings: Iterable[str] = ()
    ) -> web.Response:
        """An answer that is encoded already."""
        headers = CIMultiDict({"Content-Type": media, "Cache-Control": _NO_CACHE})
        for text in warnings:
            headers.add("Warning", f'299 - "{_quoted(text)}"')
        return web.Response(body=body, status=status, headers=headers)

    async def large(self, body: bytes, media: str) -> web.Response:
        """An answer that may be worth compressing."""
        wanted = len(body) >= encode.GZIP_FROM and "gzip" in self.request.headers.get("Accept-Encoding", "")
        if not wanted:
            return self.raw(body, media=media)
        response = self.raw(await asyncio.to_thread(encode.compress, body), media=media)
        response.headers["Content-Encoding"] = "gzip"
        response.headers["Vary"] = "Accept-Encoding"
        return response

    def value(self, value: Any, status: int = 200, call: Call | None = None) -> web.Response:
        """An answer as JSON (or YAML)."""
        form = self.form()
        return self.raw(encode.render(value, form), status, media=form.media, warnings=call.warnings if call else ())

    def one(self, obj: Object, status: int = 200, call: Call | None = None) -> web.Response:
        """One object, in the form that the client wants."""
        return self.value(self.shaped(obj, self.form()), status, call)

    def shaped(self, obj: Object, form: Representation) -> Mapping[str, Any]:
        """An object as `form` has it."""
        if not form.as_:
            return obj
        if form.as_ == "Table":
            include = encode.include_object(self.info.query.get("includeObject", ""))
            meta = {"resourceVersion": obj["metadata"].get("resourceVersion", "")}
            return encode.table(self.kind, [obj], meta, version=form.version, include=include)
        if form.as_ == "PartialObjectMetadata":
            return encode.partial(obj, form.version)
        raise not_acceptable()


def unknown() -> ApiError:
    """404 for what is not served."""
    return ApiError("NotFound", "the server could not find the requested resource")


def not_allowed() -> ApiError:
    """405."""
    return ApiError("MethodNotAllowed", "the server does not allow this method on the requested resource")


def _quoted(text: str) -> str:
    clean = "".join(c if c.isprintable() else " " for c in text[:1000])
    return clean.replace("\\", "\\\\").replace('"', '\\"')
