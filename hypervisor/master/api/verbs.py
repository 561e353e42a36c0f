"""The verbs over HTTP: from an exchange to a call, and its result back."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from hypervisor.kube.client import Propagation
from hypervisor.kube.errors import ApiError, bad_request
from hypervisor.kube.selectors import parse_fields, parse_labels
from hypervisor.master.api import encode, fit, patching
from hypervisor.master.api.call import Call, dry_run
from hypervisor.master.api.exchange import Exchange
from hypervisor.master.api.negotiate import JSON, not_acceptable
from hypervisor.master.api.objects import shown
from hypervisor.master.registry.deletion import DeleteOptions
from hypervisor.master.registry.listing import Listing

_PROPAGATION: tuple[Propagation, ...] = ("Background", "Foreground", "Orphan")


async def get(exchange: Exchange) -> web.StreamResponse:
    """GET of one object; the usual form is sent as it lies in memory."""
    form, call = exchange.form(), exchange.call()
    objects = exchange.inside.objects
    version = exchange.info.query.get("resourceVersion", "")
    entry = await objects.registry.entry(objects.kept(call.kind), call.namespace, call.name, resource_version=version)
    if not form.as_ and not form.indent and form.media == JSON and call.kind.kept_as is None:
        return exchange.raw(entry.body)
    return exchange.one(shown(call.kind, entry.obj), call=call)


async def list_(exchange: Exchange) -> web.StreamResponse:
    """GET of a collection."""
    form, call, query = exchange.form(), exchange.call(), exchange.info.query
    objects, kind = exchange.inside.objects, call.kind
    listing = await objects.registry.list(
        objects.kept(kind),
        call.namespace,
        label=parse_labels(query.get("labelSelector", "")),
        field=parse_fields(query.get("fieldSelector", "")),
        limit=exchange.info.number("limit"),
        continuation=query.get("continue", ""),
        resource_version=query.get("resourceVersion", ""),
        match=query.get("resourceVersionMatch", ""),  # type: ignore[arg-type]  # checked by the registry
    )
    if not form.as_ and not form.indent and form.media == JSON and kind.kept_as is None:
        return await exchange.large(listing.encode(kind), form.media)
    return await exchange.large(encode.render(_shaped(exchange, listing), form), form.media)


def _shaped(exchange: Exchange, listing: Listing) -> dict[str, Any]:
    form, kind = exchange.form(), exchange.kind
    items = [shown(kind, entry.obj) for entry in listing.entries]
    metadata = list_metadata(listing)
    if form.as_ == "Table":
        include = encode.include_object(exchange.info.query.get("includeObject", ""))
        return encode.table(kind, items, metadata, version=form.version, include=include)
    if form.as_ == "PartialObjectMetadataList":
        return encode.partial_list(items, metadata, form.version)
    if form.as_:
        raise not_acceptable()
    head = {"kind": kind.list_kind, "apiVersion": kind.resource.api_version, "metadata": metadata}
    return head | {"items": items}


def list_metadata(listing: Listing) -> dict[str, Any]:
    """The metadata of a list."""
    metadata: dict[str, Any] = {"resourceVersion": str(listing.revision)}
    metadata |= {"continue": listing.continuation} if listing.continuation else {}
    return metadata | ({"remainingItemCount": listing.remaining} if listing.remaining is not None else {})


async def create(exchange: Exchange) -> web.StreamResponse:
    """POST to a collection."""
    call = exchange.call()
    exchange.form()
    obj, doubles = fit.decode_object(await exchange.body(), exchange.content_type)
    fit.note_doubles(call, doubles)
    made = await exchange.inside.objects.create(call, obj)
    return exchange.one(made, 201, call)


async def update(exchange: Exchange) -> web.StreamResponse:
    """PUT."""
    call = exchange.call()
    exchange.form()
    obj, doubles = fit.decode_object(await exchange.body(), exchange.content_type)
    fit.note_doubles(call, doubles)
    new, made = await exchange.inside.objects.update(call, obj)
    return exchange.one(new, 201 if made else 200, call)


async def patch(exchange: Exchange) -> web.StreamResponse:
    """PATCH."""
    call = exchange.call()
    exchange.form()
    parsed = await read_patch(exchange, call)
    new, made = await exchange.inside.objects.patch(call, parsed)
    return exchange.one(new, 201 if made else 200, call)


async def read_patch(exchange: Exchange, call: Call) -> patching.Patch:
    """The request's patch."""
    info = exchange.info
    return patching.parse(
        call,
        await exchange.body(),
        exchange.content_type,
        force=info.flag("force"),
        manager=info.query.get("fieldManager", ""),
    )


