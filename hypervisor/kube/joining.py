"""How a machine that has a joining token, or a node whose certificate ends soon, gets a node's client certificate.

Source: Kubernetes, "TLS bootstrapping" and "Certificates and Certificate Signing Requests".

Theory of operation
-------------------
::

    new key --> POST CSR (signer kubernetes.io/kube-apiserver-client-kubelet) --> approved and signed --> certificate
                                                      |--> Denied or Failed: an error that says why

The key never leaves the machine. A request that is interrupted costs nothing: the cluster removes what nobody fetched.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hypervisor.errors import HvError
from hypervisor.kube.client import ApiClient
from hypervisor.kube.meta import get
from hypervisor.kube.resources import CSRS

SIGNER = "kubernetes.io/kube-apiserver-client-kubelet"
ASK_S = 0.2
"""Seconds between two looks."""


async def node_certificate(client: ApiClient, node: str) -> tuple[bytes, bytes]:
    """A client certificate as ``system:node:<node>`` and its key, PEM. Waits until it is signed: limit it in time.

    :param client: of a joining machine, or of the node itself
    :raises HvError: the request was denied, or failed
    """
    key = ec.generate_private_key(ec.SECP256R1())
    spec = {
        "request": base64.b64encode(_request(key, node)).decode(),
        "signerName": SIGNER,
        "usages": ["digital signature", "client auth"],
    }
    metadata = {"generateName": f"node-csr-{node}-"[:58]}
    made = await client.create(
        CSRS, {"apiVersion": CSRS.api_version, "kind": CSRS.kind} | {"metadata": metadata, "spec": spec}
    )
    certificate = await _issued(client, str(get(made, "metadata", "name")))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate, key.private_bytes(*form)


async def _issued(client: ApiClient, name: str) -> bytes:
    while True:
        request = await client.get(CSRS, name)
        conditions: dict[str, Any] = {c.get("type"): c for c in get(request, "status", "conditions", default=())}
        for refused in ("Denied", "Failed"):
            if refused in conditions:
                raise HvError(f"the request {name} was {refused.lower()}: {conditions[refused].get('message', '')}")
        if certificate := get(request, "status", "certificate"):
            return base64.b64decode(certificate)
        await asyncio.sleep(ASK_S)


def _request(key: ec.EllipticCurvePrivateKey, node: str) -> bytes:
    subject = [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:nodes"),
        x509.NameAttribute(NameOID.COMMON_NAME, f"system:node:{node}"),
    ]
    signed = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject)).sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)
