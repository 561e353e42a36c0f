"""Certificates of a node, with lifetimes of seconds: asked for, used, renewed before they end."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from node_bench import Cluster

from hypervisor.controller.node import certificate as serving
from hypervisor.controller.node import client_certificate
from hypervisor.controller.node.certificate import Pair, ServingCertificate
from hypervisor.controller.node.client_certificate import ClientCertificate
from hypervisor.kube import joining, kubeconfig
from hypervisor.kube.http import HttpApiClient
from hypervisor.kube.kubeconfig import KubeConfig

CSRS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
LIFETIME = timedelta(seconds=3)
Refuse = Callable[[dict[str, Any]], bool]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "ASK_S", 0.02)
    monkeypatch.setattr(joining, "ASK_S", 0.02)
    for module in (serving, client_certificate):
        monkeypatch.setattr(module, "RETRY_S", 0.05)


class Signer:
    """Signs what nodes ask for, for `LIFETIME`; the first `refuse` requests are denied."""

    def __init__(self, cluster: Cluster, refuse: int = 0) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.server = cluster.server
        self.refuse = refuse
        self.signed: list[dict[str, Any]] = []

    def sign(self, name: x509.Name, key: Any, extensions: Any = ()) -> bytes:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(subject_name=name, public_key=key, serial_number=x509.random_serial_number())
        builder = builder.issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")]))
        builder = builder.not_valid_before(now - timedelta(seconds=1)).not_valid_after(now + LIFETIME)
        for extension in extensions:
            builder = builder.add_extension(extension.value, extension.critical)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    async def run(self) -> None:
        while True:
            for (collection, _, _), obj in list(self.server.objects.items()):
                if collection == CSRS and not obj.get("status"):
                    self.server.put(CSRS, obj | {"status": self._answer(obj)})
            await asyncio.sleep(0.01)

    def _answer(self, obj: dict[str, Any]) -> dict[str, Any]:
        if self.refuse:
            self.refuse -= 1
            return {"conditions": [{"type": "Denied", "status": "True", "message": "not today"}]}
        request = x509.load_pem_x509_csr(base64.b64decode(obj["spec"]["request"]))
        pem = self.sign(request.subject, request.public_key(), request.extensions)
        self.signed.append(obj["spec"] | {"subject": request.subject.rfc4514_string()})
        return {"certificate": base64.b64encode(pem).decode()}


@asynccontextmanager
async def running(*parts: Any) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(part.run()) for part in parts]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(met: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not met():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_the_serving_certificate_is_renewed_again_and_again(cluster: Cluster, tmp_path: Path) -> None:
    signer, path = Signer(cluster, refuse=1), tmp_path / "node-serving.pem"
    async with HttpApiClient(KubeConfig(cluster.url)) as client:
        certificate = ServingCertificate(client, "n1", "127.0.0.9", path)
        async with running(signer, certificate):
            await asyncio.wait_for(certificate.wait_ready(), 10)
            first = path.read_bytes()
            await until(lambda: len(signer.signed) >= 3)
            await until(lambda: path.read_bytes() != first)
        assert {s["signerName"] for s in signer.signed} == {"kubernetes.io/kubelet-serving"}
        pair = certificate._stored()
        assert pair is not None and {"n1", "127.0.0.9"} <= pair.names() and pair.expires_in()[0] > 0
        assert path.stat().st_mode & 0o777 == 0o600
        another = ServingCertificate(client, "n1", "127.0.0.10", path)
        assert another._stored() is None  # of another address


def written(path: Path, signer: Signer, name: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:nodes")]
    pem = signer.sign(x509.Name([*subject, x509.NameAttribute(NameOID.COMMON_NAME, name)]), key.public_key())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    made = kubeconfig.render(server="https://a:1", ca=pem, user="n", certificate=pem, key=key.private_bytes(*form))
    kubeconfig.write(path, made | {"preferences": {"kept": True}})


async def test_the_client_certificate_is_renewed_in_the_kubeconfig(cluster: Cluster, tmp_path: Path) -> None:
    signer, path = Signer(cluster, refuse=1), tmp_path / "kubeconfig"
    written(path, signer, "system:node:n1")
    old = kubeconfig.load(path)
    client = HttpApiClient(KubeConfig(cluster.url))
    async with client, running(signer, ClientCertificate(client, "n1", path)):
        await until(lambda: len(signer.signed) >= 2)
        await until(lambda: kubeconfig.load(path).certificate != old.certificate)
    new = kubeconfig.load(path)
    assert new.server == old.server and "kept: true" in path.read_text() and path.stat().st_mode & 0o777 == 0o600
    assert isinstance(new.tls(), ssl.SSLContext)  # the key is the certificate's
    assert Pair(new.certificate.read(), new.key.read()).expires_in()[0] > 0
    assert signer.signed[0]["subject"] == "CN=system:node:n1,O=system:nodes"
    assert signer.signed[0]["signerName"] == "kubernetes.io/kube-apiserver-client-kubelet"


async def test_somebody_elses_certificate_is_left_alone(cluster: Cluster, tmp_path: Path) -> None:
    signer, path = Signer(cluster), tmp_path / "kubeconfig"
    written(path, signer, "admin")
    async with HttpApiClient(KubeConfig(cluster.url)) as client:
        assert ClientCertificate(client, "n1", path)._due() == client_certificate.LOOK_S
