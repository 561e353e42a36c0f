"""``hv disk filter`` on a disk of a running pod: the host's daemon changes its chain."""

from __future__ import annotations

from typing import Any

from hypervisor.cli.app import Settings
from hypervisor.cli.state import pod_reference
from hypervisor.errors import InvalidInput


def is_of_pod(name: str) -> bool:
    """Whether it names a pod's disk (``POD/DISK``), not one of the host's own."""
    return "/" in name


def change(settings: Settings, name: str, request: dict[str, Any]) -> dict[str, Any]:
    """Has the daemon change a disk.

    :param name: ``POD/DISK`` or ``NAMESPACE/POD/DISK``
    :raises HvError: refused; the chain is as it was
    """
    pod, _, disk = name.rpartition("/")
    if not pod or not disk:
        raise InvalidInput(f"{name!r} is no disk of a pod: POD/DISK is wanted, as web/scratch or web/image")
    namespace, pod = pod_reference(pod)
    with settings.connect() as connection:
        answer = connection.post("hv", "v1", "pods", namespace, pod, "disks", disk, value=request).json()
    return answer if isinstance(answer, dict) else {}
