"""What a cluster needs besides its hosts where it has the pod network: what hosts may read for it."""

from __future__ import annotations

from typing import Any

from hypervisor.cli.kubeapi import KubeApi
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import CLUSTER_ROLE_BINDINGS

_RBAC = "rbac.authorization.k8s.io"


def ensure(api: KubeApi) -> None:
    """Makes what is missing. Raises `ApiError`, `Unavailable`."""
    _make(api, CLUSTER_ROLE_BINDINGS, readers())


def readers() -> dict[str, Any]:
    """Hosts enforce policies, which are about all pods: a network's agent reads more than what is its node's own."""
    from hypervisor.master.auth.bootstrap import POD_NETWORK
    from hypervisor.master.auth.user import NODES_GROUP

    return {
        "apiVersion": f"{_RBAC}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": POD_NETWORK},
        "roleRef": {"apiGroup": _RBAC, "kind": "ClusterRole", "name": POD_NETWORK},
        "subjects": [{"apiGroup": _RBAC, "kind": "Group", "name": NODES_GROUP}],
    }


def _make(api: KubeApi, resource: Any, obj: dict[str, Any]) -> None:
    try:
        api.create(resource, obj, obj["metadata"].get("namespace"))
    except ApiError as error:
        if error.reason != "AlreadyExists":
            raise
