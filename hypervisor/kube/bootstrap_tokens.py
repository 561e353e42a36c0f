"""Bootstrap tokens: what machines that are to join a cluster show; Secrets of a type of their own in ``kube-system``.

Source: Kubernetes, "Authenticating with Bootstrap Tokens".
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
import string
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypervisor.kube.meta import parse_time, rfc3339

NAMESPACE = "kube-system"
TYPE = "bootstrap.kubernetes.io/token"
PREFIX = "bootstrap-token-"
GROUP = "system:bootstrappers:podvisor:node-token"
_LETTERS = string.ascii_lowercase + string.digits
_FORM = re.compile(r"[a-z0-9]{6}\.[a-z0-9]{16}")


@dataclass(frozen=True, slots=True)
class Token:
    """:ivar expires: seconds since the epoch; None: never"""

    id: str
    secret: str
    expires: float | None = None
    description: str = ""

    def __str__(self) -> str:
        return f"{self.id}.{self.secret}"


def new(ttl: float | None, description: str = "") -> Token:
    """A token that nobody can guess.

    :param ttl: seconds; None: it does not expire
    """
    expires = None if ttl is None else time.time() + ttl
    return Token(_random(6), _random(16), expires, description)


def _random(length: int) -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(length))


def is_token(text: str) -> bool:
    """Whether it has a token's form."""
    return _FORM.fullmatch(text) is not None


def secret_of(token: Token) -> dict[str, Any]:
    """The Secret that makes a token good."""
    data = {
        "token-id": token.id,
        "token-secret": token.secret,
        "usage-bootstrap-authentication": "true",
        "usage-bootstrap-signing": "true",
        "auth-extra-groups": GROUP,
    }
    data |= {"expiration": rfc3339(token.expires)} if token.expires is not None else {}
    data |= {"description": token.description} if token.description else {}
    metadata = {"name": PREFIX + token.id, "namespace": NAMESPACE}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": TYPE, "stringData": data}


def of_secret(obj: Mapping[str, Any]) -> Token | None:
    """The token of a Secret; None: it is none."""
    if obj.get("type") != TYPE:
        return None
    data = obj.get("data") or {}
    identifier, secret = _text(data, "token-id"), _text(data, "token-secret")
    if not is_token(f"{identifier}.{secret}"):
        return None
    return Token(identifier, secret, expiry_of(obj), _text(data, "description"))


def expiry_of(obj: Mapping[str, Any]) -> float | None:
    """When a token's Secret is good no longer; None: never. One that nobody can read has ended."""
    text = _text(obj.get("data") or {}, "expiration")
    if not text:
        return None
    try:
        return parse_time(text)
    except ValueError:
        return 0.0


def _text(data: Mapping[str, Any], key: str) -> str:
    try:
        return base64.b64decode(data.get(key) or "", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, TypeError):
        return ""
