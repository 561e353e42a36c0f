"""The certificates that the parts of a cluster hold, by who they are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hypervisor.master.auth.ca import CertificateAuthority, KeyPair, Request
from hypervisor.master.auth.user import NODES_GROUP, SYSTEM_MASTERS

KUBELET_CLIENT = "kube-apiserver-kubelet-client"
ADMIN = "kubernetes-admin"
SERVICE_NAMES = (
    "localhost",
    "127.0.0.1",
    "::1",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
)
"""How clients may call the API server, besides its addresses."""


def api_server(ca: CertificateAuthority, addresses: Iterable[str]) -> Path:
    """The serving certificate and key of the API server, issued anew when its addresses changed or it expires soon."""
    names = tuple(dict.fromkeys((*addresses, *SERVICE_NAMES)))
    return ca.ensure("apiserver", Request("kube-apiserver", names=names, server=True))


def kubelet_client(ca: CertificateAuthority) -> Path:
    """What the API server shows to nodes."""
    return ca.ensure("apiserver-kubelet-client", Request(KUBELET_CLIENT, (SYSTEM_MASTERS,), client=True))


def admin(ca: CertificateAuthority) -> Path:
    """A user who may do everything, by group: no binding can lock it out."""
    return ca.ensure("admin", Request(ADMIN, (SYSTEM_MASTERS,), client=True))


def user(ca: CertificateAuthority, name: str, groups: tuple[str, ...] = ()) -> KeyPair:
    """Any client."""
    return ca.issue(Request(name, groups, client=True))


def node(ca: CertificateAuthority, name: str) -> KeyPair:
    """A node's client certificate, for a cluster that hands them out itself instead of by bootstrap token."""
    return user(ca, f"system:node:{name}", (NODES_GROUP,))
