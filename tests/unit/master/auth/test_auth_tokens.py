"""Service-account tokens and who a request is."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jwt
import pytest
from authkit import Clock, Objects
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from hypervisor.errors import InvalidInput
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import NODES, PODS, SECRETS, SERVICE_ACCOUNTS
from hypervisor.master.auth import parties
from hypervisor.master.auth.authn import Authenticator, static_tokens
from hypervisor.master.auth.ca import CertificateAuthority
from hypervisor.master.auth.tokens import ISSUER, BadToken, ServiceAccountTokens, SigningKey
from hypervisor.master.auth.user import AUTHENTICATED, User


@pytest.fixture
def account(objects: Objects) -> Objects:
    objects.put(SERVICE_ACCOUNTS, "builder", "ci")
    objects.put(NODES, "n1")
    objects.put(PODS, "web", "ci", spec={"serviceAccountName": "builder", "nodeName": "n1"})
    return objects


@pytest.fixture
def authn(objects: Objects, tokens: ServiceAccountTokens, clock: Clock) -> Authenticator:
    return Authenticator(objects, tokens, static={"s3cret": User("ann", ("dev", AUTHENTICATED))}, now=clock)


def ask(tokens: ServiceAccountTokens, **spec: Any) -> str:
    return str(tokens.request("ci", "builder", {"spec": spec})["status"]["token"])


POD = {"kind": "Pod", "apiVersion": "v1", "name": "web"}


def test_a_token_of_a_pod_says_who_it_is(account: Objects, tokens: ServiceAccountTokens, authn: Authenticator) -> None:
    user = authn.authenticate(None, f"Bearer {ask(tokens, boundObjectRef=POD)}")
    assert (user.name, user.uid) == ("system:serviceaccount:ci:builder", "uid-builder")
    assert user.groups == ("system:serviceaccounts", "system:serviceaccounts:ci", AUTHENTICATED)
    extra = {k.rpartition("/")[2]: v[0] for k, v in user.extra.items()}
    assert extra.pop("credential-id").startswith("JTI=")
    assert extra == {"pod-name": "web", "pod-uid": "uid-web", "node-name": "n1", "node-uid": "uid-n1"}


def test_the_answer_is_a_token_request(account: Objects, tokens: ServiceAccountTokens) -> None:
    answer = tokens.request("ci", "builder", {"spec": {"expirationSeconds": 600}})
    assert answer["spec"] == {"expirationSeconds": 600, "audiences": [ISSUER]}
    assert answer["status"]["expirationTimestamp"] == "2030-01-01T00:10:00Z"


@pytest.mark.parametrize(
    ("spec", "reason", "text"),
    [
        ({"expirationSeconds": 599}, "Invalid", "less than 10 minutes"),
        ({"expirationSeconds": "x"}, "Invalid", "expirationSeconds"),
        ({"expirationSeconds": 1 << 33}, "Invalid", "larger than"),
        ({"boundObjectRef": {"kind": "ConfigMap", "name": "x"}}, "Invalid", "boundObjectRef"),
        ({"boundObjectRef": {**POD, "name": "gone"}}, "NotFound", '"gone" not found'),
        ({"boundObjectRef": {**POD, "uid": "other"}}, "Conflict", "does not match"),
        ({"boundObjectRef": {**POD, "name": "alien"}}, "Invalid", "another service account"),
    ],
)
def test_bad_requests(
    account: Objects, tokens: ServiceAccountTokens, spec: dict[str, Any], reason: str, text: str
) -> None:
    account.put(PODS, "alien", "ci", spec={"serviceAccountName": "default"})
    with pytest.raises(ApiError, match=text) as caught:
        ask(tokens, **spec)
    assert caught.value.reason == reason


def test_no_token_of_an_account_that_is_not_there(tokens: ServiceAccountTokens) -> None:
    with pytest.raises(ApiError, match='serviceaccounts "builder" not found'):
        ask(tokens)


def end_by_time(objects: Objects, clock: Clock) -> None:
    clock.forward(seconds=3601)


def pod_gone(objects: Objects, clock: Clock) -> None:
    objects.remove(PODS, "web", "ci")


def pod_made_again(objects: Objects, clock: Clock) -> None:
    objects.put(PODS, "web", "ci", metadata={"uid": "another"})


def pod_long_deleted(objects: Objects, clock: Clock) -> None:
    objects.put(PODS, "web", "ci", metadata={"deletionTimestamp": "2029-12-31T23:58:59Z"})


def account_gone(objects: Objects, clock: Clock) -> None:
    objects.remove(SERVICE_ACCOUNTS, "builder", "ci")


@pytest.mark.parametrize("end", [end_by_time, pod_gone, pod_made_again, pod_long_deleted, account_gone])
def test_what_ends_a_token(
    account: Objects, tokens: ServiceAccountTokens, authn: Authenticator, clock: Clock, end: Any
) -> None:
    header = f"Bearer {ask(tokens, boundObjectRef=POD)}"
    authn.authenticate(None, header)
    end(account, clock)
    with pytest.raises(ApiError, match="Unauthorized"):
        authn.authenticate(None, header)


def test_a_pod_that_is_ending_keeps_its_token(account: Objects, tokens: ServiceAccountTokens) -> None:
    token = ask(tokens, boundObjectRef=POD)
    account.put(PODS, "web", "ci", metadata={"deletionTimestamp": "2029-12-31T23:59:30Z"})
    tokens.verify(token)


def test_audiences(account: Objects, tokens: ServiceAccountTokens) -> None:
    token = ask(tokens, audiences=["vault", "db"])
    assert tokens.verify(token, ["db", "x"]).audiences == ("db",)
    with pytest.raises(BadToken):
        tokens.verify(token)


def forge(tokens: ServiceAccountTokens, how: str) -> str:
    good = ask(tokens)
    claims = jwt.decode(good, options={"verify_signature": False})
    header, payload, signature = good.split(".")
    if how == "key":
        return jwt.encode(claims, ec.generate_private_key(ec.SECP256R1()), "ES256")
    if how == "none":
        return jwt.encode(claims, None, "none")
    if how == "hmac":
        return jwt.encode(claims, "x" * 32, "HS256")
    if how == "payload":
        changed = base64.urlsafe_b64decode(payload + "==").replace(b'"builder"', b'"builddr"')
        return f"{header}.{base64.urlsafe_b64encode(changed).decode().rstrip('=')}.{signature}"
    return f"{header}.{payload}.{signature[:-4]}AAAA"


@pytest.mark.parametrize("how", ["key", "none", "hmac", "payload", "signature"])
def test_forgeries(account: Objects, tokens: ServiceAccountTokens, how: str) -> None:
    with pytest.raises(BadToken, match="not a token of this cluster"):
        tokens.verify(forge(tokens, how))


def test_the_published_key_verifies(account: Objects, tokens: ServiceAccountTokens) -> None:
    keys = jwt.PyJWKSet.from_dict(tokens.jwks())
    token = ask(tokens)
    key = keys[jwt.get_unverified_header(token)["kid"]]
    jwt.decode(token, key, algorithms=["ES256"], audience=ISSUER, options={"verify_iat": False, "verify_nbf": False})
    assert tokens.openid_configuration("https://h:1")["jwks_uri"] == "https://h:1/openid/v1/jwks"


def test_the_signing_key_stays(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "sa.key"
    assert SigningKey.open(path).id == SigningKey.open(path).id
    path.write_text("nonsense")
    with pytest.raises(InvalidInput, match=r"sa\.key"):
        SigningKey.open(path)


def bootstrap(objects: Objects, **data: str) -> None:
    fields = {
        "token-id": "abcdef",
        "token-secret": "0123456789abcdef",
        "usage-bootstrap-authentication": "true",
        "auth-extra-groups": "system:bootstrappers:podvisor,system:masters",
    } | data
    encoded = {k: base64.b64encode(v.encode()).decode() for k, v in fields.items()}
    objects.put(SECRETS, "bootstrap-token-abcdef", "kube-system", type="bootstrap.kubernetes.io/token", data=encoded)


def test_bootstrap_tokens(objects: Objects, authn: Authenticator) -> None:
    bootstrap(objects, expiration="2030-01-01T00:00:01Z")
    user = authn.authenticate(None, "Bearer abcdef.0123456789abcdef")
    assert user.name == "system:bootstrap:abcdef"
    assert user.groups == ("system:bootstrappers", "system:bootstrappers:podvisor", AUTHENTICATED)


@pytest.mark.parametrize(
    "data",
    [
        {"expiration": "2030-01-01T00:00:00Z"},
        {"expiration": "soon"},
        {"usage-bootstrap-authentication": "false"},
        {"token-secret": "0123456789abcdeX"},
        {"token-id": "abcdeX"},
    ],
)
def test_bootstrap_tokens_that_do_not_work(objects: Objects, authn: Authenticator, data: dict[str, str]) -> None:
    bootstrap(objects, **data)
    with pytest.raises(ApiError, match="Unauthorized"):
        authn.authenticate(None, "Bearer abcdef.0123456789abcdef")


@pytest.mark.parametrize("header", ["Bearer nope", "Bearer", "Basic czM6", "Bearer a.b.c", "Bearer " + "x" * 20000])
def test_bad_headers_are_refused_everywhere(authn: Authenticator, header: str) -> None:
    for path in ("/healthz", "/api/v1/pods"):
        with pytest.raises(ApiError) as caught:
            authn.authenticate(None, header, path)
        assert caught.value.code == 401


def test_static_tokens(authn: Authenticator, tmp_path: Path) -> None:
    assert authn.authenticate(None, "bearer s3cret").name == "ann"
    path = tmp_path / "tokens"
    path.write_text('t1,ann,u1,"a,b"\n# no\nt2,bob,u2\n')
    path.chmod(0o600)
    assert static_tokens(path) == {
        "t1": User("ann", ("a", "b", AUTHENTICATED), "u1"),
        "t2": User("bob", (AUTHENTICATED,), "u2"),
    }
    path.chmod(0o644)
    with pytest.raises(InvalidInput, match="chmod 600"):
        static_tokens(path)


@pytest.mark.parametrize(
    ("path", "let_in"),
    [
        ("/healthz", True),
        ("/readyz/ping", True),
        ("/version", True),
        ("/versions", False),
        ("/api", False),
        ("", False),
    ],
)
def test_without_credentials(authn: Authenticator, path: str, let_in: bool) -> None:
    if let_in:
        assert authn.authenticate(None, "", path).name == "system:anonymous"
    else:
        with pytest.raises(ApiError, match="Unauthorized"):
            authn.authenticate(None, "", path)


def der(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def test_certificates(ca: CertificateAuthority, authn: Authenticator, clock: Clock) -> None:
    certificate = der(parties.node(ca, "n1").certificate)
    user = authn.authenticate(certificate, "Bearer nonsense that is not looked at")
    assert user == User("system:node:n1", ("system:nodes", AUTHENTICATED))
    assert user.node_name == "n1"
    clock.forward(days=365)
    with pytest.raises(ApiError, match="expired"):
        authn.authenticate(certificate, "")


def test_a_certificate_without_a_name_is_nobody(ca: CertificateAuthority, authn: Authenticator) -> None:
    with pytest.raises(ApiError, match="Unauthorized"):
        authn.authenticate(b"no certificate", "")


def test_a_certificate_cannot_make_itself_authenticated_twice(ca: CertificateAuthority, authn: Authenticator) -> None:
    certificate = der(parties.user(ca, "eve", (AUTHENTICATED, "x", "x")).certificate)
    assert authn.authenticate(certificate, "").groups == ("x", AUTHENTICATED)


def test_the_caches_are_bounded(account: Objects, tokens: ServiceAccountTokens) -> None:
    from hypervisor.master.auth.bounded import Bounded

    cache: Bounded[int, int] = Bounded(2)
    for n in (1, 2):
        cache.put(n, n)
    assert cache.get(1) == 1
    cache.put(3, 3)
    assert [cache.get(n) for n in (1, 2, 3)] == [1, None, 3]
    assert len(cache) == 2
