"""Certificate signing requests: what the signers that this cluster has require of one, and who gets what unasked.

Source: Kubernetes, "Certificates and Certificate Signing Requests" (Kubernetes signers).
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from hypervisor.master.auth.authorizer import Authorizer
from hypervisor.master.auth.ca import LIFETIME, CertificateAuthority, Request, names_of
from hypervisor.master.auth.user import NODES_GROUP, SYSTEM_MASTERS, Attributes, User

SERVING = "kubernetes.io/kubelet-serving"
KUBELET_CLIENT = "kubernetes.io/kube-apiserver-client-kubelet"
CLIENT = "kubernetes.io/kube-apiserver-client"
SIGNERS = (SERVING, KUBELET_CLIENT, CLIENT)
GROUP = "certificates.k8s.io"
NODE_PREFIX = "system:node:"
SHORTEST = 600  # seconds of spec.expirationSeconds
_CLIENT_USAGES = frozenset(("digital signature", "client auth"))
_SERVER_USAGES = frozenset(("digital signature", "server auth"))
_OPTIONAL = frozenset(("key encipherment",))
_WEAKEST_RSA = 2048

Object = Mapping[str, Any]


class BadRequestFile(Exception):
    """``spec.request`` is no signing request."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a ``CertificateSigningRequest`` asks for.

    :ivar user: who posted it, as the API server wrote down
    """

    signer: str
    user: User
    usages: frozenset[str]
    lifetime: dt.timedelta
    csr: x509.CertificateSigningRequest

    @property
    def common_name(self) -> str:
        return next(iter(_attributes(self.csr, NameOID.COMMON_NAME)), "")

    @property
    def organizations(self) -> tuple[str, ...]:
        return tuple(_attributes(self.csr, NameOID.ORGANIZATION_NAME))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(names_of(self.csr))

    @property
    def node(self) -> str:
        """The node that it is about; empty for none."""
        return self.common_name.removeprefix(NODE_PREFIX) if self.common_name.startswith(NODE_PREFIX) else ""


def _attributes(csr: x509.CertificateSigningRequest, oid: x509.ObjectIdentifier) -> Iterable[str]:
    return (str(a.value) for a in csr.subject.get_attributes_for_oid(oid))


def parse(obj: Object) -> Wanted:
    """:raises BadRequestFile: what is wrong with ``spec.request``"""
    spec = obj.get("spec") or {}
    seconds = spec.get("expirationSeconds")
    lifetime = LIFETIME if seconds is None else min(LIFETIME, dt.timedelta(seconds=int(seconds)))
    extra = {key: tuple(values) for key, values in (spec.get("extra") or {}).items()}
    user = User(spec.get("username") or "", tuple(spec.get("groups") or ()), spec.get("uid") or "", extra)
    request = _load(spec.get("request") or "")
    return Wanted(str(spec.get("signerName") or ""), user, frozenset(spec.get("usages") or ()), lifetime, request)


def _load(encoded: str) -> x509.CertificateSigningRequest:
    try:
        csr = x509.load_pem_x509_csr(base64.b64decode(encoded, validate=True))
        signed, key = csr.is_signature_valid, csr.public_key()
        names_of(csr)
    except (ValueError, binascii.Error, TypeError) as error:
        raise BadRequestFile(f"PEM block type must be CERTIFICATE REQUEST, in base64 ({error})") from error
    except Exception as error:  # cryptography raises its own for keys and signatures that it does not know
        raise BadRequestFile(f"cannot be used ({error})") from error
    if not signed:
        raise BadRequestFile("its signature is not that of its key")
    strong = isinstance(key, rsa.RSAPublicKey) and key.key_size >= _WEAKEST_RSA
    if not (strong or isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey)):
        raise BadRequestFile(f"its key must be ECDSA, Ed25519 or RSA with at least {_WEAKEST_RSA} bits")
    return csr


def refusal(wanted: Wanted) -> str:
    """Why the signer does not sign it; empty when it does."""
    if wanted.signer == CLIENT:
        return _refusal_of_client(wanted)
    if wanted.organizations != (NODES_GROUP,):
        return f"subject organization is not {NODES_GROUP}"
    if not wanted.node:
        return f"subject common name does not begin with {NODE_PREFIX}"
    if wanted.signer == KUBELET_CLIENT:
        return "subject alternative names are not allowed" if wanted.names else _usage(wanted, _CLIENT_USAGES)
    if not wanted.names:
        return "DNS names or IP addresses are required"
    if any(":" in name and not _is_address(name) for name in wanted.names):
        return "only DNS names and IP addresses are allowed as subject alternative names"
    return _usage(wanted, _SERVER_USAGES)


def _refusal_of_client(wanted: Wanted) -> str:
    if SYSTEM_MASTERS in wanted.organizations:
        return f"the group {SYSTEM_MASTERS} is not given away by a request"
    return _usage(wanted, _CLIENT_USAGES) if wanted.common_name else "a common name is required"


def _is_address(name: str) -> bool:
    import ipaddress

    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _usage(wanted: Wanted, needed: frozenset[str]) -> str:
    if wanted.usages - _OPTIONAL == needed:
        return ""
    return f"usages must be {sorted(needed)}, with or without {sorted(_OPTIONAL)}"


def sign(ca: CertificateAuthority, wanted: Wanted) -> bytes:
    """The certificate (PEM). For what `refusal` has nothing against."""
    request = Request(
        wanted.common_name,
        wanted.organizations,
        wanted.names if wanted.signer == SERVING else (),
        server=wanted.signer == SERVING,
        client=wanted.signer != SERVING,
        lifetime=wanted.lifetime,
    )
    return ca.certify(request, wanted.csr.public_key())


def approved_unasked(wanted: Wanted, authorizer: Authorizer, nodes: Iterable[Object]) -> bool:
    """Whether nobody needs to look at it: a node, or somebody with a joining node's token, asks for what is its own.

    A serving certificate is for addresses that the node's Node object has and no other's has.
    """
    if refusal(wanted):
        return False
    if wanted.signer == KUBELET_CLIENT:
        own = wanted.user.name == wanted.common_name
        subresource = "selfnodeclient" if own else "nodeclient"
        asked = Attributes(wanted.user, "create", GROUP, "v1", "certificatesigningrequests", subresource)
        return authorizer.decide(asked).allowed
    if wanted.signer != SERVING or wanted.user.name != wanted.common_name or wanted.user.node_name != wanted.node:
        return False
    owners = {name: _owners(name, nodes) for name in wanted.names}
    return all(found == {wanted.node} for found in owners.values())


def _owners(address: str, nodes: Iterable[Object]) -> set[str]:
    found = set()
    for node in nodes:
        addresses = {a.get("address") for a in (node.get("status") or {}).get("addresses") or ()}
        name = node["metadata"]["name"]
        if address in addresses or address == name:
            found.add(name)
    return found
