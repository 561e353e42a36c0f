"""The certificate that this node shows the API server, renewed in its kubeconfig before it ends.

Theory of operation
-------------------
::

    certificate of the kubeconfig's user, issued to this node --> sleep until 70-90 % of its time --+
        ^                                                                                           |
        +-- kubeconfig rewritten, at once, mode 0600 <-- CSR (kube-apiserver-client-kubelet) <------+

The API client looks at the kubeconfig every few seconds and takes what is new. A kubeconfig with a token, or with
somebody else's certificate, is left alone. What fails is tried again; the old certificate is used meanwhile. Killed at
any point, the kubeconfig has the old pair or the new one.
"""

from __future__ import annotations

import asyncio
import base64
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
import yaml
from cryptography import x509
from cryptography.x509.oid import NameOID

from hypervisor.errors import HvError, InvalidInput
from hypervisor.kube import kubeconfig
from hypervisor.kube.client import ApiClient
from hypervisor.kube.joining import node_certificate

LOOK_S = 3600.0
"""At most so long until the kubeconfig is looked at again: somebody else may have replaced it."""
PATIENCE_S = 900.0
RETRY_S = 15.0


class ClientCertificate:
    """Keeps a kubeconfig's certificate fresh. `run` is to be run as a task."""

    def __init__(self, client: ApiClient, node: str, path: Path) -> None:
        self._client = client
        self._node = node
        self._path = path
        self._part = random.uniform(0.7, 0.9)
        self._log = structlog.get_logger()

    async def run(self) -> None:
        """Renews it whenever it is time, for ever."""
        while True:
            try:
                left = await asyncio.to_thread(self._due)
                if left > 0:
                    await asyncio.sleep(min(left, LOOK_S))
                    continue
                async with asyncio.timeout(PATIENCE_S):
                    certificate, key = await node_certificate(self._client, self._node)
                await asyncio.to_thread(replace_pair, self._path, certificate, key)
                self._log.info("client certificate renewed", kubeconfig=str(self._path))
            except (HvError, TimeoutError, OSError, ValueError) as e:
                self._log.warning("client certificate not renewed", error=str(e) or "not signed in time")
                await asyncio.sleep(RETRY_S)

    def _due(self) -> float:
        """Seconds until it is to be renewed; for ever where that is not this node's business."""
        access = kubeconfig.load(self._path)
        if not access.certificate:
            return LOOK_S
        found = x509.load_pem_x509_certificate(access.certificate.read())
        names = [a.value for a in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        if names != [f"system:node:{self._node}"]:
            return LOOK_S
        whole = found.not_valid_after_utc - found.not_valid_before_utc
        return (found.not_valid_before_utc + whole * self._part - datetime.now(UTC)).total_seconds()


def replace_pair(path: Path, certificate: bytes, key: bytes) -> None:
    """Makes these the certificate and key of the current context's user; everything else in the file stays.

    :raises InvalidInput: it is no kubeconfig any more
    """
    path = path.resolve()
    data = yaml.safe_load(path.read_bytes())
    try:
        context = _named(data["contexts"], data["current-context"])["context"]
        user = _named(data["users"], context["user"])["user"]
    except (KeyError, TypeError, StopIteration) as e:
        raise InvalidInput(f"kubeconfig {path} has no current user") from e
    for name, pem in (("client-certificate", certificate), ("client-key", key)):
        user.pop(name, None)
        user[f"{name}-data"] = base64.b64encode(pem).decode()
    kubeconfig.write(path, data)


def _named(items: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(item for item in items if item["name"] == name)
    return found
