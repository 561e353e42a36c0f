"""Service-account tokens: JSON Web Tokens (ES256) that expire, name their audience, and die with the pod, secret or
node that they are bound to.

Claims, reserved names and rules are upstream's. Source: Kubernetes, "Managing Service Accounts", "Bound service account
tokens"; RFC 7519; KEP-1205, KEP-2799 and KEP-4193.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hypervisor.errors import InvalidInput
from hypervisor.kube.errors import ApiError, Cause, invalid, not_found
from hypervisor.kube.resources import NODES, PODS, SECRETS, SERVICE_ACCOUNTS, Resource
from hypervisor.master.auth import keyfiles
from hypervisor.master.auth.bounded import Bounded
from hypervisor.master.auth.ca import Clock, utc_now
from hypervisor.master.auth.user import AUTHENTICATED, User
from hypervisor.master.auth.views import ObjectView

ALGORITHM = "ES256"
ISSUER = "https://kubernetes.default.svc.cluster.local"
SHORTEST = 600  # seconds
LONGEST = 1 << 32
USUAL = 3600
DELETION_LEEWAY = 60.0  # seconds after an object's deletionTimestamp that its tokens still work, as upstream has it
CACHED_TOKENS = 4096
PRIVATE_CLAIM = "kubernetes.io"
BINDABLE: Mapping[tuple[str, str], Resource] = {("v1", "Pod"): PODS, ("v1", "Secret"): SECRETS, ("v1", "Node"): NODES}
CLAIM_OF = {"Pod": "pod", "Secret": "secret", "Node": "node"}
JWKS_PATH = "/openid/v1/jwks"
DISCOVERY_PATH = "/.well-known/openid-configuration"

Object = Mapping[str, Any]


class BadToken(Exception):
    """Not a token of ours, or no longer one; the message is for the log, not for who sent it."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Who a token is, and which of the audiences asked for it is meant for."""

    user: User
    audiences: tuple[str, ...]


