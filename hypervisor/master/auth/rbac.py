"""Role-based access control: who is bound to which roles, and what these allow.

Theory of operation: roles and bindings are read from memory and turned into an index from a subject (a user or a
group) to the rules that it is granted, in the whole cluster and by namespace. The index is made anew by the first
decision after a change of any of them, so that a decision is a look-up and a few set operations.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, ROLE_BINDINGS, ROLES
from hypervisor.kube.selectors import LabelSelector
from hypervisor.master.auth import rules
from hypervisor.master.auth.authorizer import Decision
from hypervisor.master.auth.rules import Rule
from hypervisor.master.auth.user import Attributes, User
from hypervisor.master.auth.views import Object, ObjectView

_KINDS = (ROLES, CLUSTER_ROLES, ROLE_BINDINGS, CLUSTER_ROLE_BINDINGS)
_DEEPEST = 8  # aggregations of aggregations that are followed
Subject = tuple[str, str]
"""``User`` or ``Group``, and its name."""


class RbacView(Protocol):
    """Roles and bindings in memory; an empty namespace means all."""

    def roles(self, namespace: str = "") -> Iterable[Object]: ...

    def cluster_roles(self) -> Iterable[Object]: ...

    def role_bindings(self, namespace: str = "") -> Iterable[Object]: ...

    def cluster_role_bindings(self) -> Iterable[Object]: ...

    def version(self) -> Hashable:
        """Another one after any change."""


@dataclass(frozen=True)
class RbacOf:
    """The `RbacView` of an `ObjectView`."""

    view: ObjectView

    def roles(self, namespace: str = "") -> Iterable[Object]:
        return self.view.list(ROLES, namespace)

    def cluster_roles(self) -> Iterable[Object]:
        return self.view.list(CLUSTER_ROLES)

    def role_bindings(self, namespace: str = "") -> Iterable[Object]:
        return self.view.list(ROLE_BINDINGS, namespace)

    def cluster_role_bindings(self) -> Iterable[Object]:
        return self.view.list(CLUSTER_ROLE_BINDINGS)

    def version(self) -> Hashable:
        return tuple(self.view.version(kind) for kind in _KINDS)


@dataclass(frozen=True, slots=True)
class Grant:
    """The rules of one role that one binding grants.

    :ivar why: how `kubectl auth can-i` and the log name it
    """

    rules: tuple[Rule, ...]
    why: str


@dataclass(slots=True)
class _Granted:
    cluster: list[Grant] = field(default_factory=list)
    by_namespace: dict[str, list[Grant]] = field(default_factory=dict)

    def within(self, namespace: str) -> Iterator[Grant]:
        yield from self.cluster
        if namespace:
            yield from self.by_namespace.get(namespace, ())


class Rbac:
    """An `Authorizer` over roles and bindings. For one thread."""

    def __init__(self, view: RbacView) -> None:
        self._view = view
        self._version: Hashable = object()
        self._granted: dict[Subject, _Granted] = {}
        self._roles: dict[tuple[str, str], tuple[Rule, ...]] = {}

    def decide(self, attributes: Attributes) -> Decision:
        """See `Authorizer`. Nothing is ever denied: what no role grants is another authorizer's."""
        for grant in self._grants(attributes.user, attributes.namespace):
            if any(rule.allows(attributes) for rule in grant.rules):
                return Decision(True, grant.why)
        return Decision(False)

    def rules_for(self, user: User, namespace: str) -> list[Rule]:
        """All that a user may do in a namespace (empty: what is granted in the whole cluster)."""
        return [rule for grant in self._grants(user, namespace) for rule in grant.rules]

    def role_rules(self, ref: Mapping[str, Any], namespace: str) -> tuple[Rule, ...] | None:
        """The rules of a binding's roleRef; None when there is no such role."""
        self._refresh()
        return self._roles.get((namespace if ref.get("kind") == "Role" else "", str(ref.get("name"))))

    def _grants(self, user: User, namespace: str) -> Iterator[Grant]:
        self._refresh()
        for subject in (("User", user.name), *(("Group", group) for group in user.groups)):
            granted = self._granted.get(subject)
            if granted is not None:
                yield from granted.within(namespace)

    def _refresh(self) -> None:
        version = self._view.version()
        if version == self._version:
            return
        self._roles = _roles(self._view)
        self._granted = {}
        for binding in self._view.cluster_role_bindings():
            self._index(binding, "")
        for binding in self._view.role_bindings():
            self._index(binding, binding["metadata"]["namespace"])
        self._version = version

    def _index(self, binding: Object, namespace: str) -> None:
        ref = binding.get("roleRef") or {}
        granted = self._roles.get((namespace if ref.get("kind") == "Role" else "", str(ref.get("name"))))
        if granted is None:
            return
        name = binding["metadata"]["name"]
        shown = f'RoleBinding "{name}/{namespace}"' if namespace else f'ClusterRoleBinding "{name}"'
        role = f'{ref.get("kind")} "{ref.get("name")}"'
        for subject in binding.get("subjects") or ():
            key = _subject(subject, namespace)
            if key is None:
                continue
            shown_subject = f'{subject.get("kind")} "{_shown(subject)}"'
            entry = self._granted.setdefault(key, _Granted())
            grant = Grant(granted, f"RBAC: allowed by {shown} of {role} to {shown_subject}")
            (entry.by_namespace.setdefault(namespace, []) if namespace else entry.cluster).append(grant)


