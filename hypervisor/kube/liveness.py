"""Noticing that a client has gone without a word, and never taking one that is only slow for such a one.

A client may stop reading for hours (a pager, a stopped process), and while a process does not read its input we stop
reading from the client, so that an answer to a ping may never be seen here. Nothing therefore waits for an answer: what
is sent is acknowledged, or not, by the client's kernel. Pings make sure that something is sent (a connection whose
other end has closed refuses it), and TCP's own keep-alive asks after one on which nothing is under way.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

PERIOD_S = 15.0
"""Between pings; two of them tell that the client has gone."""
_OPTIONS = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


def keep_alive(transport: asyncio.BaseTransport | None) -> None:
    """Lets the kernel ask after an idle peer; nothing for a transport that is no TCP."""
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with suppress(OSError):  # it has gone already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _OPTIONS:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


@asynccontextmanager
async def pinging(transport: asyncio.BaseTransport | None, ping: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Calls `ping` each `PERIOD_S` seconds as long as the context lasts, or until it raises `OSError`: whoever writes
    next, or reads, learns the same from the transport."""
    keep_alive(transport)
    task = asyncio.create_task(_ping(ping), name="pings")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _ping(ping: Callable[[], Awaitable[None]]) -> None:
    with suppress(OSError):
        while True:
            await asyncio.sleep(PERIOD_S)
            await ping()
