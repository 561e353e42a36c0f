"""Bootstrap tokens that have expired are removed. Source: Kubernetes, "Authenticating with Bootstrap Tokens"."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.bootstrap_tokens import NAMESPACE, TYPE, expiry_of
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import SECRETS
from hypervisor.master.controllers.base import Context, unless_gone

LONGEST_S = 3600.0
"""Seconds after which it looks again at the latest: clocks are set."""


class TokenCleaner:
    """One turn for one Secret; the authenticator refuses an expired token by itself."""

    name = "tokencleaner"

    def __init__(self, context: Context, now: Callable[[], float] = time.time) -> None:
        self._context = context
        self._now = now
        self.watches = {SECRETS: self._token}

    @staticmethod
    def _token(secret: Mapping[str, Any]) -> Iterable[Key]:
        key = meta.key_of(secret)
        return [key] if secret.get("type") == TYPE and key[0] == NAMESPACE else []

    async def sync(self, key: Key) -> float | None:
        """Removes it, or says when."""
        secret = self._context.cached(SECRETS, *key)
        ends = expiry_of(secret) if secret is not None else None
        if secret is None or ends is None:
            return None
        left = ends - self._now()
        if left > 0:
            return min(left + 0.01, LONGEST_S)
        await unless_gone(self._context.client.delete(SECRETS, key[1], key[0], uid=meta.uid_of(secret)))
        return None
