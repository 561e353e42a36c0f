"""What lies below an object, over HTTP; and reviews, which are answered and not kept."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

from hypervisor.kube.client import Object
from hypervisor.kube.errors import ApiError
from hypervisor.master.api import fit, scale, verbs
from hypervisor.master.api.actions import ACTIONS
from hypervisor.master.api.exchange import Exchange, not_allowed
from hypervisor.master.api.streams import proxy, to_node
from hypervisor.master.auth import reviews

_STREAMS = frozenset(("log", "exec", "attach", "debug", "portforward"))
_PARTS = frozenset(("status", "approval", "finalize"))
_OF_PARTS: Mapping[str, Callable[[Exchange], Awaitable[web.StreamResponse]]] = {
    "get": verbs.get,
    "update": verbs.update,
    "patch": verbs.patch,
}


async def answer(exchange: Exchange) -> web.StreamResponse:
    """A request for a subresource that the kind has."""
    sub, verb = exchange.info.subresource, exchange.info.verb
    if sub in _STREAMS:
        return await to_node(exchange)
    if sub == "proxy":
        return await proxy(exchange)
    if sub in _PARTS:
        if verb not in _OF_PARTS:
            raise not_allowed()
        return await _OF_PARTS[verb](exchange)
    if sub == "scale":
        return await _scale(exchange)
    action = ACTIONS.get((exchange.kind.resource.qualified, sub))
    if action is not None and verb == "create":
        return await _act(exchange)
    if action is None:
        raise ApiError(
            "MethodNotAllowed",
            f"{exchange.info.plural}/{sub} is not served: pods run in VMs of their own, "
            "whose containers are fixed when they start",
        )
    raise not_allowed()


async def _act(exchange: Exchange) -> web.StreamResponse:
    call = exchange.call()
    body = await exchange.body()
    obj, doubles = fit.decode_object(body, exchange.content_type) if body else ({}, [])
    fit.note_doubles(call, doubles)
    action = ACTIONS[call.kind.resource.qualified, call.subresource]
    made = await action(exchange.inside, call, obj)
    return exchange.value(made, 201, call)


async def _scale(exchange: Exchange) -> web.StreamResponse:
    call, verb, objects = exchange.call(), exchange.info.verb, exchange.inside.objects
    if verb == "get":
        return exchange.one(scale.of(call.kind, await objects.get(call)))
    if verb == "update":
        given, _ = fit.decode_object(await exchange.body(), exchange.content_type)
        new = await scale.update(objects, call, given)
    elif verb == "patch":
        new = await scale.patch(objects, call, await verbs.read_patch(exchange, call))
    else:
        raise not_allowed()
    return exchange.one(new, call=call)


async def review(exchange: Exchange) -> web.StreamResponse:
    """POST of a review."""
    call, inside = exchange.call(), exchange.inside
    obj, doubles = fit.decode_object(await exchange.body(), exchange.content_type)
    fit.note_doubles(call, doubles)
    resource = call.kind.resource
    obj |= {"apiVersion": resource.api_version, "kind": resource.kind}
    obj.setdefault("metadata", {})
    fit.fit(call, inside.objects.schema.of(call.kind), obj)
    obj.pop("status", None)
    return exchange.value(_reviewed(exchange, obj), 201, call)


def _reviewed(exchange: Exchange, obj: Object) -> Any:
    inside, user, info = exchange.inside, exchange.user, exchange.info
    kind = exchange.kind.resource.kind
    if kind == "TokenReview":
        return reviews.token_review(inside.authenticator, obj)
    if kind == "SelfSubjectReview":
        return reviews.self_subject_review(user, obj)
    if kind == "SelfSubjectAccessReview":
        return reviews.self_access_review(inside.authorizer, user, obj)
    if kind == "SelfSubjectRulesReview":
        return reviews.rules_review(inside.rbac, user, obj)
    return reviews.access_review(inside.authorizer, obj, namespace=info.namespace)
