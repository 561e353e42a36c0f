"""A node and what is its own."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from authkit import Objects

from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import LEASES, NODES, PODS, SERVICE_ACCOUNTS, Resource
from hypervisor.master.admission.plugin import AdmissionRequest
from hypervisor.master.auth.node import NodeAuthorizer
from hypervisor.master.auth.node_restriction import MIRROR, NodeRestriction
from hypervisor.master.auth.user import AUTHENTICATED, Attributes, User
from hypervisor.master.kinds.kind import Kind

N1 = User("system:node:n1", ("system:nodes", AUTHENTICATED))
POD_OF_N1: dict[str, Any] = {
    "nodeName": "n1",
    "serviceAccountName": "runner",
    "imagePullSecrets": [{"name": "pull"}],
    "volumes": [
        {"name": "a", "secret": {"secretName": "vol"}},
        {"name": "b", "configMap": {"name": "conf"}},
        {
            "name": "c",
            "projected": {"sources": [{"configMap": {"name": "kube-root-ca.crt"}}, {"secret": {"name": "p"}}]},
        },
    ],
    "initContainers": [{"envFrom": [{"secretRef": {"name": "from"}}]}],
    "containers": [{"env": [{"valueFrom": {"configMapKeyRef": {"name": "env"}}}]}],
}


@pytest.fixture
def cluster(objects: Objects) -> Objects:
    objects.put(PODS, "mine", "ns", spec=POD_OF_N1)
    other = {"nodeName": "n2", "volumes": [{"secret": {"secretName": "theirs"}}], "serviceAccountName": "alien"}
    objects.put(PODS, "theirs", "ns", spec=other)
    objects.put(PODS, "unbound", "ns", spec={"volumes": [{"secret": {"secretName": "later"}}]})
    return objects


# verb, what, where, field selector, whether
TABLE = [
    *(("get", "secrets", f"ns/{name}", "", True) for name in ("vol", "pull", "from", "p")),
    *(("get", "configmaps", f"ns/{name}", "", True) for name in ("conf", "env", "kube-root-ca.crt")),
    ("watch", "secrets", "ns", "metadata.name=vol", True),
    ("list", "secrets", "ns", "", False),
    ("list", "secrets", "", "", False),
    ("get", "secrets", "ns/theirs", "", False),
    ("get", "secrets", "ns/later", "", False),
    ("get", "secrets", "other/vol", "", False),
    ("get", "configmaps", "ns/vol", "", False),
    ("update", "secrets", "ns/vol", "", False),
    ("create", "serviceaccounts/token", "ns/runner", "", True),
    ("create", "serviceaccounts/token", "ns/alien", "", False),
    ("get", "nodes", "/n1", "", True),
    ("get", "nodes", "/n2", "", False),
    ("list", "nodes", "", "", False),
    ("watch", "nodes", "", "metadata.name=n1", True),
    ("create", "nodes", "", "", True),
    ("patch", "nodes/status", "/n1", "", True),
    ("patch", "nodes/status", "/n2", "", False),
    ("delete", "nodes", "/n1", "", False),
    ("list", "pods", "", "spec.nodeName=n1", True),
    ("list", "pods", "", "spec.nodeName=n2", False),
    ("list", "pods", "", "spec.nodeName!=n1", False),
    ("watch", "pods", "", "", False),
    ("get", "pods", "ns/mine", "", True),
    ("get", "pods", "ns/theirs", "", False),
    ("get", "pods", "ns/gone", "", True),
    ("patch", "pods/status", "ns/mine", "", True),
    ("patch", "pods/status", "ns/theirs", "", False),
    ("patch", "pods", "ns/mine", "", False),
    ("delete", "pods", "ns/mine", "", True),
    ("delete", "pods", "ns/theirs", "", False),
    ("create", "pods/exec", "ns/mine", "", False),
    ("create", "pods/binding", "ns/mine", "", False),
    ("update", "leases.coordination.k8s.io", "kube-node-lease/n1", "", True),
    ("create", "leases.coordination.k8s.io", "kube-node-lease", "", True),
    ("update", "leases.coordination.k8s.io", "kube-node-lease/n2", "", False),
    ("get", "leases.coordination.k8s.io", "kube-system/n1", "", False),
    ("create", "certificatesigningrequests.certificates.k8s.io", "", "", True),
    ("create", "events", "ns", "", True),
    ("get", "deployments.apps", "ns/x", "", False),
]


@pytest.mark.parametrize(("verb", "what", "where", "selector", "allowed"), TABLE)
def test_table(cluster: Objects, verb: str, what: str, where: str, selector: str, allowed: bool) -> None:
    resource, _, group = what.partition(".")
    plural, _, subresource = resource.partition("/")
    namespace, _, name = where.partition("/")
    asked = Attributes(N1, verb, group, "v1", plural, subresource, namespace, name, field_selector=selector)
    assert NodeAuthorizer(cluster).decide(asked).allowed is allowed


def test_a_way_ends_with_the_pod(cluster: Objects) -> None:
    authorizer = NodeAuthorizer(cluster)
    asked = Attributes(N1, "get", "", "v1", "secrets", "", "ns", "vol")
    assert authorizer.decide(asked).allowed
    assert authorizer.decide(asked).allowed  # by the way that is kept
    cluster.put(PODS, "mine", "ns", spec=POD_OF_N1 | {"nodeName": "n2"})
    assert not authorizer.decide(asked).allowed
    cluster.put(PODS, "mine", "ns", spec=POD_OF_N1)
    assert authorizer.decide(asked).allowed
    cluster.remove(PODS, "mine", "ns")
    assert not authorizer.decide(asked).allowed


def test_no_opinion_about_others(cluster: Objects) -> None:
    for who in (User("system:node:n1", (AUTHENTICATED,)), User("ann", ("system:nodes",))):
        decision = NodeAuthorizer(cluster).decide(Attributes(who, "get", "", "v1", "nodes", "", "", "n1"))
        assert not decision.allowed
        assert not decision.reason


def ask(
    operation: Literal["CREATE", "UPDATE", "DELETE"],
    resource: Resource,
    name: str,
    obj: dict[str, Any] | None = None,
    old: dict[str, Any] | None = None,
    *,
    subresource: str = "",
    namespace: str = "ns",
    who: User = N1,
) -> AdmissionRequest:
    namespace = namespace if resource.namespaced else ""
    kind = Kind(resource, resource.plural, "")
    return AdmissionRequest(operation, kind, who, namespace, name, obj or {}, old, subresource)


def mirror(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"annotations": {MIRROR: "x"}}, "spec": {"nodeName": "n1"} | spec}


def node(labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "n1", "labels": labels or {}}, "spec": spec}


def token(**ref: str) -> dict[str, Any]:
    return {"spec": {"boundObjectRef": {"kind": "Pod", "name": "mine", "uid": "uid-mine"} | ref}}


TAINT = [{"key": "a", "effect": "NoSchedule"}]
ADMITTED = {
    "mirror pod": ask("CREATE", PODS, "s", mirror()),
    "own pod's status": ask("UPDATE", PODS, "mine", {"status": {}}, {}, subresource="status"),
    "own pod deleted": ask("DELETE", PODS, "mine"),
    "own pod evicted": ask("CREATE", PODS, "mine", subresource="eviction"),
    "own node": ask("CREATE", NODES, "n1", node({"kubernetes.io/hostname": "n1", "zone": "a"}, taints=TAINT)),
    "own node's status": ask("UPDATE", NODES, "n1", node(taints=TAINT), node(taints=TAINT), subresource="status"),
    "own node's labels": ask("UPDATE", NODES, "n1", node({"node.kubernetes.io/x": "1"}), node()),
    "own lease": ask("UPDATE", LEASES, "n1", namespace="kube-node-lease"),
    "token of own pod": ask("CREATE", SERVICE_ACCOUNTS, "runner", token(), subresource="token"),
    "somebody else": ask("DELETE", PODS, "theirs", who=User("ann")),
}
REFUSED = {
    "ordinary pod": (ask("CREATE", PODS, "s", {"spec": {"nodeName": "n1"}}), "mirror"),
    "pod elsewhere": (ask("CREATE", PODS, "s", mirror(nodeName="n2")), "nodeName set to itself"),
    "pod with a secret": (ask("CREATE", PODS, "s", mirror(imagePullSecrets=[{"name": "x"}])), "reference a secret"),
    "another's status": (ask("UPDATE", PODS, "theirs", {}, {}, subresource="status"), "not 'n2'"),
    "another deleted": (ask("DELETE", PODS, "theirs"), "not 'n2'"),
    "another evicted": (ask("CREATE", PODS, "theirs", subresource="eviction"), "not 'n2'"),
    "unbound pod": (ask("UPDATE", PODS, "unbound", {}, {}, subresource="status"), "not ''"),
    "labels by status": (
        ask("UPDATE", PODS, "mine", {"metadata": {"labels": {"a": "b"}}}, {}, subresource="status"),
        "labels",
    ),
    "spec of own pod": (ask("UPDATE", PODS, "mine", {}, {}), "status only"),
    "another node": (ask("UPDATE", NODES, "n2", node(), node()), "not allowed to modify node 'n2'"),
    "new other node": (ask("CREATE", NODES, "", {"metadata": {"name": "n2"}}), "not allowed to modify node 'n2'"),
    "taints": (ask("UPDATE", NODES, "n1", node(), node(taints=TAINT)), "taints"),
    "protected label": (
        ask("CREATE", NODES, "n1", node({"node-restriction.kubernetes.io/pci": "1"})),
        "node-restriction.kubernetes.io/pci",
    ),
    "protected label below": (ask("CREATE", NODES, "n1", node({"a.node-restriction.kubernetes.io/b": "1"})), "labels"),
    "removing one": (ask("UPDATE", NODES, "n1", node(), node({"node-restriction.kubernetes.io/pci": "1"})), "labels"),
    "a role": (ask("CREATE", NODES, "n1", node({"node-role.kubernetes.io/control-plane": ""})), "labels"),
    "another lease": (ask("UPDATE", LEASES, "n2", namespace="kube-node-lease"), "can only access the lease"),
    "lease elsewhere": (ask("CREATE", LEASES, "n1", namespace="kube-system"), "can only access the lease"),
    "token of another's pod": (
        ask("CREATE", SERVICE_ACCOUNTS, "alien", token(name="theirs", uid="uid-theirs"), subresource="token"),
        "different node",
    ),
    "token of nothing": (
        ask("CREATE", SERVICE_ACCOUNTS, "runner", {"spec": {}}, subresource="token"),
        "bound to a pod",
    ),
    "token without uid": (ask("CREATE", SERVICE_ACCOUNTS, "runner", token(uid=""), subresource="token"), "uid"),
    "token of an older pod": (
        ask("CREATE", SERVICE_ACCOUNTS, "runner", token(uid="old"), subresource="token"),
        "not there",
    ),
}


@pytest.mark.parametrize("case", ADMITTED)
async def test_admitted(cluster: Objects, case: str) -> None:
    await NodeRestriction(cluster).admit(ADMITTED[case])


@pytest.mark.parametrize("case", REFUSED)
async def test_refused(cluster: Objects, case: str) -> None:
    request, why = REFUSED[case]
    with pytest.raises(ApiError, match=why):
        await NodeRestriction(cluster).admit(request)
