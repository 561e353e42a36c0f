"""A clock that a test sets, and a cluster's objects in memory."""

from __future__ import annotations

import datetime as dt
from collections.abc import Hashable, Iterable
from typing import Any

from hypervisor.kube.resources import Resource

Object = dict[str, Any]


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)

    def __call__(self) -> dt.datetime:
        return self.now

    def forward(self, **span: float) -> None:
        self.now += dt.timedelta(**span)


class Objects:
    """An `ObjectView` over a dictionary."""

    def __init__(self) -> None:
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._changes = 0

    def put(self, resource: Resource, name: str, namespace: str = "", **fields: Any) -> Object:
        metadata = {"name": name, "uid": f"uid-{name}", **({"namespace": namespace} if namespace else {})}
        obj = {**fields, "metadata": metadata | fields.get("metadata", {})}
        self._objects[resource.qualified, namespace, name] = obj
        self._changes += 1
        return obj

    def remove(self, resource: Resource, name: str, namespace: str = "") -> None:
        del self._objects[resource.qualified, namespace, name]
        self._changes += 1

    def get(self, resource: Resource, name: str, namespace: str = "") -> Object | None:
        return self._objects.get((resource.qualified, namespace, name))

    def list(self, resource: Resource, namespace: str = "") -> Iterable[Object]:
        return [o for (r, ns, _), o in self._objects.items() if r == resource.qualified and namespace in ("", ns)]

    def version(self, resource: Resource) -> Hashable:
        return self._changes
