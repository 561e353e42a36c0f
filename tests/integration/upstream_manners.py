"""An API server with upstream's manners, in front of ours: for what a node must put up with there.

It lets a node in by its certificate and asks the master in its name. On top of the master's own rules (Node authorizer,
NodeRestriction) it does what our master does not: no GET of a status subresource, 429 now and then, watches that end
after seconds, and a 410 in the middle of one. Source: Kubernetes, "API Concepts", "API Priority and Fairness" and
"Using RBAC Authorization" (system:node).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from cryptography import x509
from cryptography.x509.oid import NameOID

from hypervisor.master.auth import parties
from hypervisor.master.auth.ca import CertificateAuthority, Request, client_context, server_context

WATCH_S = 2.0
BUSY_EVERY = 9
_STATUS = re.compile(r"/(pods|nodes)/[^/]+/status$")
_DROPPED = {"host", "content-length", "transfer-encoding", "connection", "accept-encoding"}


@dataclass
class Told:
    """What came by.

    :ivar requests: by method and path
    :ivar refused: method, path and code of what the master denied
    """

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: list[tuple[str, str, int]] = field(default_factory=list)
    busy: int = 0
    expired: int = 0
    watches: Counter[str] = field(default_factory=Counter)


def _status(code: int, reason: str) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": reason,
        "reason": reason,
        "code": code,
    }


class Manners:
    """The handler."""

    def __init__(self, session: aiohttp.ClientSession, base: str, told: Told) -> None:
        self._session, self._base, self._told = session, base, told
        self._count = 0

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        told, path = self._told, request.path
        told.requests[request.method, path] += 1
        if request.method == "GET" and _STATUS.search(path):
            told.refused.append((request.method, path, 403))
            return web.json_response(_status(403, "Forbidden"), status=403)
        if request.query.get("watch") in ("1", "true"):
            return await self._watch(request)
        self._count += 1
        if self._count % BUSY_EVERY == 0:
            told.busy += 1
            return web.json_response(_status(429, "TooManyRequests"), status=429, headers={"Retry-After": "1"})
        async with self._ask(request, await request.read()) as answer:
            if answer.status in (401, 403):
                told.refused.append((request.method, path, answer.status))
            body = await answer.read()
        return web.Response(body=body, status=answer.status, headers={"Content-Type": answer.headers["Content-Type"]})

    async def _watch(self, request: web.BaseRequest) -> web.StreamResponse:
        told = self._told
        told.watches[request.path] += 1
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if told.watches[request.path] == 2:
            told.expired += 1
            line = json.dumps({"type": "ERROR", "object": _status(410, "Expired")}) + "\n"
            await response.write(line.encode())
        else:
            with contextlib.suppress(TimeoutError, aiohttp.ClientError):
                async with asyncio.timeout(WATCH_S), self._ask(request, b"") as answer:
                    async for line in answer.content:
                        await response.write(line)
        await response.write_eof()
        return response

    def _ask(self, request: web.BaseRequest, body: bytes) -> Any:
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _DROPPED}
        headers |= {"Impersonate-User": _user(request), "Impersonate-Group": "system:nodes"}
        url = f"{self._base}{request.rel_url}"
        return self._session.request(request.method, url, data=body or None, headers=headers)


def _user(request: web.BaseRequest) -> str:
    tls = request.get_extra_info("ssl_object")
    der = tls.getpeercert(binary_form=True) if tls is not None else None
    assert der, "the node showed no certificate"
    subject = x509.load_der_x509_certificate(der).subject
    return str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


@contextmanager
def upstream(state: Path, master: str, folder: Path) -> Iterator[tuple[str, Told]]:
    """Serves in a thread; gives its URL and what comes by.

    :param state: of the master, at the URL `master`
    """
    ca = CertificateAuthority.open(state / "pki")
    pair = folder / "upstream.pem"
    pair.write_bytes(ca.issue(Request("upstream", names=("127.0.0.1",), server=True)).both)
    tls, admin = server_context(pair, ca.certificate_file), client_context(parties.admin(ca), ca.certificate_file)
    told, ports, loop = Told(), list[int](), asyncio.new_event_loop()
    ready, ended = threading.Event(), asyncio.Event()

    async def serve(tls: ssl.SSLContext) -> None:
        connector = aiohttp.TCPConnector(ssl=admin, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            runner = web.ServerRunner(web.Server(Manners(session, master, told)), shutdown_timeout=1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
            ports.append(runner.addresses[0][1])
            ready.set()
            await ended.wait()
            await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve(tls)), daemon=True)
    thread.start()
    try:
        assert ready.wait(20)
        yield f"https://127.0.0.1:{ports[0]}", told
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(20)
