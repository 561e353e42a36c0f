"""The master's socket, and the HTTP server on it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web

from hypervisor.errors import Unavailable
from hypervisor.master.api.fit import BODY_LIMIT
from hypervisor.master.api.server import Server

BACKLOG = 1024
DRAIN_S = 2.0
MAX_REQUEST_LINE = 8 << 20
"""Bytes: exec's command line is in the URL."""
MAX_HEADERS = 64 << 10
SILENCE_S = 20.0
"""Whoever connects and has not asked anything after one to two times this is sent away: connections cost memory."""


@contextmanager
def bound(address: str, port: int) -> Iterator[socket.socket]:
    """The socket that clients connect to, from now on nobody else's; they are answered once it is `served`.

    :param port: 0 lets the kernel choose one
    :raises Unavailable: the address is taken
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((address, port))
            made.listen(BACKLOG)  # bound alone it might be bound by another one, too
        except OSError as e:
            raise Unavailable(f"cannot listen on {address} port {port}: {e.strerror}") from e
        yield made


@asynccontextmanager
async def served(sock: socket.socket, handler: Server, tls: ssl.SSLContext) -> AsyncIterator[None]:
    """Answers clients until the context is left; then ends streams, and requests under way after `DRAIN_S`."""
    server = web.Server(
        handler,
        request_factory=_request_factory,
        handler_cancellation=True,
        access_log=None,
        auto_decompress=False,  # no client compresses what it sends, and a small body could become a large one
        max_line_size=MAX_REQUEST_LINE,
        max_field_size=MAX_HEADERS,
        keepalive_timeout=120,
    )
    runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=DRAIN_S)
    await runner.setup()
    watching = asyncio.create_task(_send_silent_away(server))
    try:
        await web.SockSite(runner, sock, ssl_context=tls, backlog=BACKLOG).start()
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await runner.cleanup()


async def _send_silent_away(server: web.Server) -> None:
    """aiohttp's own timer begins after the first request of a connection."""
    silent: set[web.RequestHandler] = set()
    while True:
        await asyncio.sleep(SILENCE_S)
        now = {c for c in server.connections if not c._request_count}
        for connection in now & silent:
            connection.force_close()
        silent = now


def _request_factory(message, payload, protocol, writer, task):  # type: ignore[no-untyped-def]  # aiohttp's own names
    """Requests whose bodies may be as large as upstream takes them."""
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=BODY_LIMIT)
