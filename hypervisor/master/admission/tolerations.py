"""DefaultTolerationSeconds: how long a pod stays bound to a node that is lost.

Source: Kubernetes, "Taints and Tolerations" (taint based evictions).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypervisor.master.admission.plugin import AdmissionRequest, Operation

KEYS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
SECONDS = 300


class DefaultTolerationSeconds:
    """See the module."""

    operations: frozenset[Operation] = frozenset(("CREATE",))
    plurals = frozenset(("pods",))

    async def admit(self, request: AdmissionRequest) -> None:
        """Adds what the pod does not say itself."""
        if request.subresource:
            return
        spec = request.object["spec"]
        given = spec.get("tolerations") or []
        added = [
            {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": SECONDS}
            for key in KEYS
            if not any(_covers(t, key) for t in given)
        ]
        if added:
            spec["tolerations"] = [*given, *added]


def _covers(toleration: Mapping[str, Any], key: str) -> bool:
    return toleration.get("key", "") in ("", key) and toleration.get("effect", "") in ("", "NoExecute")
