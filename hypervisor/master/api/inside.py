"""What the server's handlers work with: one value, made by the daemon, passed to all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hypervisor.master.api.audit import Audit
from hypervisor.master.api.info import Routes
from hypervisor.master.api.kubelet import Kubelets
from hypervisor.master.api.metrics import Metrics
from hypervisor.master.api.objects import Objects
from hypervisor.master.auth.authn import Authenticator
from hypervisor.master.auth.authorizer import Authorizer
from hypervisor.master.auth.rbac import Rbac
from hypervisor.master.auth.tokens import ServiceAccountTokens
from hypervisor.master.kinds.table import Kinds


@dataclass(frozen=True, slots=True)
class Inside:
    """:ivar checks: of ``/readyz`` and ``/livez`` by name; each gives what is wrong, or nothing
    :ivar base_url: how clients reach the server
    """

    objects: Objects
    authenticator: Authenticator
    authorizer: Authorizer
    rbac: Rbac
    tokens: ServiceAccountTokens
    kubelets: Kubelets
    audit: Audit
    metrics: Metrics
    base_url: str
    checks: Mapping[str, Callable[[], str]] = field(default_factory=dict)

    @property
    def routes(self) -> Routes:
        """The kinds that are served, by their paths."""
        return self.kinds.routes

    @property
    def kinds(self) -> Kinds:
        """Those that are served."""
        return self.objects.kinds
