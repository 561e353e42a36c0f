"""All of it put together, as the API server uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypervisor.master.admission.plugin import Plugin
from hypervisor.master.auth import authn
from hypervisor.master.auth.authorizer import Authorizer, Chain, Masters
from hypervisor.master.auth.ca import CertificateAuthority
from hypervisor.master.auth.certificates import CertificateRequests
from hypervisor.master.auth.escalation import GrantsWithinOwn
from hypervisor.master.auth.node import NodeAuthorizer
from hypervisor.master.auth.node_restriction import NodeRestriction
from hypervisor.master.auth.rbac import Rbac, RbacOf
from hypervisor.master.auth.tokens import ServiceAccountTokens, SigningKey
from hypervisor.master.auth.user import User
from hypervisor.master.auth.views import ObjectView


@dataclass(frozen=True)
class Auth:
    """Everything about who asks and whether they may, of one API server.

    :ivar plugins: admission rules, to be put after those that complete objects
    """

    ca: CertificateAuthority
    tokens: ServiceAccountTokens
    authenticator: authn.Authenticator
    authorizer: Authorizer
    rbac: Rbac
    plugins: Sequence[Plugin]


def open_auth(pki: Path, view: ObjectView, *, static_users: Mapping[str, User] | None = None) -> Auth:
    """Opens (or makes) the keys in a folder, and builds the rest over the cluster's objects.

    :raises InvalidInput: a key there is damaged
    """
    ca = CertificateAuthority.open(pki)
    tokens = ServiceAccountTokens(SigningKey.open(pki / "sa.key"), view)
    rbac = Rbac(RbacOf(view))
    authorizer = Chain((Masters(), NodeAuthorizer(view), rbac))
    plugins: tuple[Plugin, ...] = (
        NodeRestriction(view),
        GrantsWithinOwn(rbac, authorizer),
        CertificateRequests(authorizer),
    )
    authenticator = authn.Authenticator(view, tokens, static=static_users)
    return Auth(ca, tokens, authenticator, authorizer, rbac, plugins)