def _subject(subject: Mapping[str, Any], namespace: str) -> Subject | None:
    kind, name = subject.get("kind"), str(subject.get("name"))
    if kind == "ServiceAccount":
        home = subject.get("namespace") or namespace
        return ("User", f"system:serviceaccount:{home}:{name}") if home else None
    return (str(kind), name) if kind in ("User", "Group") else None


def _shown(subject: Mapping[str, Any]) -> str:
    home = subject.get("namespace")
    return f"{subject.get('name')}/{home}" if home else str(subject.get("name"))


def _roles(view: RbacView) -> dict[tuple[str, str], tuple[Rule, ...]]:
    """Rules by namespace (empty for cluster roles) and name."""
    cluster_roles = expanded(view.cluster_roles())
    found = {("", r["metadata"]["name"]): rules.parse(r.get("rules")) for r in cluster_roles}
    for role in view.roles():
        found[role["metadata"]["namespace"], role["metadata"]["name"]] = rules.parse(role.get("rules"))
    return found


def expanded(cluster_roles: Iterable[Object]) -> list[Object]:
    """All, those that aggregate with their rules filled in, also where they aggregate one another."""
    current = list(cluster_roles)
    for _ in range(_DEEPEST):
        filled = [r | {"rules": aggregated(r, current)} if r.get("aggregationRule") else r for r in map(dict, current)]
        if filled == current:
            break
        current = list[Object](filled)
    return current


def aggregated(role: Object, cluster_roles: Iterable[Object]) -> list[Mapping[str, Any]]:
    """The rules of a cluster role: its own, or those of the cluster roles that its aggregationRule selects."""
    selectors = ((role.get("aggregationRule") or {}).get("clusterRoleSelectors")) or ()
    if not selectors:
        return list(role.get("rules") or ())
    try:
        wanted = [LabelSelector.of(selector) for selector in selectors]
    except ApiError:
        return []  # a selector that says nothing sensible selects nothing
    own = role["metadata"]["name"]
    picked = [r for r in cluster_roles if r["metadata"]["name"] != own and any(s.matches_object(r) for s in wanted)]
    result: list[Mapping[str, Any]] = []
    for other in sorted(picked, key=lambda r: str(r["metadata"]["name"])):
        result.extend(rule for rule in other.get("rules") or () if rule not in result)
    return result
