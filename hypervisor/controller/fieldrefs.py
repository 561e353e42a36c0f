"""Fields of a pod that its containers may ask for (``fieldRef``)."""

from __future__ import annotations

import os
from collections.abc import Callable

from hypervisor.controller.spec import PodSpec


def pod_field(path: str, pod: PodSpec, uid: str) -> str:
    """What a ``fieldRef`` to `path` yields; the parser has let only known paths through."""
    base, bracket, key = path.partition("['")
    if bracket:
        return dict(pod.labels if base == "metadata.labels" else pod.annotations).get(key.removesuffix("']"), "")
    fields: dict[str, Callable[[], str]] = {
        "metadata.name": lambda: pod.name,
        "metadata.namespace": lambda: pod.namespace,
        "metadata.uid": lambda: uid,
        "spec.nodeName": lambda: pod.node_name or os.uname().nodename,
        "spec.serviceAccountName": lambda: pod.service_account or "default",
    }
    if path == "status.podIP":
        return next(iter(pod.network.addresses), "")
    if path == "status.podIPs":
        return ",".join(pod.network.addresses)
    return fields[path]() if path in fields else pod.host_address
