"""RBAC: a table of who may do what, roles that aggregate, and grants that are refused."""

from __future__ import annotations

from typing import Any

import pytest
from authkit import Objects
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, ROLE_BINDINGS, ROLES, Resource
from hypervisor.master.admission.plugin import AdmissionRequest
from hypervisor.master.auth import bootstrap, reviews, rules
from hypervisor.master.auth.authorizer import Chain, Masters, check
from hypervisor.master.auth.escalation import GrantsWithinOwn
from hypervisor.master.auth.rbac import Rbac, RbacOf
from hypervisor.master.auth.rules import Rule
from hypervisor.master.auth.user import ANONYMOUS, AUTHENTICATED, Attributes, User
from hypervisor.master.kinds.kind import Kind


def user(name: str, *groups: str) -> User:
    return User(name, (*groups, AUTHENTICATED))


def subject(text: str) -> dict[str, str]:
    """``ann`` a user, ``@dev`` a group, ``ci/builder`` a service account."""
    if text.startswith("@"):
        return {"kind": "Group", "name": text[1:]}
    if "/" in text:
        return {"kind": "ServiceAccount", "namespace": text.split("/")[0], "name": text.split("/")[1]}
    return {"kind": "User", "name": text}


def bind(objects: Objects, role: str, *who: str, namespace: str = "", kind: str = "ClusterRole") -> None:
    resource = ROLE_BINDINGS if namespace else CLUSTER_ROLE_BINDINGS
    ref = {"kind": kind, "name": role}
    objects.put(resource, f"{role}-{who[0]}", namespace, roleRef=ref, subjects=[subject(w) for w in who])


