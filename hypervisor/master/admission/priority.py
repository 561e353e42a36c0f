"""Priority: a pod's number from its PriorityClass.

Source: Kubernetes, "Pod Priority and Preemption".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypervisor.kube.errors import forbidden
from hypervisor.kube.resources import PRIORITY_CLASSES
from hypervisor.master.admission.plugin import AdmissionRequest, Operation
from hypervisor.master.auth.views import ObjectView

BUILT_IN: Mapping[str, int] = {"system-cluster-critical": 2_000_000_000, "system-node-critical": 2_000_001_000}


class Priority:
    """See the module."""

    operations: frozenset[Operation] = frozenset(("CREATE",))
    plurals = frozenset(("pods",))

    def __init__(self, view: ObjectView) -> None:
        self._view = view

    async def admit(self, request: AdmissionRequest) -> None:
        """:raises ApiError: Forbidden: no such class, or a number that is not the class's"""
        if request.subresource:
            return
        spec = request.object["spec"]
        name, value, policy = self._of(spec.get("priorityClassName") or "", request)
        given = spec.get("priority")
        if given is not None and given != value:
            why = (
                f"the integer value of priority ({given}) must not be provided in pod spec; "
                f"priority admission controller computed {value} from the given PriorityClass name"
            )
            raise forbidden("", "pods", request.name, why)
        spec["priority"] = value
        spec.setdefault("preemptionPolicy", policy)
        if name:
            spec["priorityClassName"] = name

    def _of(self, name: str, request: AdmissionRequest) -> tuple[str, int, str]:
        if name in BUILT_IN:
            return name, BUILT_IN[name], "PreemptLowerPriority"
        found = self._view.get(PRIORITY_CLASSES, name) if name else self._default()
        if found is None:
            if name:
                raise forbidden("", "pods", request.name, f"no PriorityClass with name {name} was found")
            return "", 0, "PreemptLowerPriority"
        policy = str(found.get("preemptionPolicy") or "PreemptLowerPriority")
        return str(found["metadata"]["name"]), int(found.get("value", 0)), policy

    def _default(self) -> Mapping[str, Any] | None:
        """The class for pods that name none; of several the lowest."""
        defaults = [c for c in self._view.list(PRIORITY_CLASSES) if c.get("globalDefault")]
        return min(defaults, key=lambda c: int(c.get("value", 0)), default=None)
