"""The server that the API server (and people with rights on ``nodes/proxy``) reach this node by: a kubelet's routes."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable

import structlog
from aiohttp import web

from hypervisor.controller.api_errors import errors, note_started
from hypervisor.controller.api_sessions import in_session
from hypervisor.controller.metrics import add_metrics_route
from hypervisor.controller.node.callers import Callers
from hypervisor.controller.node.certificate import ServingCertificate
from hypervisor.controller.node.config import NodeConfig
from hypervisor.controller.pods import Pods
from hypervisor.controller.podvm import PodVm
from hypervisor.errors import InvalidInput
from hypervisor.introspect.routes import add_routes

DRAIN_S = 1.0
MAX_REQUEST_LINE = 8 * 1024 * 1024
RETRY_S = 5.0


def kubelet_app(pods: Pods, callers: Callers) -> web.Application:
    """The application. Errors outermost, so that a refusal is a Status too."""
    app = web.Application(middlewares=[errors, callers.middleware(), in_session(pods)], client_max_size=0)
    app.on_response_prepare.append(note_started)
    add_routes(app, pods)
    add_metrics_route(app, pods)

    async def all_pods(_: web.Request) -> web.Response:
        return _pod_list(pods)

    async def running_pods(_: web.Request) -> web.Response:
        return _pod_list(p for p in pods if p.machine is not None)

    app.router.add_get("/pods", all_pods)
    app.router.add_get("/runningpods/", running_pods)
    app.router.add_get("/runningpods", running_pods)
    return app


def _pod_list(pods: Iterable[PodVm]) -> web.Response:
    items = [pod.view() for pod in pods]
    return web.json_response({"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": items})


async def serve_kubelet(app: web.Application, config: NodeConfig, certificate: ServingCertificate, ca: bytes) -> None:
    """Serves for ever, from the first certificate on; a port that is taken is tried again.

    :param ca: PEM certificates that callers' certificates must come from; a caller need not have one
    """
    await certificate.wait_ready()
    context = certificate.context
    try:
        context.load_verify_locations(cadata=ca.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError) as e:
        raise InvalidInput(f"the certificate authority of callers cannot be read ({e})") from e
    context.verify_mode = ssl.CERT_OPTIONAL
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=DRAIN_S, max_line_size=MAX_REQUEST_LINE
    )
    await runner.setup()
    try:
        await _listen(web.TCPSite(runner, config.address, config.port, ssl_context=context, backlog=1024), config)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


async def _listen(site: web.TCPSite, config: NodeConfig) -> None:
    log = structlog.get_logger()
    while True:
        try:
            await site.start()
        except OSError as e:
            log.error("cannot listen; will be tried again", address=config.address, port=config.port, error=str(e))
            await asyncio.sleep(RETRY_S)
        else:
            log.info("kubelet's server listens", address=config.address, port=config.port)
            return
