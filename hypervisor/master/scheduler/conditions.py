"""The ``PodScheduled`` condition of a pod that fits nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypervisor.kube.meta import now


def scheduled_condition(pod: Mapping[str, Any], message: str) -> dict[str, Any] | None:
    """The condition to be patched in; None when the pod says the same already."""
    known = (pod.get("status") or {}).get("conditions") or ()
    old = next((c for c in known if c.get("type") == "PodScheduled"), None)
    if old is not None and old.get("status") == "False" and old.get("message") == message:
        return None
    changed = old is None or old.get("status") != "False"
    return {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": message,
        "lastTransitionTime": now() if changed or old is None else old.get("lastTransitionTime"),
    }
