"""What every namespace has: a service account ``default`` and the certificate authority's ``kube-root-ca.crt``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hypervisor.errors import HvError
from hypervisor.kube import meta
from hypervisor.kube.errors import ApiError
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import CONFIG_MAPS, NAMESPACES, SERVICE_ACCOUNTS, Resource
from hypervisor.master.controllers.base import Context, own_key

ROOT_CA = "kube-root-ca.crt"


class AccountsController:
    """Makes both where they are missing, and mends the certificate where it was changed."""

    name = "serviceaccount"

    def __init__(self, context: Context, ca_pem: str) -> None:
        self._context = context
        self._ca_pem = ca_pem
        self.watches = {NAMESPACES: own_key, SERVICE_ACCOUNTS: self._namespace_of, CONFIG_MAPS: self._namespace_of}

    @staticmethod
    def _namespace_of(obj: Mapping[str, Any]) -> Iterable[Key]:
        namespace, name = meta.key_of(obj)
        return [("", namespace)] if name in ("default", ROOT_CA) else []

    async def sync(self, key: Key) -> float | None:
        """One turn for one namespace."""
        name = key[1]
        namespace = self._context.cached(NAMESPACES, "", name)
        if namespace is None or meta.is_deleting(namespace):
            return None
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": name}}
        await self._make(SERVICE_ACCOUNTS, account)
        await self._root_ca(name)
        return None

    async def _root_ca(self, namespace: str) -> None:
        wanted = {"ca.crt": self._ca_pem}
        known = self._context.cached(CONFIG_MAPS, namespace, ROOT_CA)
        if known is not None:
            if known.get("data") != wanted:
                patch = {"data": dict.fromkeys(known.get("data") or {}) | wanted}
                await self._context.client.patch(CONFIG_MAPS, ROOT_CA, namespace, patch)
            return
        text = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints."
        metadata = {"name": ROOT_CA, "namespace": namespace, "annotations": {"kubernetes.io/description": text}}
        await self._make(CONFIG_MAPS, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": wanted})

    async def _make(self, resource: Resource, obj: dict[str, Any]) -> None:
        namespace, name = meta.key_of(obj)
        if self._context.cached(resource, namespace, name) is not None:
            return
        try:
            await self._context.client.create(resource, obj, namespace)
        except HvError as e:
            # Forbidden: the namespace began to go since.
            if not isinstance(e, ApiError) or e.reason not in ("AlreadyExists", "Forbidden", "NotFound"):
                raise