@pytest.fixture
def cluster(objects: Objects) -> Objects:
    for role in bootstrap.cluster_roles():
        objects.put(CLUSTER_ROLES, role["metadata"]["name"], **role)
    for binding in bootstrap.cluster_role_bindings():
        objects.put(CLUSTER_ROLE_BINDINGS, binding["metadata"]["name"], **binding)
    bind(objects, "view", "vera")
    bind(objects, "edit", "@dev", namespace="shop")
    bind(objects, "admin", "ci/builder", namespace="ci")
    one = {"verbs": ["get", "update"], "apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["one"]}
    scale = {"verbs": ["*"], "apiGroups": ["apps"], "resources": ["*/scale"]}
    objects.put(ROLES, "narrow", "shop", rules=[one, scale])
    bind(objects, "narrow", "nina", namespace="shop", kind="Role")
    return objects


@pytest.fixture
def rbac(cluster: Objects) -> Rbac:
    return Rbac(RbacOf(cluster))


ROOT = user("root", "system:masters")
JOINING = user("system:bootstrap:abc", "system:bootstrappers")
VERA, DEV, NINA = user("vera"), user("dan", "dev"), user("nina")
BUILDER = user("system:serviceaccount:ci:builder", "system:serviceaccounts", "system:serviceaccounts:ci")

# who, verb, what ("plural[/sub][.group]" or a path), where ("namespace[/name]"), whether
TABLE: list[tuple[User, str, str, str, bool]] = [
    (VERA, "get", "pods", "shop/a", True),
    (VERA, "list", "pods", "", True),
    (VERA, "get", "pods/log", "shop/a", True),
    (VERA, "get", "pods/exec", "shop/a", False),
    (VERA, "create", "pods/exec", "shop/a", False),
    (VERA, "get", "secrets", "shop/a", False),
    (VERA, "delete", "pods", "shop/a", False),
    (VERA, "list", "nodes", "", False),
    (DEV, "create", "pods", "shop", True),
    (DEV, "create", "pods/exec", "shop/a", True),
    (DEV, "get", "secrets", "shop/a", True),
    (DEV, "patch", "deployments.apps", "shop/a", True),
    (DEV, "update", "deployments/scale.apps", "shop/a", True),
    (DEV, "create", "pods", "other", False),
    (DEV, "list", "pods", "", False),
    (DEV, "create", "roles.rbac.authorization.k8s.io", "shop", False),
    (BUILDER, "create", "rolebindings.rbac.authorization.k8s.io", "ci", True),
    (BUILDER, "create", "pods", "ci", True),
    (BUILDER, "create", "pods", "shop", False),
    (BUILDER, "get", "/openid/v1/jwks", "", True),
    (NINA, "get", "configmaps", "shop/one", True),
    (NINA, "get", "configmaps", "shop/two", False),
    (NINA, "list", "configmaps", "shop", False),
    (NINA, "create", "configmaps", "shop", False),
    (NINA, "get", "configmaps", "other/one", False),
    (NINA, "patch", "replicasets/scale.apps", "shop/x", True),
    (NINA, "patch", "replicasets.apps", "shop/x", False),
    (NINA, "get", "/api", "", True),
    (NINA, "get", "/apis/apps/v1", "", True),
    (NINA, "get", "/metrics", "", False),
    (NINA, "post", "/api", "", False),
    (NINA, "create", "selfsubjectaccessreviews.authorization.k8s.io", "", True),
    (NINA, "create", "subjectaccessreviews.authorization.k8s.io", "", False),
    (ANONYMOUS, "get", "/healthz", "", True),
    (ANONYMOUS, "get", "/version", "", True),
    (ANONYMOUS, "get", "/api", "", False),
    (ANONYMOUS, "list", "pods", "", False),
    (ROOT, "delete", "nodes", "/n1", True),
    (ROOT, "get", "/metrics", "", True),
    (user("eve", "Dev"), "create", "pods", "shop", False),
    (user("dev"), "create", "pods", "shop", False),
    (user("system:serviceaccount:shop:builder"), "create", "pods", "ci", False),
    (JOINING, "create", "certificatesigningrequests.certificates.k8s.io", "", True),
    (JOINING, "create", "nodes", "", False),
]  # fmt: skip


def attributes(who: User, verb: str, what: str, where: str) -> Attributes:
    if what.startswith("/"):
        return Attributes(who, verb, path=what)
    resource, _, group = what.partition(".")
    plural, _, subresource = resource.partition("/")
    namespace, _, name = where.partition("/")
    return Attributes(who, verb, group, "v1", plural, subresource, namespace, name)


@pytest.mark.parametrize(
    ("who", "verb", "what", "where", "allowed"), TABLE, ids=[f"{t[0].name}-{t[1]}-{t[2]}-{t[3]}" for t in TABLE]
)
def test_table(rbac: Rbac, who: User, verb: str, what: str, where: str, allowed: bool) -> None:
    assert rbac.decide(attributes(who, verb, what, where)).allowed is allowed


def test_reason_names_binding_and_role(rbac: Rbac) -> None:
    decision = rbac.decide(attributes(DEV, "create", "pods", "shop"))
    assert decision.reason == 'RBAC: allowed by RoleBinding "edit-@dev/shop" of ClusterRole "edit" to Group "dev"'


def test_refusal_is_worded_as_clients_know_it(rbac: Rbac) -> None:
    with pytest.raises(ApiError) as caught:
        check(rbac, attributes(NINA, "get", "secrets", "shop/x"))
    assert caught.value.code == 403
    assert str(caught.value) == (
        'secrets "x" is forbidden: User "nina" cannot get resource "secrets" in API group "" in the namespace "shop"'
    )
    with pytest.raises(ApiError, match='forbidden: User "nina" cannot get path "/metrics"'):
        check(rbac, attributes(NINA, "get", "/metrics", ""))


def test_changes_are_seen_at_once(cluster: Objects, rbac: Rbac) -> None:
    asked = attributes(user("new"), "get", "pods", "shop/a")
    assert not rbac.decide(asked).allowed
    bind(cluster, "view", "new", namespace="shop")
    assert rbac.decide(asked).allowed
    cluster.remove(ROLE_BINDINGS, "view-new", "shop")
    assert not rbac.decide(asked).allowed


def test_aggregation_follows_labels_through_others(cluster: Objects, rbac: Rbac) -> None:
    asked = attributes(DEV, "get", "gadgets.example.com", "shop/a")
    assert not rbac.decide(asked).allowed
    rule = {"verbs": ["get"], "apiGroups": ["example.com"], "resources": ["gadgets"]}
    labels = {"rbac.authorization.k8s.io/aggregate-to-view": "true"}
    cluster.put(CLUSTER_ROLES, "gadgets", metadata={"labels": labels}, rules=[rule])
    assert rbac.decide(asked).allowed  # edit aggregates view


def test_roles_that_aggregate_each_other_end() -> None:
    objects = Objects()
    for name, other in (("a", "b"), ("b", "a")):
        selector = {"clusterRoleSelectors": [{"matchLabels": {"is": other}}]}
        objects.put(CLUSTER_ROLES, name, metadata={"labels": {"is": name}}, aggregationRule=selector)
    assert not Rbac(RbacOf(objects)).decide(attributes(NINA, "get", "pods", "shop/a")).allowed


def kind(resource: Resource) -> Kind:
    return Kind(resource, resource.plural, "")


def admission(
    who: User, resource: Resource, obj: dict[str, Any], old: dict[str, Any] | None = None
) -> AdmissionRequest:
    namespace = "ci" if resource.namespaced else ""
    return AdmissionRequest("UPDATE" if old else "CREATE", kind(resource), who, namespace, "x", obj, old)


GRANTS: list[tuple[User, Resource, dict[str, Any], bool]] = [
    (BUILDER, ROLES, {"rules": [{"verbs": ["get"], "apiGroups": [""], "resources": ["secrets"]}]}, True),
    (BUILDER, ROLES, {"rules": [{"verbs": ["*"], "apiGroups": [""], "resources": ["secrets"]}]}, False),
    (BUILDER, ROLES, {"rules": [{"verbs": ["get"], "apiGroups": [""], "resources": ["nodes"]}]}, False),
    (BUILDER, ROLES, {"rules": [{"verbs": ["get"], "nonResourceURLs": ["/metrics"]}]}, False),
    (BUILDER, ROLE_BINDINGS, {"roleRef": {"kind": "ClusterRole", "name": "edit"}}, True),
    (BUILDER, ROLE_BINDINGS, {"roleRef": {"kind": "ClusterRole", "name": "cluster-admin"}}, False),
    (BUILDER, ROLE_BINDINGS, {"roleRef": {"kind": "ClusterRole", "name": "nowhere"}}, False),
    (BUILDER, CLUSTER_ROLE_BINDINGS, {"roleRef": {"kind": "ClusterRole", "name": "view"}}, False),
    (VERA, CLUSTER_ROLE_BINDINGS, {"roleRef": {"kind": "ClusterRole", "name": "view"}}, True),
    (VERA, CLUSTER_ROLES, {"aggregationRule": {"clusterRoleSelectors": [{}]}}, False),
    (ROOT, CLUSTER_ROLE_BINDINGS, {"roleRef": {"kind": "ClusterRole", "name": "nowhere"}}, True),
]


@pytest.mark.parametrize(("who", "resource", "obj", "allowed"), GRANTS)
async def test_nobody_grants_what_he_lacks(
    rbac: Rbac, who: User, resource: Resource, obj: dict[str, Any], allowed: bool
) -> None:
    plugin = GrantsWithinOwn(rbac, Chain((Masters(), rbac)))
    if allowed:
        await plugin.admit(admission(who, resource, obj))
    else:
        with pytest.raises(ApiError, match="forbidden"):
            await plugin.admit(admission(who, resource, obj))


async def test_what_was_there_before_may_stay(rbac: Rbac) -> None:
    old = {"roleRef": {"kind": "ClusterRole", "name": "cluster-admin"}, "subjects": []}
    plugin = GrantsWithinOwn(rbac, rbac)
    await plugin.admit(admission(BUILDER, ROLE_BINDINGS, {**old, "metadata": {"labels": {"a": "b"}}}, old))
    with pytest.raises(ApiError, match="not currently held"):
        await plugin.admit(admission(BUILDER, ROLE_BINDINGS, {**old, "subjects": [subject("eve")]}, old))


@pytest.mark.parametrize(("verb", "resource"), [("bind", ROLE_BINDINGS), ("escalate", ROLES)])
async def test_the_verbs_that_lift_it(cluster: Objects, rbac: Rbac, verb: str, resource: Resource) -> None:
    obj = {
        "roleRef": {"kind": "ClusterRole", "name": "cluster-admin"},
        "rules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
    }
    rule = bootstrap.rule(verb, "rbac.authorization.k8s.io", "roles clusterroles")
    cluster.put(CLUSTER_ROLES, "lift", rules=[rule])
    plugin = GrantsWithinOwn(rbac, rbac)
    with pytest.raises(ApiError):
        await plugin.admit(admission(BUILDER, resource, obj))
    bind(cluster, "lift", "ci/builder", namespace="ci")
    await plugin.admit(admission(BUILDER, resource, obj))


WORDS = st.frozensets(st.sampled_from(["a", "b", "*"]), max_size=2)
RESOURCES = st.frozensets(st.sampled_from(["p", "q", "p/s", "*/s", "*"]), max_size=3)
RULES = st.builds(Rule, WORDS, WORDS, RESOURCES, st.frozensets(st.sampled_from(["x", "y"]), max_size=2))


@given(st.lists(RULES, max_size=3), RULES)
def test_what_covers_a_rule_allows_all_that_it_allows(held: list[Rule], wanted: Rule) -> None:
    if rules.lacking(held, [wanted]):
        return
    who = user("u")
    for verb in "abc":
        for group in "abc":
            for what in ("p", "q", "p/s", "q/s", "r"):
                for name in ("", "x", "z"):
                    asked = attributes(who, verb, f"{what}.{group}", f"ns/{name}")
                    if wanted.allows(asked):
                        assert any(rule.allows(asked) for rule in held)


def test_a_rule_is_shown_as_upstream_does() -> None:
    rule = Rule.of({"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods"]})
    assert rule.shown() == '{APIGroups:[""], Resources:["pods"], Verbs:["get", "list"]}'
    assert Rule.of({"verbs": ["*"], "nonResourceURLs": ["*"]}).shown() == '{NonResourceURLs:["*"], Verbs:["*"]}'


