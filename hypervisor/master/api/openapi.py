"""``/openapi/v2`` and ``/openapi/v3``: made when somebody first asks, kept encoded."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

from aiohttp import web

from hypervisor.master.api import encode
from hypervisor.master.api.exchange import Exchange, unknown
from hypervisor.master.kinds.table import Kinds
from hypervisor.master.schema.openapi import Documents
from hypervisor.master.schema.swagger_protobuf import ANSWERED, MEDIA


class OpenApi:
    """The documents of the kinds that are served; half a megabyte each, so they are also kept compressed."""

    def __init__(self, kinds: Kinds) -> None:
        self._documents = Documents(kinds)
        self._made: dict[str, tuple[bytes, bytes, str]] = {}
        self._lock = asyncio.Lock()

    async def answer(self, exchange: Exchange, path: str) -> web.StreamResponse:
        """:raises ApiError: NotFound"""
        make: Callable[[], bytes | None]
        if path == "/openapi/v2" and MEDIA in exchange.request.headers.get("Accept", ""):
            made = await self._document(MEDIA, self._documents.v2_protobuf)
            return self._respond(exchange, *made, media=ANSWERED)
        if path == "/openapi/v2":
            make = self._documents.v2
        elif path == "/openapi/v3":
            make = self._documents.v3_index
        elif path.startswith("/openapi/v3/"):
            name = path.removeprefix("/openapi/v3/")
            if name not in self._documents.paths():
                raise unknown()
            make = lambda: self._documents.v3(name)  # noqa: E731
        else:
            raise unknown()
        exchange.form()  # protobuf alone is not acceptable
        return self._respond(exchange, *await self._document(path, make))

    async def _document(self, path: str, make: Callable[[], bytes | None]) -> tuple[bytes, bytes, str]:
        async with self._lock:
            if path not in self._made:
                self._made[path] = await asyncio.to_thread(_made, make)
        return self._made[path]

    @staticmethod
    def _respond(
        exchange: Exchange, body: bytes, packed: bytes, tag: str, *, media: str = "application/json"
    ) -> web.Response:
        headers = exchange.request.headers
        if tag in headers.get("If-None-Match", ""):
            response = exchange.raw(b"", 304)
        elif "gzip" in headers.get("Accept-Encoding", ""):
            response = exchange.raw(packed, media=media)
            response.headers["Content-Encoding"] = "gzip"
        else:
            response = exchange.raw(body, media=media)
        response.headers["ETag"] = f'"{tag}"'
        response.headers["Vary"] = "Accept-Encoding, Accept"
        return response


def _made(make: Callable[[], bytes | None]) -> tuple[bytes, bytes, str]:
    body = make()
    if body is None:
        raise unknown()
    return body, encode.compress(body), hashlib.sha256(body).hexdigest()[:32].upper()
