"""A real master on loopback, in a thread of its own, and clients of it."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from hypervisor.kube.resources import SERVICE_ACCOUNTS
from hypervisor.master.auth.ca import KeyPair, client_context
from hypervisor.master.daemon import Master, MasterConfig, running


class MasterThread:
    """A master without controllers, served by a thread until `close`."""

    def __init__(self, state: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.master: Master
        self._state = state
        self._ended: asyncio.Event
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MasterThread:
        self._thread.start()
        assert self._started.wait(30), "the master did not start"
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the master did not end"

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._serve())
        except BaseException as e:
            self._error = e
        self._started.set()

    async def _serve(self) -> None:
        self._ended = asyncio.Event()
        async with running(MasterConfig(self._state, port=0, controllers=False)) as self.master:
            await self.master.client.create(SERVICE_ACCOUNTS, {"metadata": {"name": "default"}}, "default")
            self._started.set()
            await self._ended.wait()


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Api:
    """Requests as one user."""

    def __init__(self, session: aiohttp.ClientSession, base: str, namespace: str) -> None:
        self.session, self.base, self.namespace = session, base, namespace

    @property
    def maps(self) -> str:
        """Config maps of this test's namespace."""
        return f"/api/v1/namespaces/{self.namespace}/configmaps"

    @property
    def pods(self) -> str:
        """Pods of the namespace default (which has a service account)."""
        return "/api/v1/namespaces/default/pods"

    async def send(
        self, method: str, path: str, body: Any = None, kind: str = "application/json", **headers: str
    ) -> Answer:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        given |= {"Content-Type": kind} if data is not None and kind else {}
        async with self.session.request(method, self.base + path, data=data, headers=given) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.send("GET", path, **headers)

    async def make_map(self, name: str, **data: str) -> Any:
        answer = await self.send("POST", self.maps, {"metadata": {"name": name}, "data": data})
        assert answer.status == 201, answer.body
        return answer.json


def tls_of(master: Master, pair: Path) -> ssl.SSLContext:
    return client_context(pair, master.auth.ca.certificate_file)


def write_pair(folder: Path, pair: KeyPair) -> Path:
    path = folder / "client.pem"
    path.write_bytes(pair.both)
    return path


def pod(name: str, **spec: Any) -> dict[str, Any]:
    """The least pod."""
    return {"metadata": {"name": name}, "spec": {"containers": [{"name": "c", "image": "busybox"}], **spec}}
