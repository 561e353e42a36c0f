"""Whether a user may do what a request asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hypervisor.kube.errors import ApiError, forbidden
from hypervisor.master.auth.user import SYSTEM_MASTERS, Attributes


@dataclass(frozen=True, slots=True)
class Decision:
    """What an authorizer thinks.

    :ivar allowed: yes, and nobody else is asked
    :ivar reason: for reviews and the log
    :ivar denied: no, and nobody else is asked; with neither, the next authorizer is asked
    """

    allowed: bool
    reason: str = ""
    denied: bool = False


NO_OPINION = Decision(False)


class Authorizer(Protocol):
    """:raises nothing: an authorizer that cannot tell has no opinion"""

    def decide(self, attributes: Attributes) -> Decision:
        """Whether it is allowed. Never waits."""


class Masters:
    """Members of ``system:masters`` may do everything: the way back in when every binding is gone."""

    def decide(self, attributes: Attributes) -> Decision:
        """See `Authorizer`."""
        return Decision(SYSTEM_MASTERS in attributes.user.groups)


class Chain:
    """Asks authorizers in order until one of them allows or denies."""

    def __init__(self, authorizers: Iterable[Authorizer]) -> None:
        self._authorizers: Sequence[Authorizer] = tuple(authorizers)

    def decide(self, attributes: Attributes) -> Decision:
        """See `Authorizer`. The reasons of all that had no opinion are joined."""
        reasons = []
        for authorizer in self._authorizers:
            decision = authorizer.decide(attributes)
            if decision.allowed or decision.denied:
                return decision
            if decision.reason:
                reasons.append(decision.reason)
        return Decision(False, ", ".join(reasons))


def check(authorizer: Authorizer, attributes: Attributes) -> None:
    """:raises ApiError: Forbidden, worded as upstream words it"""
    decision = authorizer.decide(attributes)
    if not decision.allowed:
        raise refusal(attributes, decision.reason)


def refusal(attributes: Attributes, reason: str = "") -> ApiError:
    """403 for a request."""
    because = f": {reason}" if reason else ""
    user = attributes.user.name
    if attributes.path:
        text = f'User "{user}" cannot {attributes.verb} path "{attributes.path}"{because}'
        return ApiError("Forbidden", f"forbidden: {text}")
    plural = attributes.plural + (f"/{attributes.subresource}" if attributes.subresource else "")
    scope = f'in the namespace "{attributes.namespace}"' if attributes.namespace else "at the cluster scope"
    text = (
        f'User "{user}" cannot {attributes.verb} resource "{plural}" in API group "{attributes.group}" {scope}{because}'
    )
    return forbidden(attributes.group, attributes.plural, attributes.name, text)
