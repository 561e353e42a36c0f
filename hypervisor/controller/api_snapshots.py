"""Suspending, snapshots and forks over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from hypervisor.controller.api_streams import number
from hypervisor.controller.forks import MAX_CHILDREN, fork
from hypervisor.controller.pods import Pods
from hypervisor.controller.podvm import PodVm

Find = Callable[[web.Request], PodVm]


def add_snapshot_routes(app: web.Application, pods: Pods, find: Find) -> None:
    """Adds them to `app`. `find` gives the pod that a request names."""
    one = "/hv/v1/pods/{namespace}/{pod}"
    routes = _Routes(pods, find)
    app.router.add_post(f"{one}/suspend", routes.suspend)
    app.router.add_post(f"{one}/resume", routes.resume)
    app.router.add_post(f"{one}/fork", routes.fork)
    app.router.add_get(f"{one}/snapshots", routes.list)
    app.router.add_post(f"{one}/snapshots/{{name}}", routes.create)
    app.router.add_delete(f"{one}/snapshots/{{name}}", routes.remove)
    app.router.add_post(f"{one}/snapshots/{{name}}/restore", routes.restore)


class _Routes:
    def __init__(self, pods: Pods, find: Find) -> None:
        self._pods = pods
        self._find = find

    async def suspend(self, request: web.Request) -> web.Response:
        pod = self._find(request)
        await asyncio.shield(pod.suspension.request("suspended"))
        return web.json_response(pod.view() | {"took": dict(pod.suspension.took)})

    async def resume(self, request: web.Request) -> web.Response:
        pod = self._find(request)
        await asyncio.shield(pod.suspension.request(""))
        return web.json_response(pod.view())

    async def fork(self, request: web.Request) -> web.Response:
        count = number(request, "count", maximum=MAX_CHILDREN)
        made = await asyncio.shield(fork(self._pods, self._find(request), 1 if count is None else count))
        return web.json_response(made, status=201)

    async def list(self, request: web.Request) -> web.Response:
        return web.json_response({"items": await self._find(request).snapshots.all()})

    async def create(self, request: web.Request) -> web.Response:
        pod, name = self._find(request), request.match_info["name"]
        took = await asyncio.shield(pod.snapshots.create(pod.machine, name))
        return web.json_response({"name": name, "took": dict(took)}, status=201)

    async def remove(self, request: web.Request) -> web.Response:
        await asyncio.shield(self._find(request).snapshots.remove(request.match_info["name"]))
        return web.Response(status=204)

    async def restore(self, request: web.Request) -> web.Response:
        pod = self._find(request)
        await asyncio.shield(pod.restore(request.match_info["name"]))
        return web.json_response(pod.view())
