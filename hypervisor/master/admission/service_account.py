"""ServiceAccount: a pod runs as an account, and gets that account's token.

Source: Kubernetes, "Managing Service Accounts" (ServiceAccount admission controller, bound tokens in pods).
"""

from __future__ import annotations

import secrets
from typing import Any

from hypervisor.kube.errors import forbidden
from hypervisor.kube.resources import SERVICE_ACCOUNTS
from hypervisor.master.admission.plugin import AdmissionRequest, Object, Operation
from hypervisor.master.auth.views import ObjectView
from hypervisor.master.registry.metadata import SUFFIX_LETTERS

MOUNT_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"
VOLUME = "kube-api-access-"
TOKEN_S = 3607
"""Upstream's lifetime of a pod's token: an hour, and an odd number by which they are recognised."""
_MIRROR = "kubernetes.io/config.mirror"


class ServiceAccount:
    """See the module."""

    operations: frozenset[Operation] = frozenset(("CREATE",))
    plurals = frozenset(("pods",))

    def __init__(self, view: ObjectView) -> None:
        self._view = view

    async def admit(self, request: AdmissionRequest) -> None:
        """:raises ApiError: Forbidden: there is no such account"""
        pod = request.object
        if request.subresource or _MIRROR in (pod["metadata"].get("annotations") or {}):
            return
        spec = pod["spec"]
        name = spec.get("serviceAccountName") or spec.get("serviceAccount") or "default"
        spec["serviceAccountName"] = spec["serviceAccount"] = name
        account = self._view.get(SERVICE_ACCOUNTS, name, request.namespace)
        if account is None:
            why = f'error looking up service account {request.namespace}/{name}: serviceaccount "{name}" not found'
            raise forbidden("", "pods", request.name, why)
        if not spec.get("imagePullSecrets") and account.get("imagePullSecrets"):
            spec["imagePullSecrets"] = [dict(s) for s in account["imagePullSecrets"]]
        wanted = spec.get("automountServiceAccountToken", account.get("automountServiceAccountToken", True))
        if wanted:
            _mount(spec)


def _mount(spec: Object) -> None:
    name = _present(spec) or VOLUME + "".join(secrets.choice(SUFFIX_LETTERS) for _ in range(5))
    mounted = False
    for key in ("initContainers", "containers"):
        for container in spec.get(key) or ():
            mounts = container.setdefault("volumeMounts", [])
            if all(m.get("mountPath") != MOUNT_PATH for m in mounts):
                mounts.append({"name": name, "readOnly": True, "mountPath": MOUNT_PATH})
                mounted = True
    if mounted and not _present(spec):
        spec.setdefault("volumes", []).append({"name": name, "projected": _sources()})


def _present(spec: Object) -> str:
    """The volume's name, where the pod was copied from one that has it."""
    names = (str(v.get("name", "")) for v in spec.get("volumes") or () if "projected" in v)
    return next((n for n in names if n.startswith(VOLUME)), "")


def _sources() -> dict[str, Any]:
    field = {"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}
    authority = {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    return {
        "sources": [
            {"serviceAccountToken": {"expirationSeconds": TOKEN_S, "path": "token"}},
            {"configMap": authority},
            {"downwardAPI": {"items": [field]}},
        ],
        "defaultMode": 0o644,
    }
