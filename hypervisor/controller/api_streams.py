"""Answers that come bit by bit: JSON lines, tar streams, the console."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from aiohttp import web

from hypervisor.errors import InvalidInput

NDJSON = "application/x-ndjson"


@asynccontextmanager
async def streaming(request: web.Request, content_type: str) -> AsyncIterator[web.StreamResponse]:
    """A chunked answer of this type, begun at once and ended on the way out."""
    response = web.StreamResponse(headers={"Content-Type": content_type, "Cache-Control": "no-store"})
    await response.prepare(request)
    yield response
    with suppress(ConnectionResetError):  # the client has what it wanted, and has gone
        await response.write_eof()


def line(value: Any) -> bytes:
    """`value` as one line of JSON."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def flag(request: web.Request, name: str) -> bool:
    """A boolean of the query; absent is false.

    :raises InvalidInput: neither true nor false
    """
    text = request.query.get(name, "").lower()
    if text in ("", "0", "false", "no"):
        return False
    if text in ("1", "true", "yes"):
        return True
    raise InvalidInput(f"{text!r} is not a boolean; use true or false", where=name)


def number(request: web.Request, name: str, *, maximum: int) -> int | None:
    """A whole number of the query, from 0; absent is None.

    :raises InvalidInput: none, negative or more than `maximum`
    """
    text = request.query.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 18 or int(text) > maximum:
        raise InvalidInput(f"{text[:40]!r} is no whole number from 0 to {maximum}", where=name)
    return int(text)
