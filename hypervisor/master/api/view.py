"""The cluster's objects as authenticators, authorizers and admission plug-ins see them: in memory, without waiting."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from hypervisor.kube.resources import Resource
from hypervisor.master.kinds.table import Kinds
from hypervisor.master.registry.registry import Registry


class RegistryView:
    """An `ObjectView` of a registry's memory."""

    def __init__(self, kinds: Kinds, registry: Registry) -> None:
        self._kinds = kinds
        self._registry = registry

    def get(self, resource: Resource, name: str, namespace: str = "") -> Mapping[str, Any] | None:
        """One object, or None."""
        entry = self._registry.peek(self._kinds.of(resource), namespace, name)
        return None if entry is None else entry.obj

    def list(self, resource: Resource, namespace: str = "") -> Iterable[Mapping[str, Any]]:
        """Those of a namespace, or of all."""
        return [entry.obj for entry in self._registry.peek_all(self._kinds.of(resource), namespace)]

    def version(self, resource: Resource) -> Hashable:
        """Another one after any change of the resource's objects."""
        return self._registry.changed(self._kinds.of(resource))
