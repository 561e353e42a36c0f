"""``pods/log``, ``exec``, ``attach``, ``debug`` and ``portforward``, passed to the node; ``nodes/proxy``, to a node."""

from __future__ import annotations

from urllib.parse import quote

from aiohttp import web

from hypervisor.kube.errors import bad_request
from hypervisor.kube.resources import NODES
from hypervisor.master.api import kubelet
from hypervisor.master.api.exchange import Exchange, not_allowed

_OF_PODS = frozenset(("debug", "portforward"))
"""Those that are about a pod, and none of its containers."""


async def to_node(exchange: Exchange) -> web.StreamResponse:
    """Any of them: authorized already; admission is asked, then the node."""
    call, info, request = exchange.call(), exchange.info, exchange.request
    if info.verb not in ("get", "create") or (call.subresource == "log" and info.verb != "get"):
        raise not_allowed()
    inside = exchange.inside
    pod = (await inside.objects.registry.entry(call.kind, call.namespace, call.name)).obj
    wanted = info.query.get("container", "")
    container = "" if call.subresource in _OF_PODS else kubelet.container_of(pod, wanted)
    await inside.objects.connect(call)
    name = kubelet.node_of(pod)
    node = inside.objects.registry.peek(inside.kinds.of(NODES), "", name)
    if node is None:
        raise kubelet.no_node(name)
    address = inside.kubelets.address(node.obj)
    target = kubelet.target_of(pod, call.subresource, container, request.rel_url.raw_query_string)
    if call.subresource == "log":
        return await inside.kubelets.relay(request, address, target)
    if "upgrade" not in request.headers.get("Connection", "").lower() or not request.headers.get("Upgrade"):
        raise bad_request(f"{call.subresource} needs an upgrade of the connection to WebSocket or SPDY/3.1")
    inside.audit.began(request, info, exchange.user)
    return await inside.kubelets.splice(request, address, target)


async def proxy(exchange: Exchange) -> web.StreamResponse:
    """A request to one of the node's own routes (``/stats/summary``, ``/pods``, ...), as the API server."""
    call, info, request = exchange.call(), exchange.info, exchange.request
    inside = exchange.inside
    node = await inside.objects.registry.entry(call.kind, "", call.name)
    await inside.objects.connect(call)
    query = request.rel_url.raw_query_string
    target = f"/{quote(info.rest)}" + (f"?{query}" if query else "")
    address = inside.kubelets.address(node.obj)
    if "upgrade" in request.headers.get("Connection", "").lower():
        return await inside.kubelets.splice(request, address, target)
    return await inside.kubelets.relay(request, address, target, await exchange.body())
