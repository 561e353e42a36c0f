"""A client of any Kubernetes API server over HTTP.

Guarantees: nothing blocks the event loop but the decoding of one page; connections are reused; a certificate, key,
token or kubeconfig that was replaced on disk is used within `RELOAD_S`; an answer of 429 or 503 with ``Retry-After`` is
waited for and the request sent again (the server did nothing with it), for at most `RETRIES` times. A connection that
breaks before an answer is tried again for GET only: of anything else nobody knows whether it was done.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from hypervisor.errors import HvError, ProtocolError, Unavailable
from hypervisor.errors import Timeout as TimeoutExpired
from hypervisor.kube import kubeconfig
from hypervisor.kube.client import Object, ObjectList, PatchType, Propagation, WatchEvent
from hypervisor.kube.errors import ApiError
from hypervisor.kube.kubeconfig import KubeConfig
from hypervisor.kube.resources import Resource

REQUEST_S = 60.0
CONNECT_S = 10.0
RETRIES = 4
RELOAD_S = 10.0
WATCH_S = (300, 600)
"""A watch is asked to end at a random time between these, so that servers can be drained and load spreads."""
SILENCE_S = 90.0
"""A watch that brings neither event nor bookmark for its time and this much is given up."""
_KEEPALIVE = {socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}
_PATCH_TYPES: Mapping[PatchType, str] = {
    "json": "application/json-patch+json",
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "apply": "application/apply-patch+yaml",
}


class Credentials:
    """TLS context and token of a kubeconfig, renewed when a file behind it changes."""

    def __init__(self, config: KubeConfig) -> None:
        self.config = config
        self._looked = 0.0
        self._stamp: tuple[object, ...] = ()
        self._tls: ssl.SSLContext | None = None
        self._token = ""
        self._lock = asyncio.Lock()

    async def get(self) -> tuple[ssl.SSLContext | None, str]:
        """As of at most `RELOAD_S` ago; a replacement that cannot be read leaves the last good one in use.

        :raises InvalidInput: the first time, that they cannot be read
        """
        if not self._stamp or time.monotonic() - self._looked > RELOAD_S:
            async with self._lock:
                await self._renew()
        return self._tls, self._token

    async def _renew(self) -> None:
        if self._stamp and time.monotonic() - self._looked <= RELOAD_S:
            return
        try:
            await asyncio.to_thread(self._load)
        except HvError:
            if not self._stamp:
                raise
        self._looked = time.monotonic()

    def _load(self) -> None:
        stamp = tuple(map(_stamp, self.config.files()))
        if self._stamp and stamp == self._stamp:
            return
        config = self.config
        if config.origin is not None and self._stamp:
            config = kubeconfig.load(config.origin)
        tls, token = config.tls(), config.bearer()
        self.config, self._tls, self._token = config, tls, token
        self._stamp = stamp or (None,)


def _stamp(path: Path) -> object:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_mtime_ns, info.st_ino, info.st_size


class HttpApiClient:
    """An `ApiClient` at the end of a connection. One event loop; `close` ends it.

    :param agent: the User-Agent, by which servers tell field managers apart
    """

    def __init__(self, config: KubeConfig, *, agent: str = "podvisor") -> None:
        self._server = config.server
        self._server_name = config.server_name
        self._credentials = Credentials(config)
        self._agent = agent
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpApiClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all connections; requests under way fail."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # ---- the protocol ------------------------------------------------------------------------------------------------

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object:
        """One object."""
        return await self.request("GET", resource.path(namespace, name))

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        limit: int = 0,
        continuation: str = "",
    ) -> ObjectList:
        """A page; ``limit`` 0 is all."""
        query = _given(labelSelector=label_selector, fieldSelector=field_selector, limit=limit or "")
        query |= _given(**{"continue": continuation})
        body = await self.request("GET", resource.path(namespace), query=query)
        items = body.get("items") or []
        for item in items:  # servers leave these out of a list's items
            item.setdefault("apiVersion", resource.api_version)
            item.setdefault("kind", resource.kind)
        metadata = body.get("metadata") or {}
        return ObjectList(items, str(metadata.get("resourceVersion") or ""), metadata.get("continue") or "")

    async def create(
        self,
        resource: Resource,
        obj: Mapping[str, Any],
        namespace: str | None = None,
        *,
        name: str = "",
        subresource: str = "",
    ) -> Object:
        """POST."""
        namespace = namespace or (obj.get("metadata") or {}).get("namespace")
        return await self.request("POST", resource.path(namespace, name, subresource), body=obj)

    async def update(self, resource: Resource, obj: Mapping[str, Any], *, subresource: str = "") -> Object:
        """PUT."""
        metadata = obj["metadata"]
        path = resource.path(metadata.get("namespace"), metadata["name"], subresource)
        return await self.request("PUT", path, body=obj)

    async def patch(
        self,
        resource: Resource,
        name: str,
        namespace: str | None,
        patch: Any,
        *,
        how: PatchType = "merge",
        subresource: str = "",
        field_manager: str = "",
        force: bool = False,
    ) -> Object:
        """PATCH."""
        query = _given(fieldManager=field_manager, force="true" if force else "")
        path = resource.path(namespace, name, subresource)
        return await self.request("PATCH", path, query=query, body=patch, content_type=_PATCH_TYPES[how])

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None = None,
        *,
        grace_s: int | None = None,
        propagation: Propagation | None = None,
        uid: str = "",
        resource_version: str = "",
    ) -> Object:
        """DELETE."""
        preconditions = _given(uid=uid, resourceVersion=resource_version)
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions"}
        options |= {} if grace_s is None else {"gracePeriodSeconds": grace_s}
        options |= _given(propagationPolicy=propagation or "")
        options |= {"preconditions": preconditions} if preconditions else {}
        return await self.request("DELETE", resource.path(namespace, name), body=options)

    @asynccontextmanager
    async def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        resource_version: str = "",
        label_selector: str = "",
        field_selector: str = "",
    ) -> AsyncIterator[AsyncIterator[WatchEvent]]:
        """Changes after `resource_version`."""
        seconds = random.randint(*WATCH_S)
        query = _given(labelSelector=label_selector, fieldSelector=field_selector, resourceVersion=resource_version)
        query |= {"watch": "1", "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds)}
        timeout = aiohttp.ClientTimeout(connect=CONNECT_S, sock_read=seconds + SILENCE_S)
        path = resource.path(namespace)
        with self._translated(path):
            response = await self._send("GET", path, query, None, {}, timeout)
        async with response:
            with self._translated(path):
                if response.status != 200:
                    raise await _error(response)
            _keep_alive(response)
            yield self._events(response, path)

    async def _events(self, response: aiohttp.ClientResponse, path: str) -> AsyncIterator[WatchEvent]:
        with self._translated(path):
            async for line in _lines(response):
                yield _event(_object(line, path))

    @contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        """Errors of the connection as `HvError`."""
        try:
            yield
        except TimeoutError as e:
            raise TimeoutExpired(f"{self._server}{path} does not answer any more") from e
        except (aiohttp.ClientError, OSError) as e:
            raise Unavailable(f"{self._server} does not answer: {_words(e)}") from e

    # ---- requests ----------------------------------------------------------------------------------------------------

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Object:
        """Sends `body` as JSON and gives the answer's object.

        :raises ApiError: the server refused
        :raises Unavailable: there is no answer
        """
        data = None if body is None else orjson.dumps(body)
        headers = {} if data is None else {"Content-Type": content_type}
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._once(method, path, query or {}, data, headers)
            except _Retry as e:
                if attempt > RETRIES:
                    raise e.error from e
                await asyncio.sleep(e.delay_s)

    async def _once(
        self, method: str, path: str, query: Mapping[str, str], data: bytes | None, headers: Mapping[str, str]
    ) -> Object:
        timeout = aiohttp.ClientTimeout(total=REQUEST_S, connect=CONNECT_S)
        try:
            with self._translated(path):
                async with await self._send(method, path, query, data, headers, timeout) as response:
                    if response.status < 300:
                        return _object(await response.read(), path)
                    error = await _error(response)
        except Unavailable as e:
            if method == "GET" and isinstance(e.__cause__, (aiohttp.ServerDisconnectedError, ConnectionResetError)):
                raise _Retry(e, 0.05) from e
            raise
        if response.status in (429, 503) and (delay := _retry_after(response)) is not None:
            raise _Retry(error, delay)
        raise error

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        data: bytes | None,
        headers: Mapping[str, str],
        timeout: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        tls, token = await self._credentials.get()
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
            self._session = aiohttp.ClientSession(connector=connector, headers={"User-Agent": self._agent})
        sent = {"Accept": "application/json", **headers} | ({"Authorization": f"Bearer {token}"} if token else {})
        return await self._session.request(
            method,
            self._server + path,
            params=query,
            data=data,
            headers=sent,
            timeout=timeout,
            ssl=True if tls is None else tls,
            server_hostname=self._server_name,
            allow_redirects=False,
        )


class _Retry(Exception):
    def __init__(self, error: HvError, delay_s: float) -> None:
        super().__init__(str(error))
        self.error = error
        self.delay_s = delay_s


def _given(**values: object) -> dict[str, str]:
    """Those that say something, as text."""
    return {key: str(value) for key, value in values.items() if value != ""}


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    text = response.headers.get("Retry-After", "")
    return min(float(text), 30.0) + random.random() / 4 if text.isascii() and text.isdigit() else None


async def _error(response: aiohttp.ClientResponse) -> ApiError:
    body = await response.read()
    try:
        return ApiError.parse(orjson.loads(body), response.status)
    except orjson.JSONDecodeError:
        return ApiError.parse(None, response.status)


def _object(data: bytes, path: str) -> Object:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as e:
        raise ProtocolError(f"{path}: the answer is no JSON ({e})") from e
    if not isinstance(value, dict):
        raise ProtocolError(f"{path}: the answer is no object")
    return value


def _keep_alive(response: aiohttp.ClientResponse) -> None:
    """A peer that vanished without a word is noticed within half a minute."""
    connection = response.connection
    transport = connection.transport if connection is not None else None
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _event(event: Object) -> WatchEvent:
    kind, obj = event.get("type"), event.get("object") or {}
    match kind:
        case "ADDED" | "MODIFIED" | "DELETED" | "BOOKMARK":
            return WatchEvent(kind, obj)
        case "ERROR":
            raise ApiError.parse(obj, int(obj.get("code") or 500))
    raise ProtocolError(f"the watch brought an event of the unknown type {kind!r}")


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The lines of a body, of any length; each byte is copied twice at most. A cut last line is dropped."""
    parts: list[bytes] = []
    async for chunk in response.content.iter_any():
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            line = b"".join((*parts, piece))
            parts.clear()
            if line.strip():
                yield line
        if rest:
            parts.append(rest)
