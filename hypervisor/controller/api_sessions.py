"""Whoever reads from a pod's VM keeps it from going off for a while after the pod has ended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from aiohttp import web
from aiohttp.typedefs import Middleware

from hypervisor.controller.podvm import PodVm
from hypervisor.errors import HvError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Named(Protocol):
    """Pods by their names."""

    def get(self, namespace: str, name: str) -> PodVm:
        """:raises NotFound: there is no such pod"""


def in_session(pods: Named) -> Middleware:
    """A middleware that holds a session of the pod in the request's path while the request is handled."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        where = request.match_info
        # A watch counts: hv run watches until it has joined the streams, else the VM of a quick pod would be gone.
        if "pod" not in where or (request.path.startswith("/hv/") and "watch" not in request.query):
            return await handler(request)
        try:
            pod = pods.get(where["namespace"], where["pod"])
        except HvError:
            return await handler(request)
        with pod.session():
            return await handler(request)

    return middleware
