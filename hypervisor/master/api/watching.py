"""WATCH over HTTP: one JSON line for each event, for as long as the client stays or has asked for.

Theory of operation: the head of the answer is sent when the watch stands (so an old version is still a plain 410);
then batches of events, each shared with every other watcher of the kind and encoded once. A client that reads slowly
holds up only its own task: its cursor stays behind, and when the ring has passed it the stream ends with an ERROR.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from aiohttp import web

from hypervisor.kube.errors import ApiError
from hypervisor.kube.selectors import parse_fields, parse_labels
from hypervisor.master.api import encode
from hypervisor.master.api.exchange import Exchange
from hypervisor.master.api.negotiate import not_acceptable
from hypervisor.master.api.objects import shown
from hypervisor.master.registry.entry import Event
from hypervisor.master.registry.watch import Watch

MIN_S, MAX_S = 1800, 3600
"""How long a watch lasts that does not say; spread, so that not all come back at once."""
LONGEST_S = 24 * 3600
_HEADERS = {"Content-Type": "application/json", "Cache-Control": "no-cache, private"}
PIECE = 64 << 10
"""Bytes that are written at a time."""
Line = Callable[[Event], bytes]


async def watch(exchange: Exchange) -> web.StreamResponse:
    """GET of a collection with ``watch=true``."""
    info, query, call = exchange.info, exchange.info.query, exchange.call()
    line = _encoder(exchange)
    seconds = min(info.number("timeoutSeconds"), LONGEST_S) or random.uniform(MIN_S, MAX_S)
    initial = info.flag("sendInitialEvents") if "sendInitialEvents" in query else None
    objects = exchange.inside.objects
    following = objects.registry.watch(
        objects.kept(call.kind),
        call.namespace,
        label=parse_labels(query.get("labelSelector", "")),
        field=parse_fields(query.get("fieldSelector", "")),
        resource_version=query.get("resourceVersion", ""),
        bookmarks=info.flag("allowWatchBookmarks"),
        send_initial_events=initial,
    )
    gauge = exchange.inside.metrics.watchers.labels(call.kind.resource.qualified)
    async with following as events:
        response = web.StreamResponse(
            headers={"Content-Type": "application/json", "Cache-Control": "no-cache, private"}
        )
        await response.prepare(exchange.request)
        with gauge.track_inprogress(), suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await _stream(response, events, line)
    await response.write_eof()
    return response


async def _stream(response: web.StreamResponse, events: Watch, line: Line) -> None:
    try:
        while True:
            await _send(response, (line(event) for event in await events.batch()))
    except ApiError as e:
        await response.write(encode.dumps({"type": "ERROR", "object": e.status()}) + b"\n")


async def _send(response: web.StreamResponse, lines: Iterable[bytes]) -> None:
    """Writes them in pieces, each when the one before has left: a client that does not read then holds one piece of its
    own, however much there is to be told.
    """
    piece: list[bytes] = []
    size = 0
    for line in lines:
        if size + len(line) > PIECE and piece:
            await response.write(b"".join(piece))
            piece, size = [], 0
        whole = len(line) // PIECE * PIECE
        for start in range(0, whole, PIECE):
            await response.write(line[start : start + PIECE])
        piece.append(line[whole:])
        size += len(line) - whole
    if piece:
        await response.write(b"".join(piece))


def _encoder(exchange: Exchange) -> Line:
    """How an event goes over the wire, in the form that the client wants.

    :raises ApiError: NotAcceptable
    """
    form, kind = exchange.form(), exchange.kind
    if form.media != "application/json":
        raise not_acceptable()
    if form.as_ == "Table":
        return _tables(exchange)
    if form.as_ == "PartialObjectMetadata" or form.as_ == "PartialObjectMetadataList":
        return lambda event: _line(event, encode.partial(event.object, form.version))
    if form.as_:
        raise not_acceptable()
    if kind.kept_as is not None:
        return lambda event: _line(event, shown(kind, event.object))
    return _own_line


def _own_line(event: Event) -> bytes:
    return event.line


def _line(event: Event, shaped: Any) -> bytes:
    return encode.dumps({"type": event.type, "object": shaped}) + b"\n"


def _tables(exchange: Exchange) -> Line:
    form, kind = exchange.form(), exchange.kind
    include = encode.include_object(exchange.info.query.get("includeObject", ""))
    first = True

    def line(event: Event) -> bytes:
        nonlocal first
        metadata = {"resourceVersion": event.object["metadata"].get("resourceVersion", "")}
        rows: Iterable[Any] = () if event.type == "BOOKMARK" else (shown(kind, event.object),)
        table = encode.table(kind, rows, metadata, version=form.version, include=include, definitions=first)
        first = False
        return _line(event, table)

    return line
