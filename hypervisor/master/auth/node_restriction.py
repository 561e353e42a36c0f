"""The admission rule that keeps a node to itself, where the object and not the request tells what it is up to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypervisor.kube.errors import ApiError, bad_request, forbidden
from hypervisor.kube.resources import PODS
from hypervisor.master.admission.plugin import AdmissionRequest, Operation
from hypervisor.master.auth.node import LEASES_NAMESPACE, references
from hypervisor.master.auth.views import Object, ObjectView

MIRROR = "kubernetes.io/config.mirror"
PROTECTED = "node-restriction.kubernetes.io"
NODE_LABELS = frozenset(
    (
        "kubernetes.io/hostname",
        "kubernetes.io/arch",
        "kubernetes.io/os",
        "beta.kubernetes.io/arch",
        "beta.kubernetes.io/os",
        "beta.kubernetes.io/instance-type",
        "node.kubernetes.io/instance-type",
        "failure-domain.beta.kubernetes.io/zone",
        "failure-domain.beta.kubernetes.io/region",
        "topology.kubernetes.io/zone",
        "topology.kubernetes.io/region",
    )
)
"""Labels in Kubernetes' own namespaces that a node may give itself, besides those of `NODE_LABEL_SPACES`."""
NODE_LABEL_SPACES = ("kubelet.kubernetes.io", "node.kubernetes.io")


class NodeRestriction:
    """An admission plug-in; it lets everybody pass who is no node."""

    operations: frozenset[Operation] = frozenset(("CREATE", "UPDATE", "DELETE"))
    plurals = frozenset(("nodes", "pods", "leases.coordination.k8s.io", "serviceaccounts"))

    def __init__(self, view: ObjectView) -> None:
        self._view = view

    async def admit(self, request: AdmissionRequest) -> None:
        """:raises ApiError: Forbidden"""
        node = request.user.node_name
        if not node:
            return
        plural = request.kind.resource.plural
        if plural == "nodes":
            _check_node(node, request)
        elif plural == "leases":
            _check_lease(node, request)
        elif plural == "pods":
            self._check_pod(node, request)
        elif request.subresource == "token":
            self._check_token(node, request)

    def _check_pod(self, node: str, request: AdmissionRequest) -> None:
        if request.operation == "CREATE" and not request.subresource:
            _check_mirror(node, request)
            return
        pod = self._view.get(PODS, request.name, request.namespace)
        if pod is not None and (pod.get("spec") or {}).get("nodeName") != node:
            bound = (pod.get("spec") or {}).get("nodeName") or ""
            raise _refused(
                request, f"node '{node}' can only act on pods with spec.nodeName set to itself, not '{bound}'"
            )
        if request.subresource == "status" and request.old is not None:
            if _labels(request.object) != _labels(request.old):
                raise _refused(request, f"node '{node}' cannot update labels through pod status")
        elif request.operation == "UPDATE" and request.subresource != "eviction":
            raise _refused(request, f"node '{node}' may change pods through their status only")

    def _check_token(self, node: str, request: AdmissionRequest) -> None:
        ref = (request.object.get("spec") or {}).get("boundObjectRef") or {}
        if ref.get("kind") != "Pod" or not ref.get("name"):
            raise _refused(request, f"node '{node}' can only request tokens bound to a pod")
        if not ref.get("uid"):
            raise _refused(request, f"node '{node}' must give the uid of the pod that the token is bound to")
        pod = self._view.get(PODS, ref["name"], request.namespace)
        if pod is None or pod["metadata"].get("uid") != ref["uid"]:
            raise bad_request(f"the pod {ref['name']!r} with uid {ref['uid']!r} is not there")
        if (pod.get("spec") or {}).get("nodeName") != node:
            raise _refused(request, f"node '{node}' requested a token bound to a pod scheduled on a different node")


def _refused(request: AdmissionRequest, why: str) -> ApiError:
    resource = request.kind.resource
    return forbidden(resource.group, resource.plural, request.name, why)


def _labels(obj: Mapping[str, Any]) -> Mapping[str, str]:
    return (obj.get("metadata") or {}).get("labels") or {}


def _check_mirror(node: str, request: AdmissionRequest) -> None:
    pod: Object = request.object
    metadata, spec = pod.get("metadata") or {}, pod.get("spec") or {}
    if MIRROR not in (metadata.get("annotations") or {}):
        raise _refused(request, f"pod does not have '{MIRROR}' annotation, node '{node}' can only create mirror pods")
    if spec.get("nodeName") != node:
        raise _refused(request, f"node '{node}' can only create pods with spec.nodeName set to itself")
    owners = metadata.get("ownerReferences") or []
    if any(o.get("kind") != "Node" or o.get("name") != node for o in owners):
        raise _refused(request, f"node '{node}' can only create pods with an owner reference set to itself")
    if references(spec):
        raise _refused(request, f"node '{node}' can not create pods that reference a secret, config map or account")


def _check_lease(node: str, request: AdmissionRequest) -> None:
    name = request.name or (request.object.get("metadata") or {}).get("name")
    if request.namespace != LEASES_NAMESPACE or name != node:
        raise _refused(request, f"node '{node}' can only access the lease {LEASES_NAMESPACE}/{node}")


def _check_node(node: str, request: AdmissionRequest) -> None:
    name = request.name or (request.object.get("metadata") or {}).get("name")
    if name != node:
        raise _refused(request, f"node '{node}' is not allowed to modify node '{name}'")
    if request.operation == "DELETE":
        return
    old = request.old or {}
    if request.operation == "UPDATE":
        for field in ("taints", "podCIDR", "podCIDRs"):
            if (request.object.get("spec") or {}).get(field) != (old.get("spec") or {}).get(field):
                raise _refused(request, f"node '{node}' is not allowed to modify its {field}")
    new_owners = (request.object.get("metadata") or {}).get("ownerReferences")
    if new_owners and new_owners != (old.get("metadata") or {}).get("ownerReferences"):
        raise _refused(request, f"node '{node}' is not allowed to modify its ownerReferences")
    bad = sorted(key for key in _changed(_labels(request.object), _labels(old)) if not _own_label(key))
    if bad:
        raise _refused(request, f"is not allowed to modify labels: {', '.join(bad)}")


def _changed(new: Mapping[str, str], old: Mapping[str, str]) -> set[str]:
    return {key for key in {*new, *old} if new.get(key) != old.get(key)}


def _own_label(key: str) -> bool:
    """Whether a node may set a label on itself."""
    space = key.rpartition("/")[0]
    if space == PROTECTED or space.endswith(f".{PROTECTED}"):
        return False
    if not any(space == s or space.endswith(f".{s}") for s in ("kubernetes.io", "k8s.io")):
        return True
    return key in NODE_LABELS or any(space == s or space.endswith(f".{s}") for s in NODE_LABEL_SPACES)
