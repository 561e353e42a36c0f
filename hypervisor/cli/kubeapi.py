"""A Kubernetes API client for commands: synchronous, JSON, one connection kept open; imports little."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode, urlsplit

from hypervisor.errors import Unavailable
from hypervisor.kube.errors import ApiError
from hypervisor.kube.kubeconfig import load
from hypervisor.kube.resources import Resource

QUICK = 10.0  # seconds
MERGE = "application/merge-patch+json"


class KubeApi:
    """Speaks to the API server of a kubeconfig. Its methods raise `ApiError` and `Unavailable`."""

    def __init__(self, kubeconfig: Path, timeout: float = QUICK) -> None:
        """:raises NotFound, InvalidInput: the kubeconfig is missing or damaged"""
        config = load(kubeconfig)
        self.server = config.server
        self._config = config
        parts = urlsplit(config.server)
        host, port = parts.hostname or "", parts.port or 443
        tls = config.tls()
        self._connection: http.client.HTTPConnection = (
            http.client.HTTPSConnection(host, port, timeout=timeout, context=tls)
            if tls is not None
            else http.client.HTTPConnection(host, port, timeout=timeout)
        )
        token = config.bearer()
        self._headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def ca(self) -> bytes:
        """The certificates that the server's must come from (PEM)."""
        return self._config.ca.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._connection.close()

    def get(self, resource: Resource, name: str, namespace: str | None = None) -> dict[str, Any]:
        """One object."""
        return self.call("GET", resource.path(namespace, quote(name, safe="")))

    def list(self, resource: Resource, namespace: str | None = None, **query: str) -> list[dict[str, Any]]:
        """Objects of a namespace, or of all; ``query``: ``labelSelector``, ``fieldSelector``."""
        items = self.call("GET", resource.path(namespace), query=query).get("items")
        return list(items or ())

    def create(
        self, resource: Resource, obj: Mapping[str, Any], namespace: str | None = None, *, at: str = ""
    ) -> dict[str, Any]:
        """POST; `at`: name and subresource."""
        return self.call("POST", resource.path(namespace) + (f"/{at}" if at else ""), obj)

    def patch(
        self, resource: Resource, name: str, change: Mapping[str, Any], namespace: str | None = None
    ) -> dict[str, Any]:
        """A merge patch."""
        return self.call("PATCH", resource.path(namespace, quote(name, safe="")), change, kind=MERGE)

    def delete(self, resource: Resource, name: str, namespace: str | None = None) -> dict[str, Any]:
        """DELETE."""
        return self.call("DELETE", resource.path(namespace, quote(name, safe="")))

    def ready(self) -> bool:
        """Whether the server says that it is ready."""
        try:
            return self._send("GET", "/readyz", None, {})[0] == 200
        except Unavailable:
            return False

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        kind: str = "application/json",
    ) -> dict[str, Any]:
        """Any request with a JSON answer."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": kind} if data is not None else {}
        url = path + (f"?{urlencode(query)}" if query else "")
        status, content = self._send(method, url, data, headers)
        try:
            answer = json.loads(content)
        except ValueError:
            answer = {}
        if status >= 400:
            raise ApiError.parse(answer, status)
        return answer if isinstance(answer, dict) else {}

    def _send(self, method: str, url: str, data: bytes | None, headers: Mapping[str, str]) -> tuple[int, bytes]:
        try:
            self._connection.request(method, url, data, {**self._headers, **headers})
            with self._connection.getresponse() as response:
                return response.status, response.read()
        except (OSError, http.client.HTTPException, ssl.SSLError) as error:
            self._connection.close()  # the next request opens it anew
            raise Unavailable(
                f"the API server {self.server} does not answer: {error or type(error).__name__}"
            ) from error