@given(RULES)
def test_a_rule_covers_itself(rule: Rule) -> None:
    assert not rules.lacking([rule], [rule])
    assert Rule.of(rule.render()) == rule


def test_bootstrap_is_complete_and_adds_only_what_is_missing() -> None:
    role = next(r for r in bootstrap.cluster_roles() if r["metadata"]["name"] == "view")
    assert bootstrap.completed(role, role) is None
    mine = {"verbs": ["get"], "apiGroups": ["mine"], "resources": ["x"]}
    less = {**role, "rules": [role["rules"][0], mine]}
    fixed = bootstrap.completed(role, less)
    assert fixed is not None
    assert mine in fixed["rules"]
    assert not rules.lacking(rules.parse(fixed["rules"]), rules.parse(role["rules"]))
    hands_off = {**less, "metadata": {**role["metadata"], "annotations": {bootstrap.AUTOUPDATE: "false"}}}
    assert bootstrap.completed(role, hands_off) is None


def test_every_binding_names_a_role() -> None:
    names = {r["metadata"]["name"] for r in bootstrap.cluster_roles()}
    assert {b["roleRef"]["name"] for b in bootstrap.cluster_role_bindings()} <= names


def test_reviews(rbac: Rbac) -> None:
    spec = {
        "user": "dan",
        "groups": ["dev"],
        "resourceAttributes": {"verb": "create", "resource": "pods", "namespace": "shop"},
    }
    assert reviews.access_review(rbac, {"spec": spec})["status"]["allowed"] is True
    assert reviews.access_review(rbac, {"spec": spec | {"groups": []}})["status"] == {"allowed": False}
    can_i = {"spec": {"nonResourceAttributes": {"verb": "get", "path": "/healthz"}}}
    assert reviews.self_access_review(rbac, NINA, can_i)["status"]["allowed"] is True
    for bad in ({}, {"user": "x"}, {"user": "x", "resourceAttributes": {}, "nonResourceAttributes": {}}):
        with pytest.raises(ApiError):
            reviews.access_review(rbac, {"spec": bad})
    with pytest.raises(ApiError, match="must match the namespace"):
        reviews.access_review(rbac, {"spec": spec}, namespace="other")