class SigningKey:
    """The key that signs tokens, in a file of its own."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self.private = key
        self.public = key.public_key()
        spki = self.public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.id = _base64url(hashlib.sha256(spki).digest())

    @classmethod
    def open(cls, path: Path) -> SigningKey:
        """The key of a file, which is made (0600) when it is not there.

        :raises InvalidInput: it is damaged
        """
        keyfiles.private_directory(path.parent)
        content = path.read_bytes() if path.exists() else keyfiles.create(path, _new_key())
        try:
            key = serialization.load_pem_private_key(content, None)
        except (ValueError, TypeError) as error:
            raise InvalidInput(f"holds no private key ({error}); restore it", where=str(path)) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise InvalidInput("is no key on an elliptic curve; restore it", where=str(path))
        return cls(key)

    def jwks(self) -> dict[str, Any]:
        """The public key as a JSON Web Key Set (`JWKS_PATH`)."""
        numbers = self.public.public_numbers()
        coordinates = {"x": numbers.x, "y": numbers.y}
        encoded = {name: _base64url(value.to_bytes(32, "big")) for name, value in coordinates.items()}
        return {"keys": [{"use": "sig", "kty": "EC", "kid": self.id, "crv": "P-256", "alg": ALGORITHM, **encoded}]}


class ServiceAccountTokens:
    """Issues and verifies them. For one event loop; nothing here waits."""

    def __init__(
        self,
        key: SigningKey,
        view: ObjectView,
        *,
        issuer: str = ISSUER,
        audiences: Sequence[str] = (ISSUER,),
        now: Clock = utc_now,
    ) -> None:
        self._key = key
        self._view = view
        self._issuer = issuer
        self.audiences = tuple(audiences)
        self._now = now
        self._verified: Bounded[str, dict[str, Any]] = Bounded(CACHED_TOKENS)

    def openid_configuration(self, base_url: str) -> dict[str, Any]:
        """The discovery document (`DISCOVERY_PATH`)."""
        return {
            "issuer": self._issuer,
            "jwks_uri": f"{base_url}{JWKS_PATH}",
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": [ALGORITHM],
        }

    def jwks(self) -> dict[str, Any]:
        """See `SigningKey.jwks`."""
        return self._key.jwks()

    def request(self, namespace: str, name: str, review: Object) -> dict[str, Any]:
        """Answers a ``TokenRequest``: the object with its status filled in.

        :raises ApiError: NotFound (account or bound object), Conflict (another uid), Invalid
        """
        account = self._view.get(SERVICE_ACCOUNTS, name, namespace)
        if account is None:
            raise not_found("", SERVICE_ACCOUNTS.plural, name)
        spec = review.get("spec") or {}
        seconds = _lifetime(name, spec)
        bound = self._bound(spec.get("boundObjectRef") or {}, namespace, name)
        audiences = list(spec.get("audiences") or self.audiences)
        now = self._now()
        expires = now + dt.timedelta(seconds=seconds)
        token = self._sign(account, audiences, now, expires, bound)
        stamp = expires.strftime("%Y-%m-%dT%H:%M:%SZ")
        spec = {**spec, "audiences": audiences, "expirationSeconds": seconds}
        metadata = {**(review.get("metadata") or {}), "name": name, "namespace": namespace}
        return {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "metadata": metadata,
            "spec": spec,
            "status": {"token": token, "expirationTimestamp": stamp},
        }

    def _bound(self, ref: Object, namespace: str, account: str) -> dict[str, Any]:
        """Claims about the object that a token is bound to; a pod brings its node."""
        if not ref:
            return {}
        kind = str(ref.get("kind") or "")
        resource = BINDABLE.get((str(ref.get("apiVersion") or "v1"), kind))
        if resource is None:
            cause = Cause("FieldValueNotSupported", "can bind to Pod, Secret and Node only", "spec.boundObjectRef.kind")
            raise invalid("authentication.k8s.io", "TokenRequest", account, [cause])
        found = self._view.get(resource, str(ref.get("name") or ""), namespace if resource.namespaced else "")
        if found is None:
            raise not_found("", resource.plural, str(ref.get("name") or ""))
        if ref.get("uid") and ref["uid"] != found["metadata"]["uid"]:
            why = f"the UID in the bound object reference ({ref['uid']}) does not match the UID in record"
            raise ApiError("Conflict", f"{resource.plural} {ref.get('name')!r}: {why}")
        if kind == "Pod" and (found.get("spec") or {}).get("serviceAccountName") != account:
            cause = Cause("FieldValueInvalid", "the pod runs as another service account", "spec.boundObjectRef.name")
            raise invalid("authentication.k8s.io", "TokenRequest", account, [cause])
        claims = {CLAIM_OF[kind]: _reference(found)}
        node = (found.get("spec") or {}).get("nodeName") if kind == "Pod" else None
        return claims | (self._node_claim(node) if node else {})

    def _node_claim(self, name: str) -> dict[str, Any]:
        node = self._view.get(NODES, name)
        return {"node": _reference(node) if node is not None else {"name": name}}

    def _sign(
        self, account: Object, audiences: Sequence[str], now: dt.datetime, expires: dt.datetime, bound: Object
    ) -> str:
        metadata = account["metadata"]
        private = {"namespace": metadata["namespace"], "serviceaccount": _reference(account), **bound}
        claims = {
            "aud": list(audiences),
            "exp": int(expires.timestamp()),
            "iat": int(now.timestamp()),
            "iss": self._issuer,
            "jti": str(uuid.uuid4()),
            "nbf": int(now.timestamp()),
            "sub": f"system:serviceaccount:{metadata['namespace']}:{metadata['name']}",
            PRIVATE_CLAIM: private,
        }
        return jwt.encode(claims, self._key.private, ALGORITHM, headers={"kid": self._key.id})

    def is_ours(self, token: str) -> bool:
        """Whether a bearer token says that this issuer made it; nothing is verified."""
        try:
            payload = token.split(".")[1]
            claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        except (IndexError, ValueError):
            return False
        return isinstance(claims, dict) and claims.get("iss") == self._issuer

    def verify(self, token: str, audiences: Sequence[str] = ()) -> Verified:
        """Who a token is.

        :param audiences: any of these must be among the token's; empty: those of the API server
        :raises BadToken:
        """
        claims = self._verified.get(token)
        if claims is None:
            claims = self._decode(token)
            self._verified.put(token, claims)
        now = self._now().timestamp()
        if not float(claims["nbf"]) <= now + 1 or now >= float(claims["exp"]):
            raise BadToken("the token is expired or not valid yet")
        wanted = audiences or self.audiences
        shared = tuple(a for a in wanted if a in claims["aud"])
        if not shared:
            raise BadToken(f"the token is for {claims['aud']}, not for {list(wanted)}")
        return Verified(self._user(claims), shared)

    def _decode(self, token: str) -> dict[str, Any]:
        needed = {"require": ["exp", "nbf", "iss", "aud", "sub"], "verify_aud": False, "verify_exp": False}
        options: dict[str, Any] = needed | {"verify_nbf": False, "verify_iat": False}
        try:
            claims = jwt.decode(
                token,
                self._key.public,
                algorithms=[ALGORITHM],
                issuer=self._issuer,
                options=options,  # type: ignore[arg-type]
            )
            private = claims[PRIVATE_CLAIM]
            [str(private["namespace"]), str(private["serviceaccount"]["name"]), str(private["serviceaccount"]["uid"])]
        except (jwt.InvalidTokenError, KeyError, TypeError) as error:
            raise BadToken(f"not a token of this cluster: {error}") from error
        aud = claims["aud"]
        return {**claims, "aud": [aud] if isinstance(aud, str) else aud}

    def _user(self, claims: Object) -> User:
        private = claims[PRIVATE_CLAIM]
        namespace, account = private["namespace"], private["serviceaccount"]
        self._must_exist(SERVICE_ACCOUNTS, account, namespace)
        extra = {"authentication.kubernetes.io/credential-id": (f"JTI={claims.get('jti', '')}",)}
        for kind, claim in CLAIM_OF.items():
            if claim not in private:
                continue
            resource = BINDABLE["v1", kind]
            bound = private[claim]
            if claim != "node" or "pod" not in private:  # a pod's node is information; the pod is what it is bound to
                self._must_exist(resource, bound, namespace if resource.namespaced else "")
            if claim != "secret":
                extra[f"authentication.kubernetes.io/{claim}-name"] = (bound["name"],)
                if bound.get("uid"):
                    extra[f"authentication.kubernetes.io/{claim}-uid"] = (bound["uid"],)
        groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}", AUTHENTICATED)
        return User(f"system:serviceaccount:{namespace}:{account['name']}", groups, account["uid"], extra)

    def _must_exist(self, resource: Resource, reference: Object, namespace: str) -> None:
        found = self._view.get(resource, reference["name"], namespace)
        if found is None or found["metadata"].get("uid") != reference["uid"]:
            raise BadToken(f"{resource.plural} {reference['name']!r} that the token is bound to is gone")
        deleted = found["metadata"].get("deletionTimestamp")
        if deleted and self._now().timestamp() > dt.datetime.fromisoformat(deleted).timestamp() + DELETION_LEEWAY:
            raise BadToken(f"{resource.plural} {reference['name']!r} that the token is bound to is being deleted")


def _lifetime(name: str, spec: Object) -> int:
    seconds = spec.get("expirationSeconds")
    seconds = USUAL if seconds is None else seconds
    why = ""
    if not isinstance(seconds, int) or seconds < SHORTEST:
        why = "may not specify a duration less than 10 minutes"
    elif seconds > LONGEST:
        why = f"may not specify a duration larger than {LONGEST} seconds"
    if why:
        cause = Cause("FieldValueInvalid", f"Invalid value: {seconds}: {why}", "spec.expirationSeconds")
        raise invalid("authentication.k8s.io", "TokenRequest", name, [cause])
    return int(seconds)


def _reference(obj: Object) -> dict[str, str]:
    return {"name": obj["metadata"]["name"], "uid": obj["metadata"]["uid"]}


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _new_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
