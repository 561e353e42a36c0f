"""Config maps, secrets and tokens out of the cluster's API server, for volumes of this node's pods."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from hypervisor.controller.node.service_environment import service_variables
from hypervisor.controller.podobjects import VolumeFile, volume_files
from hypervisor.controller.spec import PodSpec, Volume
from hypervisor.errors import NotFound
from hypervisor.kube.client import ApiClient
from hypervisor.kube.errors import ApiError
from hypervisor.kube.informer import Informer
from hypervisor.kube.meta import get, parse_time
from hypervisor.kube.resources import CONFIG_MAPS, SECRETS, SERVICE_ACCOUNTS, SERVICES, Resource

RENEW_AT = 0.8
"""Part of a token's life after which it is asked for anew, as kubelets do."""
MIN_TOKEN_S = 600
SERVICES_S = 5.0
"""At most so long a start waits for the first list of Services."""


class ClusterObjects:
    """A `PodObjects` and its `Lookup`. Before the node is connected, and while it is not, whoever asks waits."""

    def __init__(self) -> None:
        self._client: ApiClient | None = None
        self._connected = asyncio.Event()
        self._services: Informer | None = None
        self._tokens: dict[tuple[str, str, int], tuple[float, bytes]] = {}

    @contextmanager
    def through(self, client: ApiClient) -> Iterator[Informer]:
        """While it is open `client` is asked; gives what follows the Services, which is to be run."""
        self._client = client
        self._services = Informer(client, SERVICES)
        self._connected.set()
        try:
            yield self._services
        finally:
            self._connected.clear()
            self._client = None

    async def files(self, pod: PodSpec, uid: str, volume: Volume) -> Sequence[VolumeFile]:
        """The files of a volume."""
        return await volume_files(self, pod, uid, volume)

    async def _api(self) -> ApiClient:
        while self._client is None:
            await self._connected.wait()
        return self._client

    async def _get(self, resource: Resource, namespace: str, name: str) -> Mapping[str, Any]:
        try:
            return await (await self._api()).get(resource, name, namespace)
        except ApiError as e:
            if e.code == 404:
                raise NotFound(str(e)) from e
            raise

    async def config_map(self, namespace: str, name: str) -> Mapping[str, bytes]:
        """Its entries, text and binary."""
        found = await self._get(CONFIG_MAPS, namespace, name)
        texts = {key: text.encode() for key, text in get(found, "data", default={}).items()}
        return texts | _decoded(get(found, "binaryData", default={}))

    async def secret(self, namespace: str, name: str) -> Mapping[str, bytes]:
        """Its entries."""
        return _decoded(get(await self._get(SECRETS, namespace, name), "data", default={}))

    async def token(self, pod: PodSpec, uid: str, audience: str, seconds: int) -> bytes:
        """A token with at least a fifth of its life left."""
        key = (uid, audience, seconds)
        until, token = self._tokens.get(key, (0.0, b""))
        if time.time() < until:
            return token
        bound = {"kind": "Pod", "apiVersion": "v1", "name": pod.name, "uid": uid}
        spec = {"expirationSeconds": max(MIN_TOKEN_S, seconds), "boundObjectRef": bound}
        spec |= {"audiences": [audience]} if audience else {}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "metadata": {}, "spec": spec}
        client, account = await self._api(), pod.service_account or "default"
        answer = await client.create(SERVICE_ACCOUNTS, body, pod.namespace, name=account, subresource="token")
        token = str(get(answer, "status", "token", default="")).encode()
        began, ends = time.time(), parse_time(get(answer, "status", "expirationTimestamp"))
        self._drop_old(began)
        self._tokens[key] = (began + (ends - began) * RENEW_AT, token)
        return token

    async def service_variables(self, pod: PodSpec) -> Mapping[str, str]:
        """As of now. Before the Services were listed once whoever asks waits, though not for ever: a container that
        restarts while the server is away needs them less than it needs to run.
        """
        if self._services is None or not self._services.synced:
            with suppress(TimeoutError):
                async with asyncio.timeout(SERVICES_S):
                    await self._api()
                    if self._services is not None:
                        await self._services.wait_synced()
        services = () if self._services is None else self._services.store
        return service_variables(services, pod.namespace, links=pod.service_links)

    def _drop_old(self, now: float) -> None:
        for key in [key for key, (until, _) in self._tokens.items() if until < now]:
            del self._tokens[key]


def _decoded(entries: Mapping[str, str]) -> dict[str, bytes]:
    return {key: base64.b64decode(text or "") for key, text in entries.items()}
