"""Certificate signing requests: what is signed, what is approved unasked, and who may approve."""

from __future__ import annotations

import base64
import datetime as dt
import ipaddress
from typing import Any

import pytest
from authkit import Objects
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hypervisor.kube import meta
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, CSRS, NODES
from hypervisor.master.admission.plugin import AdmissionRequest
from hypervisor.master.auth import bootstrap, csr
from hypervisor.master.auth.ca import CertificateAuthority, names_of
from hypervisor.master.auth.certificates import CertificateController, CertificateRequests
from hypervisor.master.auth.rbac import Rbac, RbacOf
from hypervisor.master.auth.user import AUTHENTICATED, User
from hypervisor.master.kinds.kind import Kind

N1 = User("system:node:n1", ("system:nodes", AUTHENTICATED))
JOINING = User("system:bootstrap:abcdef", ("system:bootstrappers", AUTHENTICATED))
ANN = User("ann", (AUTHENTICATED,))
SERVER = ["digital signature", "server auth"]
CLIENT = ["digital signature", "key encipherment", "client auth"]


def pem(name: str = "system:node:n1", org: str = "system:nodes", names: tuple[str, ...] = (), key: Any = None) -> str:
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else []
    subject += [x509.NameAttribute(NameOID.ORGANIZATION_NAME, org)] if org else []
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject))
    if names:
        kinds = [x509.IPAddress(ipaddress.ip_address(n)) if n[0].isdigit() else general(n) for n in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(kinds), critical=False)
    made = builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return base64.b64encode(made.public_bytes(serialization.Encoding.PEM)).decode()


