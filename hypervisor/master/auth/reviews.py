"""Answers of the review kinds: TokenReview, SubjectAccessReview with its Self and Local forms, SelfSubjectRulesReview,
SelfSubjectReview. Each takes the object that a client posted and returns it with its status.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypervisor.kube.errors import ApiError, bad_request
from hypervisor.master.auth.authn import Authenticator
from hypervisor.master.auth.authorizer import Authorizer
from hypervisor.master.auth.rbac import Rbac
from hypervisor.master.auth.rules import ALL, Rule
from hypervisor.master.auth.tokens import BadToken
from hypervisor.master.auth.user import SYSTEM_MASTERS, Attributes, User

Object = dict[str, Any]


def token_review(authenticator: Authenticator, review: Mapping[str, Any]) -> Object:
    """Whose ``spec.token`` is."""
    spec = review.get("spec") or {}
    if not spec.get("token"):
        raise bad_request("token is required for TokenReview in authentication")
    try:
        verified = authenticator.review(spec["token"], spec.get("audiences") or ())
    except BadToken as error:
        return {**review, "status": {"authenticated": False, "error": str(error)}}
    status = {"authenticated": True, "user": render_user(verified.user), "audiences": list(verified.audiences)}
    return {**review, "status": status}


def self_subject_review(user: User, review: Mapping[str, Any]) -> Object:
    """Who asks: `kubectl auth whoami`."""
    return {**review, "status": {"userInfo": render_user(user)}}


def render_user(user: User) -> Object:
    """A ``UserInfo``."""
    info: Object = {"username": user.name, "groups": list(user.groups)}
    info |= {"uid": user.uid} if user.uid else {}
    return info | ({"extra": {k: list(v) for k, v in user.extra.items()}} if user.extra else {})


def access_review(authorizer: Authorizer, review: Mapping[str, Any], *, namespace: str = "") -> Object:
    """May ``spec.user`` do it.

    :param namespace: of a LocalSubjectAccessReview, which may ask about this one only
    """
    spec = review.get("spec") or {}
    if not spec.get("user") and not spec.get("groups"):
        raise bad_request("spec.user: at least one of user or group must be specified")
    asked_in = (spec.get("resourceAttributes") or {}).get("namespace") or ""
    if namespace and asked_in != namespace:
        raise bad_request(f"spec.resourceAttributes.namespace: must match the namespace of the request, {namespace!r}")
    extra = {key: tuple(values) for key, values in (spec.get("extra") or {}).items()}
    user = User(spec.get("user") or "", tuple(spec.get("groups") or ()), spec.get("uid") or "", extra)
    return _reviewed(authorizer, user, review)


def self_access_review(authorizer: Authorizer, user: User, review: Mapping[str, Any]) -> Object:
    """May the one who asks do it: `kubectl auth can-i`."""
    return _reviewed(authorizer, user, review)


def _reviewed(authorizer: Authorizer, user: User, review: Mapping[str, Any]) -> Object:
    decision = authorizer.decide(_attributes(user, review.get("spec") or {}))
    status: Object = {"allowed": decision.allowed}
    status |= {"denied": True} if decision.denied else {}
    return {**review, "status": status | ({"reason": decision.reason} if decision.reason else {})}


def _attributes(user: User, spec: Mapping[str, Any]) -> Attributes:
    resource, other = spec.get("resourceAttributes"), spec.get("nonResourceAttributes")
    if (resource is None) == (other is None):
        raise bad_request("spec: exactly one of nonResourceAttributes or resourceAttributes must be specified")
    if other is not None:
        return Attributes(user, other.get("verb") or "", path=other.get("path") or "/")
    fields = ("verb", "group", "version", "resource", "subresource", "namespace", "name")
    return Attributes(user, *((resource or {}).get(field) or "" for field in fields))


def rules_review(rbac: Rbac, user: User, review: Mapping[str, Any]) -> Object:
    """All that the one who asks may do in a namespace: `kubectl auth can-i --list`.

    What a node may do beyond its roles depends on each object: the answer then says that it is incomplete.
    """
    namespace = (review.get("spec") or {}).get("namespace") or ""
    if not namespace:
        raise bad_request("no namespace on request")
    held = list(rbac.rules_for(user, namespace))
    if SYSTEM_MASTERS in user.groups:
        every = frozenset((ALL,))
        held = [Rule(every, every, every), Rule(every, urls=every), *held]
    status: Object = {
        "resourceRules": [rule.render() for rule in dict.fromkeys(held) if not rule.urls],
        "nonResourceRules": [rule.render() for rule in dict.fromkeys(held) if rule.urls],
        "incomplete": bool(user.node_name),
    }
    if user.node_name:
        status["evaluationError"] = "what a node may do depends on the pods that are bound to it"
    return {**review, "status": status}


def impersonated(authorizer: Authorizer, user: User, headers: Mapping[str, str], groups: tuple[str, ...] = ()) -> User:
    """Who the request is to be treated as: `kubectl --as`.

    :param headers: of the request, names in lower case
    :param groups: every ``Impersonate-Group``
    :raises ApiError: Forbidden: the verb ``impersonate`` on one of these is not the user's
    """
    from hypervisor.master.auth.authorizer import check

    name, uid = headers.get("impersonate-user", ""), headers.get("impersonate-uid", "")
    if not name:
        if groups or uid:
            raise ApiError("BadRequest", "groups and uids can be impersonated only together with a user")
        return user
    prefix = "system:serviceaccount:"
    if name.startswith(prefix) and name.count(":") == 3:
        namespace, account = name.removeprefix(prefix).split(":")
        check(authorizer, Attributes(user, "impersonate", "", "v1", "serviceaccounts", "", namespace, account))
        groups = groups or ("system:serviceaccounts", f"system:serviceaccounts:{namespace}")
    else:
        check(authorizer, Attributes(user, "impersonate", "", "v1", "users", name=name))
        for group in groups:
            check(authorizer, Attributes(user, "impersonate", "", "v1", "groups", name=group))
    if uid:
        check(authorizer, Attributes(user, "impersonate", "authentication.k8s.io", "v1", "uids", name=uid))
    anonymous = name == "system:anonymous"
    last = "system:unauthenticated" if anonymous else "system:authenticated"
    return User(name, (*(g for g in groups if g != last), last), uid)
