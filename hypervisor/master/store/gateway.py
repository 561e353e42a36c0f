"""etcd's v3 API as JSON over HTTP: calls and streams, on whichever member of the cluster answers.

Source: etcd documentation, "gRPC gateway" (paths, base64 for bytes, 64-bit integers as strings).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import aiohttp
import orjson

from hypervisor.errors import Unavailable

CALL_S = 5.0
"""For one try."""
GIVE_UP_S = 10.0
"""For a write with all its tries."""
PAUSE_S = 0.2
BIGGEST_LINE = 64 << 20
KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
"""A watch whose member vanished without a word is noticed within 25 s."""


class Refused(Unavailable):
    """etcd answered, and will not do it; `grpc` is the status code that says why."""

    def __init__(self, message: str, grpc: int) -> None:
        super().__init__(f"etcd refused: {message}")
        self.grpc = grpc


class Gateway:
    """Calls to an etcd cluster. Made and closed on one event loop.

    :param tls: with the cluster's CA and a client certificate; None: as the system has it
    """

    def __init__(self, endpoints: Sequence[str], tls: ssl.SSLContext | None = None) -> None:
        self._endpoints = [endpoint.rstrip("/") for endpoint in endpoints]
        self._at = 0
        connector = aiohttp.TCPConnector(limit=0, ssl=tls if tls is not None else True)
        self._session = aiohttp.ClientSession(connector=connector, json_serialize=_dumps)

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return self._session.closed

    async def close(self) -> None:
        """Ends all connections; streams end with `Unavailable`."""
        await self._session.close()

    async def call(self, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Asks one member after the other.

        :raises Refused: etcd's own answer
        :raises Unavailable: no member answers
        """
        for _ in self._endpoints[1:]:
            try:
                return await self._try(path, request)
            except Refused:
                raise
            except Unavailable:
                self._next()
        return await self._try(path, request)

    async def call_again(self, path: str, request: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """As `call`, but goes on trying for ten seconds: for what may be done twice. Also says how often it tried."""
        deadline = asyncio.get_running_loop().time() + GIVE_UP_S
        tries = 1
        while True:
            try:
                return await self._try(path, request), tries
            except Refused:
                raise
            except Unavailable as error:
                if self._session.closed or asyncio.get_running_loop().time() > deadline:
                    raise Unavailable(f"{error}; whether the write was done is unknown") from error
            tries += 1
            await self.reconnect()

    async def reconnect(self) -> None:
        """Turns to the next member, after a moment.

        :raises Unavailable: the gateway is closed
        """
        if self._session.closed:
            raise Unavailable("the store is closed")
        self._next()
        await asyncio.sleep(PAUSE_S)

    async def stream(self, path: str, request: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The answers to one request, as they come.

        :raises Unavailable: the connection was lost or ended
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CALL_S)
        try:
            async with self._session.post(self._url(path), json=request, timeout=timeout) as response:
                _keep_alive(response)
                pending = bytearray()
                async for chunk in response.content.iter_any():
                    pending += chunk
                    *lines, rest = pending.split(b"\n")
                    pending = bytearray(rest)
                    for line in lines:
                        yield _result(line)
                    if len(pending) > BIGGEST_LINE:
                        raise Unavailable("etcd sent a line without end")
        except (aiohttp.ClientError, TimeoutError, OSError, RuntimeError) as error:
            raise self._lost(error) from error
        raise Unavailable("etcd ended a watch")

    async def _try(self, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=CALL_S)
        try:
            async with self._session.post(self._url(path), json=request, timeout=timeout) as response:
                body = await response.read()
                answer: dict[str, Any] = orjson.loads(body)
        except (aiohttp.ClientError, TimeoutError, OSError, RuntimeError, ValueError) as error:
            raise self._lost(error) from error
        if response.status != 200:
            raise _refusal(answer)
        return answer

    def _url(self, path: str) -> str:
        return f"{self._endpoints[self._at]}/v3/{path}"

    def _next(self) -> None:
        self._at = (self._at + 1) % len(self._endpoints)

    def _lost(self, error: BaseException) -> Unavailable:
        if self._session.closed:
            return Unavailable("the store is closed")
        return Unavailable(f"etcd at {self._endpoints[self._at]} does not answer ({error or type(error).__name__})")


def _refusal(answer: Mapping[str, Any]) -> Unavailable:
    code, message = int(answer.get("code", 2)), str(answer.get("message") or answer.get("error"))
    # No leader, a leader that changes, a member that stops, a request that timed out: try again elsewhere.
    passing = code in (4, 14) or "leader" in message
    return Unavailable(f"etcd: {message}") if passing else Refused(message, code)


def _result(line: bytes | bytearray) -> dict[str, Any]:
    answer = orjson.loads(line)
    if "result" not in answer:
        raise Unavailable(f"etcd ended a watch: {answer.get('error', answer)}")
    result: dict[str, Any] = answer["result"]
    return result


def _keep_alive(response: aiohttp.ClientResponse) -> None:
    transport = response.connection.transport if response.connection else None
    connection = transport.get_extra_info("socket") if transport else None
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _dumps(value: Any) -> str:
    return orjson.dumps(value).decode()