def general(name: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(name) if ":" in name else x509.DNSName(name)


def request(signer: str, usages: list[str], who: User = N1, **how: Any) -> dict[str, Any]:
    spec = {"signerName": signer, "usages": usages, "request": pem(**how)}
    return {"spec": spec | {"username": who.name, "groups": list(who.groups)}}


RULES = [
    (csr.SERVING, SERVER, {"names": ("127.0.0.2", "n1")}, ""),
    (csr.SERVING, [*SERVER, "key encipherment"], {"names": ("n1",)}, ""),
    (csr.SERVING, SERVER, {}, "DNS names or IP addresses are required"),
    (csr.SERVING, SERVER, {"names": ("spiffe://x",)}, "only DNS names"),
    (csr.SERVING, CLIENT, {"names": ("n1",)}, "usages"),
    (csr.SERVING, SERVER, {"names": ("n1",), "org": "system:masters"}, "organization"),
    (csr.SERVING, SERVER, {"names": ("n1",), "name": "kube-apiserver"}, "common name"),
    (csr.KUBELET_CLIENT, CLIENT, {}, ""),
    (csr.KUBELET_CLIENT, CLIENT, {"names": ("n1",)}, "not allowed"),
    (csr.KUBELET_CLIENT, [*CLIENT, "server auth"], {}, "usages"),
    (csr.CLIENT, CLIENT, {"name": "ann", "org": "dev"}, ""),
    (csr.CLIENT, CLIENT, {"name": "ann", "org": "system:masters"}, "given away"),
    (csr.CLIENT, CLIENT, {"name": "", "org": "dev"}, "common name"),
]


@pytest.mark.parametrize(("signer", "usages", "how", "why"), RULES)
def test_signers(signer: str, usages: list[str], how: dict[str, Any], why: str) -> None:
    said = csr.refusal(csr.parse(request(signer, usages, **how)))
    assert why in said if why else not said


@pytest.mark.parametrize("what", ["text", "base64", "key", "signature"])
def test_what_is_no_request(what: str) -> None:
    obj = request(csr.CLIENT, CLIENT, name="ann")
    if what == "key":
        obj = request(csr.CLIENT, CLIENT, key=rsa.generate_private_key(65537, 1024))
    elif what == "signature":
        der = x509.load_pem_x509_csr(base64.b64decode(obj["spec"]["request"])).public_bytes(serialization.Encoding.DER)
        text = base64.b64encode(der.replace(b"ann", b"bob")).decode()
        lines = f"-----BEGIN CERTIFICATE REQUEST-----\n{text}\n-----END CERTIFICATE REQUEST-----\n"
        obj["spec"]["request"] = base64.b64encode(lines.encode()).decode()
    else:
        obj["spec"]["request"] = "!" if what == "base64" else base64.b64encode(b"hello").decode()
    with pytest.raises(csr.BadRequestFile):
        csr.parse(obj)


@pytest.fixture
def cluster(objects: Objects) -> Objects:
    for role in bootstrap.cluster_roles():
        objects.put(CLUSTER_ROLES, role["metadata"]["name"], **role)
    for binding in bootstrap.cluster_role_bindings():
        objects.put(CLUSTER_ROLE_BINDINGS, binding["metadata"]["name"], **binding)
    for name, address in (("n1", "127.0.0.2"), ("n2", "127.0.0.3")):
        objects.put(NODES, name, status={"addresses": [{"type": "InternalIP", "address": address}]})
    return objects


UNASKED = [
    (csr.SERVING, SERVER, N1, {"names": ("127.0.0.2", "n1")}, True),
    (csr.SERVING, SERVER, N1, {"names": ("127.0.0.3",)}, False),
    (csr.SERVING, SERVER, N1, {"names": ("127.0.0.2", "n2")}, False),
    (csr.SERVING, SERVER, N1, {"names": ("192.0.2.9",)}, False),
    (csr.SERVING, SERVER, N1, {"names": ("127.0.0.3",), "name": "system:node:n2"}, False),
    (csr.SERVING, SERVER, ANN, {"names": ("127.0.0.2",)}, False),
    (csr.KUBELET_CLIENT, CLIENT, JOINING, {}, True),
    (csr.KUBELET_CLIENT, CLIENT, N1, {}, True),
    (csr.KUBELET_CLIENT, CLIENT, N1, {"name": "system:node:n2"}, False),
    (csr.KUBELET_CLIENT, CLIENT, ANN, {}, False),
    (csr.CLIENT, CLIENT, N1, {"name": "ann", "org": ""}, False),
]


@pytest.mark.parametrize(("signer", "usages", "who", "how", "approved"), UNASKED)
def test_approved_unasked(
    cluster: Objects, signer: str, usages: list[str], who: User, how: dict[str, Any], approved: bool
) -> None:
    wanted = csr.parse(request(signer, usages, who, **how))
    assert csr.approved_unasked(wanted, Rbac(RbacOf(cluster)), list(cluster.list(NODES))) is approved


class Client:
    """The part of an `ApiClient` that the controller needs, over the same objects."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self.subresources: list[str] = []

    async def update(self, resource: Any, obj: dict[str, Any], *, subresource: str = "") -> dict[str, Any]:
        self.subresources.append(subresource)
        return self.objects.put(resource, obj["metadata"]["name"], **obj)

    async def delete(self, resource: Any, name: str, **_: Any) -> None:
        self.objects.remove(resource, name)


async def test_a_joining_node_gets_its_certificate(cluster: Objects, ca: CertificateAuthority) -> None:
    posted = request(csr.SERVING, SERVER, names=("127.0.0.2", "n1"))
    cluster.put(CSRS, "c", metadata={"creationTimestamp": meta.now()}, **posted)
    client = Client(cluster)
    controller = CertificateController(client, ca, Rbac(RbacOf(cluster)), cluster)  # type: ignore[arg-type]
    await controller.sync(("", "c"))
    await controller.sync(("", "c"))
    await controller.sync(("", "c"))
    assert client.subresources == ["approval", "status"]
    status = cluster.get(CSRS, "c")["status"]  # type: ignore[index]
    certificate = x509.load_pem_x509_certificate(base64.b64decode(status["certificate"]))
    certificate.verify_directly_issued_by(ca.certificate)
    assert list(names_of(certificate)) == ["127.0.0.2", "n1"]
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.SERVER_AUTH]


async def test_a_node_whose_addresses_are_not_known_yet_waits(cluster: Objects, ca: CertificateAuthority) -> None:
    cluster.put(NODES, "n1", status={})
    posted = request(csr.SERVING, SERVER, names=("127.0.0.2",))
    cluster.put(CSRS, "c", metadata={"creationTimestamp": meta.now()}, **posted)
    client = Client(cluster)
    controller = CertificateController(client, ca, Rbac(RbacOf(cluster)), cluster)  # type: ignore[arg-type]
    again = await controller.sync(("", "c"))
    assert again is not None
    assert again < 5
    assert not client.subresources


@pytest.mark.parametrize(("decision", "age", "kept"), [("", 23.9, True), ("", 24.1, False), ("Denied", 1.1, False)])
async def test_old_requests_go(
    cluster: Objects, ca: CertificateAuthority, decision: str, age: float, kept: bool
) -> None:
    made = (dt.datetime.now(dt.UTC) - dt.timedelta(hours=age)).strftime("%Y-%m-%dT%H:%M:%SZ")
    status = {"conditions": [{"type": decision, "status": "True"}]} if decision else {}
    posted = request(csr.CLIENT, CLIENT, ANN, name="ann", org="")
    cluster.put(CSRS, "c", metadata={"creationTimestamp": made}, status=status, **posted)
    await CertificateController(Client(cluster), ca, Rbac(RbacOf(cluster)), cluster).sync(("", "c"))  # type: ignore[arg-type]
    assert (cluster.get(CSRS, "c") is not None) is kept


async def test_approved_but_not_signable_is_said(cluster: Objects, ca: CertificateAuthority) -> None:
    posted = request(csr.SERVING, CLIENT, ANN, names=("n1",))
    status = {"conditions": [{"type": "Approved", "status": "True"}]}
    cluster.put(CSRS, "c", metadata={"creationTimestamp": meta.now()}, status=status, **posted)
    await CertificateController(Client(cluster), ca, Rbac(RbacOf(cluster)), cluster).sync(("", "c"))  # type: ignore[arg-type]
    conditions = cluster.get(CSRS, "c")["status"]["conditions"]  # type: ignore[index]
    assert [c["type"] for c in conditions] == ["Approved", "Failed"]
    assert "usages" in conditions[1]["message"]


def admission(who: User, obj: dict[str, Any], old: dict[str, Any] | None = None, sub: str = "") -> AdmissionRequest:
    return AdmissionRequest("UPDATE" if old else "CREATE", Kind(CSRS, "", ""), who, "", "c", obj, old, sub)


async def test_who_posted_is_what_the_server_knows(cluster: Objects) -> None:
    plugin = CertificateRequests(Rbac(RbacOf(cluster)))
    posted = request(csr.SERVING, SERVER, N1, names=("n1",)) | {"status": {"certificate": "x"}}
    asked = admission(ANN, posted)
    await plugin.admit(asked)
    assert (asked.object["spec"]["username"], asked.object["spec"]["groups"]) == ("ann", [AUTHENTICATED])
    assert "status" not in asked.object


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"request": "x"}, "spec.request"),
        ({"signerName": "mine"}, "spec.signerName"),
        ({"usages": []}, "spec.usages"),
        ({"expirationSeconds": 599}, "spec.expirationSeconds"),
        ({"request": pem("root", "system:masters")}, "system:masters"),
    ],
)
async def test_bad_requests_are_refused(cluster: Objects, change: dict[str, Any], field: str) -> None:
    posted = request(csr.CLIENT, CLIENT, name="ann", org="dev")
    posted["spec"] |= change
    with pytest.raises(ApiError, match=field) as caught:
        await CertificateRequests(Rbac(RbacOf(cluster))).admit(admission(ANN, posted))
    assert caught.value.code == 422


async def test_only_approvers_approve(cluster: Objects) -> None:
    plugin = CertificateRequests(Rbac(RbacOf(cluster)))
    old = request(csr.CLIENT, CLIENT, name="ann", org="dev")
    new = {**old, "status": {"conditions": [{"type": "Approved", "status": "True"}]}}
    with pytest.raises(ApiError, match="not permitted to approve"):
        await plugin.admit(admission(ANN, dict(new), old, "approval"))
    with pytest.raises(ApiError, match="not permitted to sign"):
        await plugin.admit(admission(ANN, {**new, "status": {"certificate": "x"}}, old, "status"))
    name = "system:certificates.k8s.io:kube-apiserver-client-approver"
    ref = {"kind": "ClusterRole", "name": name}
    cluster.put(CLUSTER_ROLE_BINDINGS, "ann", roleRef=ref, subjects=[{"kind": "User", "name": "ann"}])
    changed = admission(ANN, {**new, "spec": {"signerName": "x/y"}}, old, "approval")
    await plugin.admit(changed)
    assert changed.object["spec"] == old["spec"]