def test_rules_review_lists_all(rbac: Rbac) -> None:
    status = reviews.rules_review(rbac, NINA, {"spec": {"namespace": "shop"}})["status"]
    assert {
        "verbs": ["get", "update"],
        "apiGroups": [""],
        "resources": ["configmaps"],
        "resourceNames": ["one"],
    } in status["resourceRules"]
    assert any("/healthz" in rule["nonResourceURLs"] for rule in status["nonResourceRules"])
    every = reviews.rules_review(rbac, ROOT, {"spec": {"namespace": "x"}})["status"]["resourceRules"]
    assert {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]} in every


def test_impersonation(cluster: Objects, rbac: Rbac) -> None:
    chain = Chain((Masters(), rbac))
    as_vera = reviews.impersonated(chain, ROOT, {"impersonate-user": "vera"}, ("a",))
    assert as_vera == User("vera", ("a", AUTHENTICATED))
    account = reviews.impersonated(chain, BUILDER, {"impersonate-user": "system:serviceaccount:ci:default"})
    assert "system:serviceaccounts:ci" in account.groups
    assert reviews.impersonated(chain, NINA, {}) is NINA
    for headers, groups in (({"impersonate-user": "vera"}, ()), ({}, ("system:masters",))):
        with pytest.raises(ApiError):
            reviews.impersonated(chain, NINA, headers, groups)
