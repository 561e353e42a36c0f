"""What is served, told to clients: group by group, and all at once ("aggregated discovery").

Source: Kubernetes, "The Kubernetes API" (discovery API).
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from hypervisor.kube.published import newest
from hypervisor.master.api import usage
from hypervisor.master.kinds.kind import Kind
from hypervisor.master.kinds.table import Kinds
from hypervisor.version import __version__

Document = dict[str, Any]
_GVK = tuple[str, str, str]
_OTHER_KIND: Mapping[str, _GVK] = {
    "scale": ("autoscaling", "v1", "Scale"),
    "eviction": ("policy", "v1", "Eviction"),
    "binding": ("", "v1", "Binding"),
    "token": ("authentication.k8s.io", "v1", "TokenRequest"),
    "attach": ("", "v1", "PodAttachOptions"),
    "exec": ("", "v1", "PodExecOptions"),
    "debug": ("", "v1", "PodExecOptions"),
    "portforward": ("", "v1", "PodPortForwardOptions"),
    "proxy": ("", "v1", "NodeProxyOptions"),
}
"""Subresources whose objects are of another kind than their parent."""
_STREAM = ("create", "get")
_SUB_VERBS: Mapping[str, tuple[str, ...]] = {
    "status": ("get", "patch", "update"),
    "scale": ("get", "patch", "update"),
    "approval": ("get", "patch", "update"),
    "ephemeralcontainers": ("get", "patch", "update"),
    "finalize": ("update",),
    "eviction": ("create",),
    "binding": ("create",),
    "token": ("create",),
    "log": ("get",),
    "attach": _STREAM,
    "exec": _STREAM,
    "debug": _STREAM,
    "portforward": _STREAM,
    "proxy": ("create", "delete", "get", "patch", "update"),
}


def core_versions(server_address: str) -> Document:
    """``/api``."""
    by_client = [{"clientCIDR": "0.0.0.0/0", "serverAddress": server_address}]
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": by_client}


def group(name: str, versions: Iterable[str]) -> Document:
    """``/apis/GROUP``."""
    listed = [{"groupVersion": f"{name}/{v}", "version": v} for v in versions]
    return {
        "kind": "APIGroup",
        "apiVersion": "v1",
        "name": name,
        "versions": listed,
        "preferredVersion": listed[0],
    }


def group_list(kinds: Kinds) -> Document:
    """``/apis``."""
    groups = [_bare(group(name, versions)) for name, versions in kinds.groups().items() if name]
    groups.append(_bare(group(usage.GROUP, (usage.VERSION,))))
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def _bare(document: Document) -> Document:
    return {k: v for k, v in document.items() if k not in ("kind", "apiVersion")}


def resource_list(kinds: Kinds, name: str, version: str) -> Document:
    """``/api/v1`` and ``/apis/GROUP/VERSION``."""
    found = [r for kind in kinds.in_group(name, version) for r in _resources(kind)]
    gv = f"{name}/{version}" if name else version
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": gv, "resources": found}


def _resources(kind: Kind) -> Iterable[Document]:
    resource = kind.resource
    own: Document = {
        "name": resource.plural,
        "singularName": kind.singular,
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": list(kind.verbs),
    }
    own |= {"shortNames": list(kind.short_names)} if kind.short_names else {}
    own |= {"categories": list(kind.categories)} if kind.categories else {}
    own |= {"storageVersionHash": _hash(kind)} if kind.stored else {}
    yield own
    for sub in kind.subresources:
        row: Document = {
            "name": f"{resource.plural}/{sub}",
            "singularName": "",
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": list(_SUB_VERBS.get(sub, ("get",))),
        }
        if sub in _OTHER_KIND:
            of_group, of_version, row["kind"] = _OTHER_KIND[sub]
            if (of_group, of_version) != ("", "v1"):
                row |= {"group": of_group, "version": of_version}
        yield row


def _hash(kind: Kind) -> str:
    import base64

    named = f"{kind.resource.group}/{kind.resource.version}/{kind.resource.kind}".encode()
    return base64.b64encode(hashlib.sha256(named).digest()[:8]).decode()


def aggregated(kinds: Kinds, core: bool, version: str) -> Document:
    """``/api`` (`core`) or ``/apis`` as ``APIGroupDiscoveryList``."""
    items = [
        {
            "metadata": {"name": name, "creationTimestamp": None} if name else {"creationTimestamp": None},
            "versions": [
                {
                    "version": v,
                    "resources": [_aggregated_resource(k) for k in kinds.in_group(name, v)],
                    "freshness": "Current",
                }
                for v in versions
            ],
        }
        for name, versions in kinds.groups().items()
        if (not name) == core
    ]
    if not core:
        items.append(usage.aggregated())
    return {
        "kind": "APIGroupDiscoveryList",
        "apiVersion": f"apidiscovery.k8s.io/{version}",
        "metadata": {},
        "items": items,
    }


def _aggregated_resource(kind: Kind) -> Document:
    resource = kind.resource
    row: Document = {
        "resource": resource.plural,
        "responseKind": _response_kind((resource.group, resource.version, resource.kind)),
        "scope": "Namespaced" if resource.namespaced else "Cluster",
        "singularResource": kind.singular,
        "verbs": list(kind.verbs),
    }
    row |= {"shortNames": list(kind.short_names)} if kind.short_names else {}
    row |= {"categories": list(kind.categories)} if kind.categories else {}
    subs = [
        {
            "subresource": sub,
            "responseKind": _response_kind(_OTHER_KIND.get(sub, (resource.group, resource.version, resource.kind))),
            "verbs": list(_SUB_VERBS.get(sub, ("get",))),
        }
        for sub in kind.subresources
    ]
    return row | ({"subresources": subs} if subs else {})


def _response_kind(gvk: _GVK) -> Document:
    return dict(zip(("group", "version", "kind"), gvk, strict=True))


def version_document() -> Document:
    """``/version``: the release whose API is served, and after the plus sign whose server this is."""
    release, _ = newest()
    major, _, minor = release.partition(".")
    return {
        "major": major,
        "minor": minor,
        "gitVersion": f"v{release}.0+podvisor-{__version__}",
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": f"python{platform.python_version()}",
        "compiler": platform.python_implementation(),
        "platform": "linux/amd64" if platform.machine() == "x86_64" else f"linux/{platform.machine()}",
    }


def documents(kinds: Kinds, server_address: str) -> dict[str, bytes]:
    """Every plain document, by path."""
    made: dict[str, Document] = {
        "/api": core_versions(server_address),
        "/apis": group_list(kinds),
        "/version": version_document(),
        f"/apis/{usage.GROUP}": group(usage.GROUP, (usage.VERSION,)),
        f"/apis/{usage.GROUP_VERSION}": usage.resource_list(),
    }
    for name, versions in kinds.groups().items():
        if name:
            made[f"/apis/{name}"] = group(name, versions)
        for v in versions:
            made[f"/apis/{name}/{v}" if name else f"/api/{v}"] = resource_list(kinds, name, v)
    return {path: orjson.dumps(document) for path, document in made.items()}