async def delete(exchange: Exchange) -> web.StreamResponse:
    """DELETE of one object: the object while something still holds it, else a Status."""
    call = exchange.call()
    options = await read_delete_options(exchange)
    deleted = await exchange.inside.objects.delete(call, options)
    resource = call.kind.resource
    if not deleted.removed or resource.qualified == "pods":
        return exchange.one(deleted.object, call=call)
    details = {"name": call.name, "kind": resource.plural, "uid": deleted.object["metadata"]["uid"]}
    details |= {"group": resource.group} if resource.group else {}
    return exchange.value(encode.success(details=details))


async def delete_collection(exchange: Exchange) -> web.StreamResponse:
    """DELETE of a collection: the list of what it was."""
    call, query = exchange.call(), exchange.info.query
    options = await read_delete_options(exchange)
    label, field = parse_labels(query.get("labelSelector", "")), parse_fields(query.get("fieldSelector", ""))
    items = await exchange.inside.objects.delete_collection(call, options, label, field)
    kind = call.kind
    revision = str(exchange.inside.objects.registry.revision)
    head = {"kind": kind.list_kind, "apiVersion": kind.resource.api_version}
    return exchange.value(head | {"metadata": {"resourceVersion": revision}, "items": items})


async def read_delete_options(exchange: Exchange) -> DeleteOptions:
    """From the body, or from the query.

    :raises ApiError: they are none
    """
    info = exchange.info
    given: dict[str, Any] = {}
    body = await exchange.body()
    if body.strip():
        given, _ = fit.decode_object(body, exchange.content_type)
    for key in ("gracePeriodSeconds",):
        if key in info.query and key not in given:
            given[key] = info.number(key)
    if "propagationPolicy" in info.query:
        given.setdefault("propagationPolicy", info.query["propagationPolicy"])
    if info.flag("orphanDependents") or given.get("orphanDependents"):
        given.setdefault("propagationPolicy", "Orphan")
    return delete_options(given, dry=dry_run(info.query.get("dryRun", "")))


def delete_options(given: dict[str, Any], *, dry: bool) -> DeleteOptions:
    """``DeleteOptions`` as JSON has them.

    :raises ApiError: they are none
    """
    kind = given.get("kind", "DeleteOptions")
    if kind != "DeleteOptions":
        raise bad_request(f"the body of a delete must be DeleteOptions, not {kind}")
    grace = given.get("gracePeriodSeconds")
    if grace is not None and (not isinstance(grace, int) or isinstance(grace, bool) or grace < 0):
        raise _invalid_options("gracePeriodSeconds must be a whole number, 0 or more")
    propagation = given.get("propagationPolicy")
    if propagation is not None and propagation not in _PROPAGATION:
        raise _invalid_options(f"propagationPolicy must be one of {', '.join(_PROPAGATION)}")
    conditions = given.get("preconditions") or {}
    if not isinstance(conditions, dict):
        raise _invalid_options("preconditions must be an object")
    return DeleteOptions(
        grace,
        propagation,
        str(conditions.get("uid") or ""),
        str(conditions.get("resourceVersion") or ""),
        dry or "All" in (given.get("dryRun") or ()),
    )


def _invalid_options(why: str) -> ApiError:
    return ApiError("Invalid", f"DeleteOptions.meta.k8s.io is invalid: {why}")
