"""Who sends a request: client certificates and bearer tokens.

A certificate reached us through TLS, which has verified its chain and dates at the handshake; a connection may outlive
its certificate, so that the end is looked at again with each request.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID

from hypervisor.errors import InvalidInput
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import SECRETS
from hypervisor.master.auth.bounded import Bounded
from hypervisor.master.auth.ca import Clock, utc_now
from hypervisor.master.auth.tokens import BadToken, ServiceAccountTokens, Verified
from hypervisor.master.auth.user import ANONYMOUS, AUTHENTICATED, User
from hypervisor.master.auth.views import ObjectView

CACHED_CERTIFICATES = 1024
LONGEST_TOKEN = 16 << 10  # bytes
OPEN_PATHS = ("/healthz", "/livez", "/readyz", "/version")
"""Where a request without credentials is let in, and below."""
BOOTSTRAP_TYPE = "bootstrap.kubernetes.io/token"
BOOTSTRAPPERS = "system:bootstrappers"


@dataclass(frozen=True, slots=True)
class _Certified:
    user: User
    until: float


class Authenticator:
    """Tells who sends a request. For one event loop; nothing here waits.

    :param static: users by token, see `static_tokens`
    """

    def __init__(
        self,
        view: ObjectView,
        tokens: ServiceAccountTokens,
        *,
        static: Mapping[str, User] | None = None,
        now: Clock = utc_now,
    ) -> None:
        self._view = view
        self._tokens = tokens
        self._static = dict(static or {})
        self._now = now
        self._certified: Bounded[bytes, _Certified] = Bounded(CACHED_CERTIFICATES)

    def authenticate(self, peer_cert: bytes | None, authorization: str, path: str = "") -> User:
        """Who it is. A certificate counts before a token, as upstream has it.

        :param peer_cert: DER, as `ssl.SSLObject.getpeercert(binary_form=True)` gives it
        :param authorization: the header's value, empty where there is none
        :param path: of the URL; `OPEN_PATHS` need no credentials
        :raises ApiError: Unauthorized
        """
        if peer_cert:
            user = self._by_certificate(peer_cert)
            if user is not None:
                return user
        if authorization:
            return self._by_header(authorization)
        if any(path == p or path.startswith(f"{p}/") for p in OPEN_PATHS):
            return ANONYMOUS
        raise unauthorized()

    def review(self, token: str, audiences: Sequence[str] = ()) -> Verified:
        """Whose a bearer token is, for ``TokenReview``.

        :raises BadToken: nobody's
        """
        if not token or len(token) > LONGEST_TOKEN:
            raise BadToken("no token, or one that is too long")
        if self._tokens.is_ours(token):
            return self._tokens.verify(token, audiences)
        known = tuple(a for a in audiences or self._tokens.audiences if a in self._tokens.audiences)
        if not known:
            raise BadToken(f"this API server is none of {list(audiences)}")
        user = self._by_static_token(token) or self._by_bootstrap_token(token)
        if user is None:
            raise BadToken("the token is unknown")
        return Verified(user, known)

    def _by_certificate(self, der: bytes) -> User | None:
        known = self._certified.get(der)
        if known is None:
            known = _of_certificate(der)
            self._certified.put(der, known)
        if known.until <= self._now().timestamp():
            raise unauthorized("the client certificate has expired")
        return known.user if known.user.name else None

    def _by_header(self, authorization: str) -> User:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise unauthorized()
        try:
            return self.review(token.strip()).user
        except BadToken as error:
            raise unauthorized() from error

    def _by_static_token(self, token: str) -> User | None:
        encoded = token.encode()
        return next((user for t, user in self._static.items() if hmac.compare_digest(t.encode(), encoded)), None)

    def _by_bootstrap_token(self, token: str) -> User | None:
        identifier, dot, secret = token.partition(".")
        if not dot or len(identifier) != 6 or len(secret) != 16 or not identifier.isalnum():
            return None
        found = self._view.get(SECRETS, f"bootstrap-token-{identifier}", "kube-system")
        if found is None or found.get("type") != BOOTSTRAP_TYPE or found["metadata"].get("deletionTimestamp"):
            return None
        data = _decoded(found)
        matches = hmac.compare_digest(data.get("token-secret", ""), secret) and data.get("token-id") == identifier
        if not matches or data.get("usage-bootstrap-authentication") != "true" or self._past(data.get("expiration")):
            return None
        asked = [g.strip() for g in data.get("auth-extra-groups", "").split(",")]
        extra = [g for g in asked if g.startswith(f"{BOOTSTRAPPERS}:")]
        return User(f"system:bootstrap:{identifier}", (BOOTSTRAPPERS, *extra, AUTHENTICATED))

    def _past(self, expiration: str | None) -> bool:
        if not expiration:
            return False
        try:
            return dt.datetime.fromisoformat(expiration).astimezone(dt.UTC) <= self._now()
        except ValueError:
            return True  # a token whose end nobody can read has ended


def unauthorized(message: str = "Unauthorized") -> ApiError:
    """401. Says no more than it must: what was wrong with a credential helps only who guesses."""
    return ApiError("Unauthorized", message)


def static_tokens(path: Path) -> dict[str, User]:
    """Users by token, from a file of lines ``token,user,uid[,"group1,group2"]`` as upstream's ``--token-auth-file``.

    :raises InvalidInput: a line is not like that, or others can read the file
    """
    import csv

    if path.stat().st_mode & 0o077:
        raise InvalidInput("others can read the tokens in it; run chmod 600", where=str(path))
    users = {}
    for number, row in enumerate(csv.reader(path.read_text().splitlines()), 1):
        if not row or row[0].startswith("#"):
            continue
        if not 3 <= len(row) <= 4 or not row[0] or not row[1]:
            raise InvalidInput('write token,user,uid,"group1,group2"', where=f"{path}:{number}")
        groups = [g.strip() for g in (row[3] if len(row) == 4 else "").split(",") if g.strip()]
        users[row[0]] = User(row[1], (*groups, AUTHENTICATED), row[2])
    return users


def _of_certificate(der: bytes) -> _Certified:
    try:
        certificate = x509.load_der_x509_certificate(der)
    except ValueError as error:
        raise unauthorized() from error
    names = [str(a.value) for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    groups = [str(a.value) for a in certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    groups = [g for g in dict.fromkeys(groups) if g != AUTHENTICATED]
    user = User(names[0] if names else "", (*groups, AUTHENTICATED))
    return _Certified(user, certificate.not_valid_after_utc.timestamp())


def _decoded(secret: Mapping[str, Any]) -> dict[str, str]:
    values = {}
    for key, value in (secret.get("data") or {}).items():
        try:
            values[key] = base64.b64decode(value, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError, TypeError):
            continue
    return values
