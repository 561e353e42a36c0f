"""What a cluster has besides its hosts where it has the pod network: what hosts may read, the name server's Service."""

from __future__ import annotations

import ipaddress
from typing import Any

from hypervisor.cli.kubeapi import KubeApi
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import CLUSTER_ROLE_BINDINGS, SERVICES

_RBAC = "rbac.authorization.k8s.io"


def ensure(api: KubeApi, service_ranges: str) -> None:
    """Makes what is missing. Raises `ApiError`, `Unavailable`."""
    _make(api, CLUSTER_ROLE_BINDINGS, readers())
    _make(api, SERVICES, name_server(service_ranges))


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


def name_server(service_ranges: str) -> dict[str, Any]:
    """The cluster's name server, at the tenth address as everywhere. It has no endpoints: hosts answer their pods."""
    first = ipaddress.ip_network(service_ranges.partition(",")[0])
    ports = [
        {"name": name, "port": 53, "protocol": protocol, "targetPort": 53}
        for name, protocol in (("dns", "UDP"), ("dns-tcp", "TCP"))
    ]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "kube-dns",
            "namespace": "kube-system",
            "labels": {"k8s-app": "kube-dns", "kubernetes.io/name": "CoreDNS"},
        },
        "spec": {"clusterIP": str(first[10]), "ports": ports},
    }


def _make(api: KubeApi, resource: Any, obj: dict[str, Any]) -> None:
    try:
        api.create(resource, obj, obj["metadata"].get("namespace"))
    except ApiError as error:
        if error.reason != "AlreadyExists":
            raise
