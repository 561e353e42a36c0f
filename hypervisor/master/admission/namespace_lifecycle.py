"""NamespaceLifecycle: objects are made only in namespaces that are there and stay.

Source: Kubernetes, "Admission Control in Kubernetes" (NamespaceLifecycle).
"""

from __future__ import annotations

from hypervisor.kube import meta
from hypervisor.kube.errors import forbidden, not_found
from hypervisor.kube.resources import NAMESPACES
from hypervisor.master.admission.plugin import AdmissionRequest, Operation
from hypervisor.master.auth.views import ObjectView

IMMORTAL = frozenset(("default", "kube-system", "kube-public"))
_REVIEWS = frozenset(("LocalSubjectAccessReview",))


class NamespaceLifecycle:
    """See the module."""

    operations: frozenset[Operation] = frozenset(("CREATE", "DELETE"))
    plurals: frozenset[str] = frozenset()

    def __init__(self, view: ObjectView) -> None:
        self._view = view

    async def admit(self, request: AdmissionRequest) -> None:
        """:raises ApiError: NotFound: no such namespace; Forbidden: it is going, or is one that must not go"""
        resource = request.kind.resource
        if resource.qualified == "namespaces":
            if request.operation == "DELETE" and request.name in IMMORTAL:
                raise forbidden("", "namespaces", request.name, "this namespace may not be deleted")
            return
        if not resource.namespaced or request.operation != "CREATE" or resource.kind in _REVIEWS:
            return
        namespace = self._view.get(NAMESPACES, request.namespace)
        if namespace is None:
            raise not_found("", "namespaces", request.namespace)
        if meta.is_deleting(namespace) and not request.subresource:
            error = forbidden(
                resource.group,
                resource.plural,
                request.name,
                f"unable to create new content in namespace {request.namespace} because it is being terminated",
            )
            cause = {
                "reason": "NamespaceTerminating",
                "message": f"namespace {request.namespace} is being terminated",
                "field": "metadata.namespace",
            }
            error.details["causes"] = [cause]
            raise error
