"""The routes that a kubelet serves: health, logs, exec, attach and port-forward.

Whoever owns the application authenticates before these are reached, and turns `HvError` into a Status body.
The walk of each: request -> command (`commands`) -> which VM (`target`) -> agent over vsock (`agent`) -> streams
(`session` over `websocket` or `spdy`; `portforward`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web
from multidict import MultiMapping

from hypervisor.agent.wire import FrameType
from hypervisor.errors import InvalidInput, Unavailable
from hypervisor.introspect import run, session, websocket
from hypervisor.introspect.agent import AgentClient, AgentStream
from hypervisor.introspect.archived import read_archived
from hypervisor.introspect.commands import (
    AttachCommand,
    DebugCommand,
    ExecCommand,
    LogsCommand,
    StreamCommand,
    query_of,
)
from hypervisor.introspect.portforward import spdy as forward_spdy
from hypervisor.introspect.portforward import websocket as forward_websocket
from hypervisor.introspect.spdy import channels, upgrade
from hypervisor.introspect.target import PodLookup, PodTarget

PODS: web.AppKey[PodLookup] = web.AppKey("pods")


def add_routes(app: web.Application, pods: PodLookup) -> None:
    """Adds the kubelet's routes to `app`; pods are found through `pods`."""
    app[PODS] = pods
    app.router.add_get("/healthz", _healthz)
    app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", _logs)
    for method in ("GET", "POST"):
        for tail in ("{namespace}/{pod}/{container}", "{namespace}/{pod}/{uid}/{container}"):
            app.router.add_route(method, f"/exec/{tail}", _exec)
            app.router.add_route(method, f"/attach/{tail}", _attach)
        for tail in ("{namespace}/{pod}", "{namespace}/{pod}/{uid}"):
            app.router.add_route(method, f"/portForward/{tail}", _port_forward)
        app.router.add_route(method, "/debug/{namespace}/{pod}", _debug)
    for tail in ("{namespace}/{pod}/{container}", "{namespace}/{pod}/{uid}/{container}"):
        app.router.add_post(f"/run/{tail}", _run)


async def _healthz(_request: web.Request) -> web.Response:
    return web.Response(text="ok")


def _target(request: web.Request) -> tuple[PodTarget, str]:
    where = request.match_info
    target = request.app[PODS].find(where["namespace"], where["pod"])
    return target, target.container(where["container"])


def _query(request: web.Request) -> MultiMapping[str]:
    return query_of(request.rel_url.raw_query_string)


def _agent(target: PodTarget) -> AgentClient:
    if target.address is None:
        raise Unavailable(f"pod {target.name} {target.detail}")
    return AgentClient(target.address)


async def _exec(request: web.Request) -> web.StreamResponse:
    target, container = _target(request)
    return await _stream(request, target, ExecCommand.parse(container, _query(request)))


async def _attach(request: web.Request) -> web.StreamResponse:
    target, container = _target(request)
    return await _stream(request, target, AttachCommand.parse(container, _query(request)))


async def _debug(request: web.Request) -> web.StreamResponse:
    where = request.match_info
    target = request.app[PODS].find(where["namespace"], where["pod"])
    return await _stream(request, target, DebugCommand.parse(_query(request)))


async def _run(request: web.Request) -> web.StreamResponse:
    """A command's whole output, without a stream: what a kubelet's ``/run`` is."""
    target, container = _target(request)
    command = ExecCommand(container, run.parse(_query(request)), stdin=False, stdout=True, stderr=True, tty=False)
    call, args = command.agent_request()
    async with _agent(target).stream(call, args) as agent:
        return web.Response(body=await run.output(agent), content_type="text/plain")


async def _stream(request: web.Request, target: PodTarget, command: StreamCommand) -> web.StreamResponse:
    """The agent is asked first: what it refuses becomes an HTTP error that the client can read, not a broken stream."""
    if upgrade.wanted(request):
        return await _stream_spdy(request, target, command)
    if not set(websocket.offered(request)) & set(websocket.PROTOCOLS):
        raise InvalidInput(
            f"upgrade to {upgrade.UPGRADE}, or to a WebSocket with one of the subprotocols "
            f"{', '.join(websocket.PROTOCOLS)}",
            where="Sec-WebSocket-Protocol",
        )
    call, args = command.agent_request()
    async with _agent(target).stream(call, args) as agent:
        async with websocket.accept(request, websocket.PROTOCOLS) as socket:
            await session.run(websocket.WebSocketChannels(socket), agent, command.ending)
        return socket


async def _stream_spdy(request: web.Request, target: PodTarget, command: StreamCommand) -> web.StreamResponse:
    upgrade.agree(request, channels.PROTOCOLS)
    call, args = command.agent_request()
    async with (
        _agent(target).stream(call, args) as agent,
        upgrade.accept(request, channels.PROTOCOLS) as (transport, protocol),
    ):
        await channels.serve(transport, protocol, command, agent)
    return web.Response()  # not sent: the connection was another protocol's, and has ended


async def _port_forward(request: web.Request) -> web.StreamResponse:
    where = request.match_info
    agent = _agent(request.app[PODS].find(where["namespace"], where["pod"]))
    if upgrade.wanted(request):
        async with upgrade.accept(request, (forward_spdy.PROTOCOL,)) as (transport, _):
            await forward_spdy.serve(transport, agent)
        return web.Response()  # as above
    return await forward_websocket.serve(request, agent)


async def _logs(request: web.Request) -> web.StreamResponse:
    target, container = _target(request)
    command = LogsCommand.parse(container, _query(request))
    if target.address is None and target.archived_logs is not None:
        return await _send_text(request, read_archived(target.archived_logs, command))
    call, args = command.agent_request()
    async with _agent(target).stream(call, args) as agent:
        return await _send_text(request, _stdout(agent))


async def _stdout(agent: AgentStream) -> AsyncIterator[bytes]:
    async for frame in agent.frames():
        if frame.type is FrameType.STDOUT:
            yield frame.payload


async def _send_text(request: web.Request, chunks: AsyncIterator[bytes]) -> web.StreamResponse:
    """The first chunk is awaited before the answer begins: an error up to there is an HTTP error."""
    first = await anext(chunks, b"")
    response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
    await response.prepare(request)
    if first:
        await response.write(first)
    async for chunk in chunks:
        await response.write(chunk)
    await response.write_eof()
    return response
