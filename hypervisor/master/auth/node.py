"""What a node may do: read and change what is its own, and no other node's.

`NodeAuthorizer` decides by the request alone: a node reads the secrets and config maps that pods bound to it name, its
own Node and Lease. `NodeRestriction` sees the object too, and refuses what only the object tells.

Source: Kubernetes, "Using Node Authorization", "Admission Control in Kubernetes" (NodeRestriction).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hypervisor.kube.resources import PODS
from hypervisor.kube.selectors import parse_fields
from hypervisor.master.auth import bootstrap, rules
from hypervisor.master.auth.authorizer import NO_OPINION, Decision
from hypervisor.master.auth.bounded import Bounded
from hypervisor.master.auth.user import Attributes
from hypervisor.master.auth.views import Object, ObjectView

LEASES_NAMESPACE = "kube-node-lease"
CACHED_PATHS = 16384


def _no(reason: str) -> Decision:
    return Decision(False, reason)


class NodeAuthorizer:
    """An `Authorizer` for users that are nodes; about others it has no opinion. For one thread.

    A way from a node to an object (node, pod bound to it, secret that the pod names) that was found once is kept, and
    looked at again whenever it is used: it counts only while that pod still is there, bound, and names the object.
    """

    def __init__(self, view: ObjectView) -> None:
        self._view = view
        self._rules = rules.parse(
            next(r for r in bootstrap.cluster_roles() if r["metadata"]["name"] == "system:node")["rules"]
        )
        self._ways: Bounded[tuple[str, str, str, str], str] = Bounded(CACHED_PATHS)

    def decide(self, attributes: Attributes) -> Decision:
        """See `Authorizer`."""
        node = attributes.user.node_name
        if not node or attributes.path:
            return NO_OPINION
        if not any(rule.allows(attributes) for rule in self._rules):
            return NO_OPINION
        special = _SPECIAL.get((attributes.group, attributes.plural))
        return special(self, node, attributes) if special is not None else Decision(True, "node: may do so")

    def _referenced(self, node: str, asked: Attributes) -> Decision:
        """Secrets, config maps, service accounts and their tokens."""
        name = asked.name or _selected(asked.field_selector, "metadata.name")
        if not name or not asked.namespace:
            return _no(f"a node may read {asked.plural} only one by one, by name")
        if self.names(node, asked.plural, asked.namespace, name):
            return Decision(True, "node: a pod bound to it names the object")
        return _no(f"no relationship found between node '{node}' and this object")

    def names(self, node: str, plural: str, namespace: str, name: str) -> bool:
        """Whether a pod that is bound to the node names the object."""
        key = node, plural, namespace, name
        known = self._ways.get(key)
        if known is not None and self._leads(node, self._view.get(PODS, known, namespace), plural, name):
            return True
        for pod in self._view.list(PODS, namespace):
            if self._leads(node, pod, plural, name):
                self._ways.put(key, pod["metadata"]["name"])
                return True
        self._ways.drop(key)
        return False

    @staticmethod
    def _leads(node: str, pod: Object | None, plural: str, name: str) -> bool:
        if pod is None or (pod.get("spec") or {}).get("nodeName") != node:
            return False
        return (plural, name) in references(pod["spec"])

    def _own_node(self, node: str, asked: Attributes) -> Decision:
        name = asked.name or ("" if asked.verb == "create" else _selected(asked.field_selector, "metadata.name"))
        if asked.verb == "create" or name == node:
            return Decision(True, "node: its own Node")
        return _no(f"node '{node}' may {asked.verb} its own Node only")

    def _own_lease(self, node: str, asked: Attributes) -> Decision:
        if asked.namespace != LEASES_NAMESPACE:
            return _no(f"a node's lease lies in the namespace {LEASES_NAMESPACE}")
        if asked.verb == "create" or asked.name == node:
            return Decision(True, "node: its own Lease")
        return _no(f"node '{node}' may touch its own Lease only")

    def _own_pods(self, node: str, asked: Attributes) -> Decision:
        if asked.verb in ("list", "watch"):
            if _selected(asked.field_selector, "spec.nodeName") == node:
                return Decision(True, "node: pods bound to it")
            return _no(f"node '{node}' may only list pods with the field selector spec.nodeName={node}")
        if asked.verb == "create" and not asked.subresource:
            return Decision(True, "node: mirror pods")  # NodeRestriction looks at the pod
        pod = self._view.get(PODS, asked.name, asked.namespace)
        if pod is not None and (pod.get("spec") or {}).get("nodeName") == node:
            return Decision(True, "node: a pod bound to it")
        if pod is None:
            return Decision(True, "node: the pod is gone")  # so that it hears NotFound, and forgets the pod
        return _no(f"no relationship found between node '{node}' and this object")


_SPECIAL = {
    ("", "secrets"): NodeAuthorizer._referenced,
    ("", "configmaps"): NodeAuthorizer._referenced,
    ("", "serviceaccounts"): NodeAuthorizer._referenced,
    ("", "persistentvolumeclaims"): NodeAuthorizer._referenced,
    ("", "nodes"): NodeAuthorizer._own_node,
    ("", "pods"): NodeAuthorizer._own_pods,
    ("coordination.k8s.io", "leases"): NodeAuthorizer._own_lease,
}


def _selected(field_selector: str, field: str) -> str:
    """The one value that a field selector asks of a field; empty when it asks none."""
    return (parse_fields(field_selector).exact(field) or "") if field_selector else ""


def references(spec: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Plural and name of all that a pod of this spec may read in its namespace."""
    account = spec.get("serviceAccountName") or spec.get("serviceAccount")
    found = {("serviceaccounts", account)} if account else set()
    found |= {("secrets", secret.get("name")) for secret in spec.get("imagePullSecrets") or ()}
    for volume in spec.get("volumes") or ():
        found.update(_of_volume(volume))
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in spec.get(kind) or ():
            found.update(_of_container(container))
    return {(plural, name) for plural, name in found if name}


def _of_volume(volume: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "secrets", (volume.get("secret") or {}).get("secretName", "")
    yield "configmaps", (volume.get("configMap") or {}).get("name", "")
    yield "persistentvolumeclaims", (volume.get("persistentVolumeClaim") or {}).get("claimName", "")
    for source in (volume.get("projected") or {}).get("sources") or ():
        yield "secrets", (source.get("secret") or {}).get("name", "")
        yield "configmaps", (source.get("configMap") or {}).get("name", "")


def _of_container(container: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for source in container.get("envFrom") or ():
        yield "secrets", (source.get("secretRef") or {}).get("name", "")
        yield "configmaps", (source.get("configMapRef") or {}).get("name", "")
    for variable in container.get("env") or ():
        source = variable.get("valueFrom") or {}
        yield "secrets", (source.get("secretKeyRef") or {}).get("name", "")
        yield "configmaps", (source.get("configMapKeyRef") or {}).get("name", "")
