"""The daemon's HTTP application: authentication, errors, and everybody's routes."""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from hypervisor.controller.api_errors import errors, note_started, status_object
from hypervisor.controller.api_images import add_image_routes
from hypervisor.controller.api_pods import add_pod_routes
from hypervisor.controller.api_sessions import in_session
from hypervisor.controller.api_streams import flag
from hypervisor.controller.livedisks import add_disk_routes
from hypervisor.controller.metrics import add_metrics_route
from hypervisor.controller.pods import Pods
from hypervisor.controller.static_pods import StaticPods
from hypervisor.controller.top import usage
from hypervisor.images.store import ImageStore
from hypervisor.introspect.routes import add_routes as add_kubelet_routes
from hypervisor.version import __version__

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

OPEN_PATHS = frozenset({"/healthz"})
"""Answered without a token."""


@dataclass(frozen=True)
class Host:
    """What the application serves.

    :ivar stop: asks the daemon to end; True: its pods are to be removed first
    """

    token: str
    state_dir: str
    pods: Pods
    static: StaticPods
    images: ImageStore
    stop: Callable[[bool], None]


HOST = web.AppKey("host", Host)


def make_app(host: Host) -> web.Application:
    """The application. Errors outermost, so that a refused token is a Status too."""
    app = web.Application(middlewares=[errors, _authenticated, in_session(host.pods)], client_max_size=0)
    app[HOST] = host
    app.on_response_prepare.append(note_started)
    add_pod_routes(app, host.pods)
    add_image_routes(app, host.images)
    add_kubelet_routes(app, host.pods)
    add_metrics_route(app, host.pods)
    app.router.add_get("/hv/v1/version", _version)
    app.router.add_get("/hv/v1/host", _host)
    app.router.add_post("/hv/v1/host/stop", _stop)
    app.router.add_get("/hv/v1/top", _top)
    add_disk_routes(app, host.pods)
    return app


@web.middleware
async def _authenticated(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.path not in OPEN_PATHS:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        expected = request.app[HOST].token.encode()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("utf-8", "replace"), expected):
            body = status_object(401, "Unauthorized", "send the token of the host's state directory as a bearer token")
            return web.json_response(body, status=401, headers={"WWW-Authenticate": "Bearer"})
    return await handler(request)


async def _version(_request: web.Request) -> web.Response:
    return web.json_response({"version": __version__, "pid": os.getpid()})


async def _host(request: web.Request) -> web.Response:
    host = request.app[HOST]
    body: dict[str, Any] = {
        "version": __version__,
        "pid": os.getpid(),
        "state_dir": host.state_dir,
        "pods": sum(1 for _ in host.pods),
        "static_pods": {"broken": [{"file": f, "error": e} for f, e in sorted(host.static.broken.items())]},
    }
    return web.json_response(body)


async def _stop(request: web.Request) -> web.Response:
    """With ``pods=1`` answers when the pods have gone. The daemon ends after the answer."""
    host = request.app[HOST]
    pods = flag(request, "pods")
    if pods:
        host.stop(True)
        await asyncio.shield(host.pods.remove_all())
    host.stop(False)
    return web.json_response({"stopping": True})


async def _top(request: web.Request) -> web.Response:
    return web.json_response(await usage(request.app[HOST].pods))
