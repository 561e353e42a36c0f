"""The server that the API server (and people with rights on ``nodes/proxy``) reach this node by: a kubelet's routes."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from pathlib import Path

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, generate_latest

from hypervisor.controller.api_errors import errors, note_started
from hypervisor.controller.api_sessions import in_session
from hypervisor.controller.metrics import add_metrics_route
from hypervisor.controller.node.callers import Callers
from hypervisor.controller.node.certificate import ServingCertificate
from hypervisor.controller.node.config import NodeConfig
from hypervisor.controller.node.mirrors import NodePods
from hypervisor.controller.node.stats import NodeStats, resource_metrics
from hypervisor.controller.pods import Pods
from hypervisor.controller.podvm import PodVm
from hypervisor.errors import InvalidInput
from hypervisor.introspect.routes import add_routes

DRAIN_S = 1.0
MAX_REQUEST_LINE = 8 * 1024 * 1024
RETRY_S = 5.0


def kubelet_app(pods: Pods, callers: Callers, node: str, folder: Path) -> web.Application:
    """The application. Errors outermost, so that a refusal is a Status too.

    :param node: the node's name
    :param folder: where its pods' disks and its images lie
    """
    stats, registry = NodeStats(pods, node, folder), own_metrics(pods)
    named = NodePods(pods, node)
    app = web.Application(middlewares=[errors, callers.middleware(), in_session(named)], client_max_size=0)
    app.on_response_prepare.append(note_started)
    add_routes(app, named)
    add_metrics_route(app, pods)

    async def all_pods(_: web.Request) -> web.Response:
        return _pod_list(pods)

    async def running_pods(_: web.Request) -> web.Response:
        return _pod_list(p for p in pods if p.machine is not None)

    async def summary(_: web.Request) -> web.Response:
        return web.json_response(await stats.summary())

    async def resource(_: web.Request) -> web.Response:
        return _text(resource_metrics(await stats.summary()))

    async def own(_: web.Request) -> web.Response:
        return _text(generate_latest(registry))

    app.router.add_get("/stats/summary", summary)
    app.router.add_get("/metrics/resource", resource)
    app.router.add_get("/metrics", own)
    app.router.add_get("/pods", all_pods)
    app.router.add_get("/runningpods/", running_pods)
    app.router.add_get("/runningpods", running_pods)
    return app


def own_metrics(pods: Pods) -> CollectorRegistry:
    """What the daemon counts of itself."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    known = Gauge("kubelet_active_pods", "Pods that this node has, ended ones included", registry=registry)
    known.set_function(lambda: sum(1 for _ in pods))
    running = Gauge("kubelet_running_pods", "Pods that have a VM", registry=registry)
    running.set_function(lambda: sum(1 for p in pods if p.machine is not None))
    return registry


def _text(body: bytes) -> web.Response:
    return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


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
