"""The roles and bindings that every cluster begins with, as data; names and rules follow upstream's.

`reconcile` makes what is missing, and adds what a newer version grants, unless the object's annotation
``rbac.authorization.kubernetes.io/autoupdate`` is ``"false"``; what an administrator added stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypervisor.kube.client import ApiClient
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, ROLE_BINDINGS, ROLES, Resource
from hypervisor.master.auth import rules
from hypervisor.master.auth.rbac import expanded

Object = dict[str, Any]

AUTOUPDATE = "rbac.authorization.kubernetes.io/autoupdate"
BOOTSTRAPPING = {"kubernetes.io/bootstrapping": "rbac-defaults"}
_API = "rbac.authorization.k8s.io"
_READ = "get list watch"
_WRITE = "create delete deletecollection patch update"
_ALL = f"{_READ} {_WRITE}"


def rule(verbs: str, groups: str, resources: str, names: str = "") -> Object:
    """A rule from words; a group of ``core`` is the empty one."""
    made = {
        "apiGroups": ["" if g == "core" else g for g in groups.split()],
        "resources": resources.split(),
        "verbs": verbs.split(),
    }
    return made | ({"resourceNames": names.split()} if names else {})


def urls(*paths: str) -> Object:
    """A rule that lets one read URLs."""
    return {"nonResourceURLs": list(paths), "verbs": ["get"]}


_DISCOVERY = urls(
    "/api", "/api/*", "/apis", "/apis/*", "/healthz", "/livez", "/openapi", "/openapi/*", "/readyz", "/version",
    "/version/",
)  # fmt: skip
_PUBLIC = urls("/healthz", "/livez", "/readyz", "/version", "/version/")
_EVENTS = rule("create patch update", "core events.k8s.io", "events")

_PROXIER = [
    rule(_READ, "core", "services endpoints"),
    rule(_READ, "discovery.k8s.io", "endpointslices"),
]

POD_NETWORK = "podvisor:pod-network"
"""What hosts may read where they serve the pod network: bound to them by whoever starts a cluster with it."""
_POD_NETWORK = [
    rule(_READ, "core", "namespaces pods"),
    rule(_READ, "networking.k8s.io", "networkpolicies"),
]

_VIEW = [
    rule(
        _READ,
        "core",
        "configmaps endpoints events limitranges namespaces namespaces/status persistentvolumeclaims pods pods/log "
        "pods/status replicationcontrollers resourcequotas serviceaccounts services services/status",
    ),
    rule(_READ, "discovery.k8s.io", "endpointslices"),
    rule(
        _READ,
        "apps",
        "controllerrevisions daemonsets daemonsets/status deployments deployments/scale deployments/status "
        "replicasets replicasets/scale replicasets/status statefulsets",
    ),
    rule(_READ, "batch", "cronjobs jobs jobs/status"),
    rule(_READ, "policy", "poddisruptionbudgets poddisruptionbudgets/status"),
    rule(_READ, "networking.k8s.io", "networkpolicies"),
]
_EDIT = [
    rule(_READ, "core", "pods/attach pods/exec pods/portforward pods/proxy secrets services/proxy"),
    rule("impersonate", "core", "serviceaccounts"),
    rule(_WRITE, "core", "pods pods/attach pods/exec pods/portforward pods/proxy"),
    rule("create", "core", "pods/eviction serviceaccounts/token"),
    rule(_WRITE, "core", "configmaps events secrets serviceaccounts services services/proxy"),
    rule(_WRITE, "apps", "daemonsets deployments deployments/rollback deployments/scale replicasets replicasets/scale"),
    rule(_WRITE, "apps", "statefulsets statefulsets/scale"),
    rule(_WRITE, "batch", "cronjobs jobs"),
    rule(_WRITE, "policy", "poddisruptionbudgets"),
    rule(_WRITE, "networking.k8s.io", "networkpolicies"),
    rule(_ALL, "coordination.k8s.io", "leases"),
]
_ADMIN = [
    rule("create", "authorization.k8s.io", "localsubjectaccessreviews"),
    rule(_ALL, _API, "rolebindings roles"),
]
_NODE = [
    rule("create", "authentication.k8s.io", "tokenreviews"),
    rule("create", "authorization.k8s.io", "localsubjectaccessreviews subjectaccessreviews"),
    rule(_READ, "core", "services"),
    rule("create get list watch patch update", "core", "nodes"),
    rule("patch update", "core", "nodes/status"),
    rule("create patch update", "core", "events"),
    rule("create delete get list watch", "core", "pods"),
    rule("patch update", "core", "pods/status"),
    rule("create", "core", "pods/eviction"),
    rule("get list watch", "core", "configmaps secrets"),
    rule("get", "core", "persistentvolumeclaims persistentvolumes serviceaccounts"),
    rule("create get list watch", "certificates.k8s.io", "certificatesigningrequests"),
    rule("create delete get patch update", "coordination.k8s.io", "leases"),
    rule("create", "core", "serviceaccounts/token"),
    rule(_READ, "node.k8s.io", "runtimeclasses"),
    rule(_READ, "storage.k8s.io", "csidrivers"),
]
_SCHEDULER = [
    _EVENTS,
    rule("create get list update watch patch", "coordination.k8s.io", "leases"),
    rule(_READ, "core", "nodes namespaces services replicationcontrollers persistentvolumeclaims persistentvolumes"),
    rule("delete get list watch", "core", "pods"),
    rule("create", "core", "bindings pods/binding"),
    rule("patch update", "core", "pods/status"),
    rule(_READ, "apps", "replicasets statefulsets"),
    rule(_READ, "policy", "poddisruptionbudgets"),
    rule(_READ, "scheduling.k8s.io", "priorityclasses"),
]
_CONTROLLER_MANAGER = [
    _EVENTS,
    rule("create get list update watch patch", "coordination.k8s.io", "leases"),
    rule("create get update", "core", "secrets serviceaccounts"),
    rule("delete", "core", "secrets"),
    rule("get list watch", "*", "*"),
    rule("create", "authentication.k8s.io", "tokenreviews"),
    rule("create", "authorization.k8s.io", "subjectaccessreviews"),
    rule("create", "core", "serviceaccounts/token"),
    rule(_WRITE, "core", "pods pods/status pods/finalizers endpoints configmaps nodes nodes/status"),
    rule(_WRITE, "apps batch discovery.k8s.io policy certificates.k8s.io", "*"),
    rule("*", "*", "namespaces namespaces/finalize namespaces/status"),
    rule("delete patch update", "*", "*"),
]


def _role(name: str, of: Sequence[Object], labels: Mapping[str, str] | None = None) -> Object:
    metadata = {"name": name, "labels": BOOTSTRAPPING | dict(labels or {}), "annotations": {AUTOUPDATE: "true"}}
    return {"apiVersion": f"{_API}/v1", "kind": "ClusterRole", "metadata": metadata, "rules": list(of)}


def _aggregate(name: str, *parts: str, into: str = "") -> Object:
    role = _role(name, [], {f"{_API}/aggregate-to-{into}": "true"} if into else None)
    selectors = [{"matchLabels": {f"{_API}/aggregate-to-{part}": "true"}} for part in parts]
    return role | {"aggregationRule": {"clusterRoleSelectors": selectors}}


def _part(of: str, its_rules: Sequence[Object]) -> Object:
    return _role(f"system:aggregate-to-{of}", its_rules, {f"{_API}/aggregate-to-{of}": "true"})


def _approver(signer: str) -> Object:
    return rule("approve", "certificates.k8s.io", "signers", signer)


def _certificates(what: str, its_rules: Sequence[Object]) -> Object:
    return _role(f"system:certificates.k8s.io:{what}", its_rules)


_CSRS = "certificatesigningrequests"


def cluster_roles() -> list[Object]:
    """All of them, those that aggregate with their rules filled in."""
    certificates = "certificates.k8s.io"
    made = [
        _role("cluster-admin", [rule("*", "*", "*"), {"nonResourceURLs": ["*"], "verbs": ["*"]}]),
        _aggregate("admin", "admin"),
        _aggregate("edit", "edit", into="admin"),
        _aggregate("view", "view", into="edit"),
        _part("admin", _ADMIN),
        _part("edit", _EDIT),
        _part("view", _VIEW),
        _role("system:discovery", [_DISCOVERY]),
        _role("system:monitoring", [urls("/metrics", "/metrics/slis", "/livez", "/readyz", "/healthz", "/livez/*")]),
        _role(
            "system:basic-user",
            [
                rule("create", "authorization.k8s.io", "selfsubjectaccessreviews selfsubjectrulesreviews"),
                rule("create", "authentication.k8s.io", "selfsubjectreviews"),
            ],
        ),
        _role("system:public-info-viewer", [_PUBLIC]),
        _role(
            "system:service-account-issuer-discovery",
            [urls("/.well-known/openid-configuration", "/.well-known/openid-configuration/", "/openid/v1/jwks")],
        ),
        _role("system:node", _NODE),
        _role("system:node-proxier", _PROXIER),
        _role(POD_NETWORK, _POD_NETWORK),
        _role("system:node-bootstrapper", [rule("create get list watch", certificates, _CSRS)]),
        _role(
            "system:auth-delegator",
            [
                rule("create", "authentication.k8s.io", "tokenreviews"),
                rule("create", "authorization.k8s.io", "subjectaccessreviews"),
            ],
        ),
        _role(
            "system:kubelet-api-admin",
            [
                rule(_READ, "core", "nodes"),
                rule("proxy", "core", "nodes"),
                rule("*", "core", "nodes/log nodes/metrics nodes/proxy nodes/stats"),
            ],
        ),
        _role("system:kube-scheduler", _SCHEDULER),
        _role("system:kube-controller-manager", _CONTROLLER_MANAGER),
        _certificates(f"{_CSRS}:nodeclient", [rule("create", certificates, f"{_CSRS}/nodeclient")]),
        _certificates(f"{_CSRS}:selfnodeclient", [rule("create", certificates, f"{_CSRS}/selfnodeclient")]),
        _certificates("kube-apiserver-client-approver", [_approver("kubernetes.io/kube-apiserver-client")]),
        _certificates(
            "kube-apiserver-client-kubelet-approver", [_approver("kubernetes.io/kube-apiserver-client-kubelet")]
        ),
        _certificates("kubelet-serving-approver", [_approver("kubernetes.io/kubelet-serving")]),
    ]
    return [dict(role) for role in expanded(made)]


def _binding(role: str, *groups: str, users: Sequence[str] = (), name: str = "") -> Object:
    metadata = {"name": name or role, "labels": dict(BOOTSTRAPPING), "annotations": {AUTOUPDATE: "true"}}
    named = [("Group", g) for g in groups] + [("User", u) for u in users]
    return {
        "apiVersion": f"{_API}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": metadata,
        "roleRef": {"apiGroup": _API, "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": _API, "kind": kind, "name": subject} for kind, subject in named],
    }


def cluster_role_bindings() -> list[Object]:
    """All of them."""
    client = f"system:certificates.k8s.io:{_CSRS}"
    return [
        _binding("cluster-admin", "system:masters"),
        _binding("system:discovery", "system:authenticated"),
        _binding("system:basic-user", "system:authenticated"),
        _binding("system:public-info-viewer", "system:authenticated", "system:unauthenticated"),
        _binding("system:service-account-issuer-discovery", "system:serviceaccounts"),
        _binding("system:monitoring", "system:monitoring"),
        _binding("system:kube-scheduler", users=["system:kube-scheduler"]),
        _binding("system:kube-controller-manager", users=["system:kube-controller-manager"]),
        _binding("system:node-bootstrapper", "system:bootstrappers"),
        # A host is its own service proxy: what kube-proxy has an account for elsewhere, nodes may do here.
        _binding("system:node-proxier", "system:nodes"),
        _binding(f"{client}:nodeclient", "system:bootstrappers"),
        _binding(f"{client}:selfnodeclient", "system:nodes"),
    ]


async def reconcile(client: ApiClient) -> int:
    """Makes and completes them; what does not differ is not written.

    :returns: how many objects were made or changed
    """
    changed = 0
    for resource, wanted in ((CLUSTER_ROLES, cluster_roles()), (CLUSTER_ROLE_BINDINGS, cluster_role_bindings())):
        have = {o["metadata"]["name"]: o for o in (await client.list(resource)).items}
        for obj in wanted:
            changed += await _ensure(client, resource, obj, have.get(obj["metadata"]["name"]))
    return changed


async def _ensure(client: ApiClient, resource: Resource, wanted: Object, have: Mapping[str, Any] | None) -> bool:
    if have is None:
        await client.create(resource, wanted)
        return True
    merged = completed(wanted, have)
    if merged is None:
        return False
    if merged.get("roleRef") != have.get("roleRef"):  # immutable: made anew
        await client.delete(resource, wanted["metadata"]["name"], uid=have["metadata"].get("uid", ""))
        await client.create(resource, wanted)
        return True
    try:
        await client.update(resource, merged)
    except ApiError as error:
        if error.reason != "Conflict":  # somebody changed it just now: the next start completes it
            raise
    return True


def completed(wanted: Mapping[str, Any], have: Mapping[str, Any]) -> Object | None:
    """`have` with all that `wanted` grants; None when it grants that already, or is not to be touched."""
    metadata = have["metadata"]
    annotations, labels = metadata.get("annotations") or {}, metadata.get("labels") or {}
    if annotations.get(AUTOUPDATE) == "false":
        return None
    meta = wanted["metadata"]
    merged: Object = {
        **have,
        "metadata": {
            **metadata,
            "labels": {**labels, **meta["labels"]},
            "annotations": {**meta["annotations"], **annotations},
        },
    }
    if "rules" in wanted:
        own = list(have.get("rules") or ())
        missing = rules.lacking(rules.parse(own), rules.parse(wanted["rules"]))
        merged |= {"rules": own + [rule.render() for rule in missing]}
        merged |= {"aggregationRule": wanted["aggregationRule"]} if "aggregationRule" in wanted else {}
    if "roleRef" in wanted:
        subjects = list(have.get("subjects") or ())
        merged |= {"roleRef": wanted["roleRef"]}
        merged |= {"subjects": subjects + [s for s in wanted["subjects"] if s not in subjects]}
    return None if merged == have else merged


KINDS = (ROLES, CLUSTER_ROLES, ROLE_BINDINGS, CLUSTER_ROLE_BINDINGS)
"""What an API server must serve for RBAC to work."""
