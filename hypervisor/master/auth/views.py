"""What authenticators and authorizers see of the cluster: objects in memory, read without waiting.

The API server's registry keeps every kind in memory; an adapter of it is the one implementation in the product.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Protocol

from hypervisor.kube.resources import Resource

Object = Mapping[str, Any]


class ObjectView(Protocol):
    """Objects returned are shared and must not be changed. A write that this server acknowledged is seen."""

    def get(self, resource: Resource, name: str, namespace: str = "") -> Object | None:
        """One object, or None."""

    def list(self, resource: Resource, namespace: str = "") -> Iterable[Object]:
        """Those of a namespace, or of all."""

    def version(self, resource: Resource) -> Hashable:
        """Something that is another one after any change of the resource's objects."""
