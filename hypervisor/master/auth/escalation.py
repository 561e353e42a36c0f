"""Nobody grants what he lacks: the admission rule for roles and bindings.

Source: Kubernetes, "Using RBAC Authorization", "Privilege escalation prevention and bootstrapping".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hypervisor.kube.errors import forbidden
from hypervisor.master.admission.plugin import AdmissionRequest, Operation
from hypervisor.master.auth import rules
from hypervisor.master.auth.authorizer import Authorizer
from hypervisor.master.auth.rbac import Rbac
from hypervisor.master.auth.rules import Rule
from hypervisor.master.auth.user import SYSTEM_MASTERS, Attributes

GROUP = "rbac.authorization.k8s.io"
_ROLES = frozenset((f"roles.{GROUP}", f"clusterroles.{GROUP}"))
_BINDINGS = frozenset((f"rolebindings.{GROUP}", f"clusterrolebindings.{GROUP}"))
SHOWN = 20  # missing rules in a message, at most


class GrantsWithinOwn:
    """An admission plug-in: a role or a binding may grant only what its author may do there, unless he holds the verb
    ``escalate`` on the role or ``bind`` on the role that is bound.
    """

    operations: frozenset[Operation] = frozenset(("CREATE", "UPDATE"))
    plurals = _ROLES | _BINDINGS

    def __init__(self, rbac: Rbac, authorizer: Authorizer) -> None:
        self._rbac = rbac
        self._authorizer = authorizer

    async def admit(self, request: AdmissionRequest) -> None:
        """:raises ApiError: Forbidden, naming what is lacking"""
        if SYSTEM_MASTERS in request.user.groups or request.subresource:
            return
        if request.kind.resource.qualified in _ROLES:
            self._check_role(request)
        else:
            self._check_binding(request)

    def _check_role(self, request: AdmissionRequest) -> None:
        new, old = request.object, request.old or {}
        if request.old is not None and all(new.get(f) == old.get(f) for f in ("rules", "aggregationRule")):
            return
        plural = request.kind.resource.plural
        if self._may(request, "escalate", plural, request.name):
            return
        wanted = rules.parse(new.get("rules"))
        if new.get("aggregationRule"):  # it will hold whatever anybody labels for it
            wanted = (Rule(frozenset("*"), frozenset("*"), frozenset("*")), Rule(frozenset("*"), urls=frozenset("*")))
        self._must_hold(request, wanted)

    def _check_binding(self, request: AdmissionRequest) -> None:
        new, old = request.object, request.old or {}
        if request.old is not None and all(new.get(f) == old.get(f) for f in ("roleRef", "subjects")):
            return
        ref: Mapping[str, Any] = new.get("roleRef") or {}
        plural = "roles" if ref.get("kind") == "Role" else "clusterroles"
        if self._may(request, "bind", plural, str(ref.get("name") or "")):
            return
        wanted = self._rbac.role_rules(ref, request.namespace)
        if wanted is None:
            why = f'{plural}.{GROUP} "{ref.get("name")}" not found, and the verb "bind" on it is not yours'
            raise forbidden(GROUP, request.kind.resource.plural, request.name, why)
        self._must_hold(request, wanted)

    def _may(self, request: AdmissionRequest, verb: str, plural: str, name: str) -> bool:
        asked = Attributes(request.user, verb, GROUP, "v1", plural, "", request.namespace, name)
        return self._authorizer.decide(asked).allowed

    def _must_hold(self, request: AdmissionRequest, wanted: Sequence[Rule]) -> None:
        missing = rules.lacking(self._rbac.rules_for(request.user, request.namespace), wanted)
        if missing:
            shown = "\n".join(rule.shown() for rule in missing[:SHOWN])
            more = f"\n... and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            user = f'user "{request.user.name}" (groups={json.dumps(sorted(request.user.groups))})'
            why = f"{user} is attempting to grant RBAC permissions not currently held:\n{shown}{more}"
            raise forbidden(GROUP, request.kind.resource.plural, request.name, why)
