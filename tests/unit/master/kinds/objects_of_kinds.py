"""Objects for the tests of kinds: the least that each kind accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypervisor.kube import resources
from hypervisor.kube.resources import Resource
from hypervisor.master.kinds import strategy
from hypervisor.master.kinds.table import KINDS
from hypervisor.master.patch.values import copy
from hypervisor.master.schema.conform import conform
from hypervisor.master.schema.load import Schema

Obj = dict[str, Any]
CSR_PEM = "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURSBSRVFVRVNULS0tLS0K"


def container(**fields: Any) -> Obj:
    return {"name": "c", "image": "nginx:1"} | fields


def pod_spec(**fields: Any) -> Obj:
    return {"containers": [container()]} | fields


def workload(**fields: Any) -> Obj:
    labels = {"app": "a"}
    template = {"metadata": {"labels": labels}, "spec": pod_spec()}
    return {"spec": {"selector": {"matchLabels": labels}, "template": template} | fields}


_ROLE_REF = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "r"}
_VERSION = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": {"type": "object"}}}
_NAMES = {"plural": "things", "kind": "Thing"}
_DEFINITION = {"group": "example.org", "scope": "Cluster", "names": _NAMES, "versions": [_VERSION]}
LEAST: dict[Resource, Callable[[], Obj]] = {
    resources.NAMESPACES: dict,
    resources.NODES: dict,
    resources.PODS: lambda: {"spec": pod_spec()},
    resources.EVENTS: lambda: {"involvedObject": {"kind": "Pod", "name": "p", "namespace": "default"}},
    resources.CONFIG_MAPS: lambda: {"data": {"k": "v"}},
    resources.SECRETS: lambda: {"data": {"k": "dg=="}},
    resources.SERVICE_ACCOUNTS: dict,
    resources.SERVICES: lambda: {"spec": {"ports": [{"port": 80}]}},
    resources.ENDPOINTS: lambda: {"subsets": [{"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": 80}]}]},
    resources.RESOURCE_QUOTAS: lambda: {"spec": {"hard": {"pods": "2"}}},
    resources.LIMIT_RANGES: lambda: {"spec": {"limits": [{"type": "Container", "max": {"cpu": "1"}}]}},
    resources.REPLICA_SETS: workload,
    resources.DEPLOYMENTS: workload,
    resources.DAEMON_SETS: workload,
    resources.STATEFUL_SETS: workload,
    resources.CONTROLLER_REVISIONS: lambda: {"data": {"a": 1}, "revision": 1},
    resources.JOBS: lambda: {"spec": {"template": {"spec": pod_spec(restartPolicy="Never")}}},
    resources.CRON_JOBS: lambda: {
        "spec": {
            "schedule": "* * * * *",
            "jobTemplate": {"spec": {"template": {"spec": pod_spec(restartPolicy="Never")}}},
        }
    },
    resources.NETWORK_POLICIES: lambda: {"spec": {"podSelector": {}}},
    resources.POD_DISRUPTION_BUDGETS: lambda: {"spec": {"minAvailable": 1}},
    resources.LEASES: lambda: {"spec": {"holderIdentity": "n", "leaseDurationSeconds": 40}},
    resources.ENDPOINT_SLICES: lambda: {"addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"]}]},
    resources.CSRS: lambda: {"spec": {"request": CSR_PEM, "signerName": "a.b/c", "usages": ["client auth"]}},
    resources.PRIORITY_CLASSES: lambda: {"value": 5},
    resources.ROLES: lambda: {"rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]},
    resources.CLUSTER_ROLES: lambda: {"rules": [{"nonResourceURLs": ["/healthz"], "verbs": ["get"]}]},
    resources.ROLE_BINDINGS: lambda: {"roleRef": dict(_ROLE_REF), "subjects": [{"kind": "User", "name": "u"}]},
    resources.CLUSTER_ROLE_BINDINGS: lambda: {"roleRef": dict(_ROLE_REF)},
    resources.CRDS: lambda: {"metadata": {"name": "things.example.org"}, "spec": copy(_DEFINITION)},
}


def new(resource: Resource, name: str = "a", **fields: Any) -> Obj:
    """An object as a client sends it, with `fields` in place of the least ones."""
    metadata = {"name": name} | ({"namespace": "default"} if resource.namespaced else {})
    least = LEAST[resource]() | fields
    return {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata} | least


def prepared(resource: Resource, obj: Obj) -> Obj:
    """As it is stored: of its type, with its defaults."""
    kind, made = KINDS.of(resource), copy(obj)
    report = conform(made, Schema.load().type_of(kind.schema))
    assert (report.unknown, report.mismatches) == ([], [])
    strategy.prepare_create(kind, made)
    return made  # type: ignore[no-any-return]


def made(resource: Resource, name: str = "a", **fields: Any) -> Obj:
    return prepared(resource, new(resource, name, **fields))


def causes(resource: Resource, obj: Obj) -> list[str]:
    """What is wrong with an object as a client sends it."""
    return [f"{c.field}: {c.message}" for c in strategy.check(KINDS.of(resource), prepared(resource, obj))]


def changes(resource: Resource, old: Obj, change: Obj, subresource: str = "") -> list[str]:
    """What is wrong with a change of top-level fields of a stored object."""
    kind, after = KINDS.of(resource), copy(old) | change
    strategy.prepare_update(kind, after, old, subresource)
    return [f"{c.field}: {c.message}" for c in strategy.check_update(kind, after, old, subresource)]
