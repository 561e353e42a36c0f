"""What an object gets where its author said nothing: one table per kind, and a function where a table cannot say it.

Source: Kubernetes API reference ("Defaults to ..." in the descriptions of fields).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

from hypervisor.master.kinds.kind import Object

Table = Mapping[str, Any]

RBAC = "rbac.authorization.k8s.io"
SERVICE: Table = {"type": "ClusterIP", "sessionAffinity": "None"}
SERVICE_PORT: Table = {"protocol": "TCP"}
ROUTED: Table = {"internalTrafficPolicy": "Cluster"}
EXPOSED: Table = {"externalTrafficPolicy": "Cluster"}
AFFINITY_SECONDS = 10800
PRIORITY_CLASS: Table = {"preemptionPolicy": "PreemptLowerPriority"}
SECRET: Table = {"type": "Opaque"}
NAMESPACE_LABEL = "kubernetes.io/metadata.name"


def fill(target: Object, table: Table) -> None:
    """Every entry of `table` that `target` has not."""
    for key, value in table.items():
        if target.get(key) is None:
            target[key] = _fresh(value)


def _fresh(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _fresh(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def entries(parent: Mapping[str, Any], *names: str) -> Iterable[Object]:
    """The entries of the lists `names` of `parent`; of those that are not there none."""
    for name in names:
        yield from parent.get(name) or ()


def service(obj: Object) -> None:
    """Defaults of a Service."""
    spec = obj.setdefault("spec", {})
    fill(spec, SERVICE)
    if spec["type"] != "ExternalName":
        fill(spec, ROUTED)
    if spec["type"] in ("NodePort", "LoadBalancer"):
        fill(spec, EXPOSED)
    if spec["type"] == "LoadBalancer":
        fill(spec, {"allocateLoadBalancerNodePorts": True})
    if spec["sessionAffinity"] == "ClientIP":
        fill(
            spec.setdefault("sessionAffinityConfig", {}).setdefault("clientIP", {}),
            {"timeoutSeconds": AFFINITY_SECONDS},
        )
    for port in entries(spec, "ports"):
        fill(port, SERVICE_PORT)
        if "port" in port:
            fill(port, {"targetPort": port["port"]})


def secret(obj: Object) -> None:
    """Defaults of a Secret; what was given in clear goes to its encoded place."""
    fill(obj, SECRET)
    clear = obj.pop("stringData", None) or {}
    if clear:
        encoded = {key: base64.b64encode(value.encode()).decode() for key, value in clear.items()}
        obj["data"] = (obj.get("data") or {}) | encoded


def namespace(obj: Object) -> None:
    """Defaults of a Namespace: the label by which selectors find it."""
    metadata = obj.setdefault("metadata", {})
    if metadata.get("name"):
        metadata.setdefault("labels", {})[NAMESPACE_LABEL] = metadata["name"]


def new_namespace(obj: Object) -> None:
    """A new Namespace is active, and goes only when its content is gone."""
    finalizers = obj.setdefault("spec", {}).setdefault("finalizers", [])
    if "kubernetes" not in finalizers:
        finalizers.append("kubernetes")
    obj["status"] = {"phase": "Active"}


def new_csr(obj: Object) -> None:
    """A new signing request is undecided."""
    obj["status"] = {}


def priority_class(obj: Object) -> None:
    """Defaults of a PriorityClass."""
    fill(obj, PRIORITY_CLASS)
    fill(obj, {"value": 0})


def binding(obj: Object) -> None:
    """Defaults of a RoleBinding and a ClusterRoleBinding: API groups."""
    if isinstance(obj.get("roleRef"), dict):
        fill(obj["roleRef"], {"apiGroup": RBAC})
    for subject in entries(obj, "subjects"):
        if subject.get("kind") in ("User", "Group"):
            fill(subject, {"apiGroup": RBAC})


def role(obj: Object) -> None:
    """Defaults of a Role and a ClusterRole; `rules` is always there, as upstream sends it."""
    fill(obj, {"rules": []})


def endpoints(obj: Object) -> None:
    """Defaults of Endpoints."""
    for subset in entries(obj, "subsets"):
        for port in entries(subset, "ports"):
            fill(port, SERVICE_PORT)


def endpoint_slice(obj: Object) -> None:
    """Defaults of an EndpointSlice."""
    fill(obj, {"endpoints": []})
    for port in entries(obj, "ports"):
        fill(port, {"name": "", "protocol": "TCP"})


def event(obj: Object) -> None:
    """Defaults of an Event: the parts that clients print without asking."""
    fill(obj, {"source": {}, "type": "Normal"})
