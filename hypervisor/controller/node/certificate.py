"""The certificate that this node's server shows: asked of the cluster by a CertificateSigningRequest, and renewed.

Theory of operation
-------------------
::

    stored certificate good for this name and address? --yes--> use it until 70-90 % of its time --+
        | no                                                                                       |
        v                                                                                          |
    new key --> POST CSR (signer kubernetes.io/kubelet-serving) --> wait until issued --> store <--+

The key never leaves the machine: key and certificate are one file, mode 0600. Until the first certificate is issued the
node's server does not listen (upstream's clusters want an administrator to approve it); pods run meanwhile.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import random
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hypervisor.errors import HvError
from hypervisor.kube.client import ApiClient
from hypervisor.kube.kubeconfig import load_pair, write_private
from hypervisor.kube.meta import get
from hypervisor.kube.resources import CSRS

SIGNER = "kubernetes.io/kubelet-serving"
ASK_S = 1.0
PATIENCE_S = 900.0
"""A request that was neither issued nor refused for so long is made anew."""
RETRY_S = 15.0


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate (chain) and its key, PEM."""

    certificate: bytes
    key: bytes

    def expires_in(self) -> tuple[float, float]:
        """Seconds left, and seconds that it is valid in all."""
        found = x509.load_pem_x509_certificate(self.certificate)
        left = found.not_valid_after_utc - datetime.now(UTC)
        return left.total_seconds(), (found.not_valid_after_utc - found.not_valid_before_utc).total_seconds()

    def names(self) -> set[str]:
        """Names and addresses that it is for."""
        found = x509.load_pem_x509_certificate(self.certificate)
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        addresses = map(str, names.get_values_for_type(x509.IPAddress))
        return {*names.get_values_for_type(x509.DNSName), *addresses}


class ServingCertificate:
    """Keeps `context` loaded with a certificate of this node. `run` is to be run as a task."""

    def __init__(self, client: ApiClient, node: str, address: str, path: Path) -> None:
        self._client = client
        self._node = node
        self._address = address
        self._path = path
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._ready = asyncio.Event()
        self._log = structlog.get_logger()

    async def wait_ready(self) -> None:
        """Waits until `context` has a certificate."""
        await self._ready.wait()

    async def run(self) -> None:
        """Gets, uses and renews certificates, for ever."""
        pair = await asyncio.to_thread(self._stored)
        while True:
            if pair is not None:
                load_pair(self.context, pair.certificate, pair.key)
                self._ready.set()
                left, whole = pair.expires_in()
                await asyncio.sleep(max(0.0, left - whole * random.uniform(0.1, 0.3)))
            pair = await self._new()

    def _stored(self) -> Pair | None:
        """What an earlier daemon got, where it still fits."""
        try:
            data = self._path.read_bytes()
            marker = data.index(b"-----BEGIN CERTIFICATE-----")
            pair = Pair(data[marker:], data[:marker])
            left, whole = pair.expires_in()
            fits = {self._node, self._address} <= pair.names()
            load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), pair.certificate, pair.key)
        except (OSError, ValueError, x509.ExtensionNotFound):
            return None
        return pair if fits and left > whole * 0.1 else None

    async def _new(self) -> Pair:
        while True:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    return await self._request()
            except (HvError, TimeoutError, OSError, ValueError) as e:
                self._log.warning("no serving certificate yet", error=str(e) or "not approved in time")
                await asyncio.sleep(RETRY_S)

    async def _request(self) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        spec = {
            "request": base64.b64encode(signing_request(key, self._node, self._address)).decode(),
            "signerName": SIGNER,
            "usages": ["digital signature", "server auth"],
        }
        body = {"apiVersion": CSRS.api_version, "kind": CSRS.kind, "metadata": {"generateName": "csr-"}, "spec": spec}
        created = await self._client.create(CSRS, body)
        certificate = await self._wait_issued(str(get(created, "metadata", "name")))
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        pair = Pair(certificate, key.private_bytes(*form))
        await asyncio.to_thread(write_private, self._path, pair.key + pair.certificate)
        self._log.info("serving certificate issued", expires_in_s=round(pair.expires_in()[0]))
        return pair

    async def _wait_issued(self, name: str) -> bytes:
        while True:
            request = await self._client.get(CSRS, name)
            conditions = {c.get("type"): c for c in get(request, "status", "conditions", default=())}
            for refused in ("Denied", "Failed"):
                if refused in conditions:
                    raise HvError(f"CSR {name} was {refused.lower()}: {conditions[refused].get('message', '')}")
            if certificate := get(request, "status", "certificate"):
                return base64.b64decode(certificate)
            await asyncio.sleep(ASK_S)


def signing_request(key: ec.EllipticCurvePrivateKey, node: str, address: str) -> bytes:
    """A PEM certificate request for a node's server, as the kubelet-serving signer wants it."""
    names = [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:nodes"),
        x509.NameAttribute(NameOID.COMMON_NAME, f"system:node:{node}"),
    ]
    alternatives = x509.SubjectAlternativeName([x509.DNSName(node), x509.IPAddress(ipaddress.ip_address(address))])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    signed = builder.add_extension(alternatives, critical=False).sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)
