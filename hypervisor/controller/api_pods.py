"""Pods over HTTP: create, list, watch, stop, delete; console and archives."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from hypervisor.agent.wire import FrameType
from hypervisor.controller.api_snapshots import add_snapshot_routes
from hypervisor.controller.api_streams import NDJSON, flag, line, number, streaming
from hypervisor.controller.console import console_text, follow_console
from hypervisor.controller.inspect import inspect
from hypervisor.controller.manifest import MAX_GRACE_S, MAX_MANIFEST_BYTES
from hypervisor.controller.pods import Pods, target_of
from hypervisor.controller.podvm import PodVm
from hypervisor.controller.trace import MAX_SECONDS, trace
from hypervisor.errors import Conflict, InvalidInput, NotFound, Unavailable
from hypervisor.introspect.agent import AgentClient, AgentStream

PODS = web.AppKey("controller_pods", Pods)
MAX_CONSOLE_LINES = 1_000_000


def add_pod_routes(app: web.Application, pods: Pods) -> None:
    """Adds them to `app`."""
    app[PODS] = pods
    one = "/hv/v1/pods/{namespace}/{pod}"
    app.router.add_get("/pods", _list)
    app.router.add_get("/hv/v1/pods", _list)
    app.router.add_post("/hv/v1/pods", _create)
    app.router.add_get(one, _get)
    app.router.add_delete(one, _delete)
    app.router.add_post(f"{one}/stop", _stop)
    add_snapshot_routes(app, pods, _pod)
    app.router.add_get(f"{one}/console", _console)
    app.router.add_get(f"{one}/inspect", _inspect)
    app.router.add_get(f"{one}/trace", _trace)
    app.router.add_get(f"{one}/archive", _get_archive)
    app.router.add_put(f"{one}/archive", _put_archive)


def _pod(request: web.Request) -> PodVm:
    return request.app[PODS].get(request.match_info["namespace"], request.match_info["pod"])


async def _list(request: web.Request) -> web.Response:
    items = [pod.view() for pod in request.app[PODS]]
    return web.json_response({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})


async def _inspect(request: web.Request) -> web.Response:
    return web.json_response(await inspect(_pod(request)))


async def _trace(request: web.Request) -> web.Response:
    seconds = number(request, "seconds", maximum=MAX_SECONDS)
    return web.Response(
        body=await trace(_pod(request), 1 if seconds is None else seconds), content_type="application/json"
    )


async def read_json(request: web.Request, limit: int) -> Any:
    """The request's body.

    :raises InvalidInput: longer than `limit` bytes, or not JSON
    """
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise InvalidInput(f"the request's body is longer than {limit} bytes")
    try:
        return await asyncio.to_thread(json.loads, bytes(body))
    except (ValueError, RecursionError) as e:
        raise InvalidInput(f"the request's body is not JSON: {e}") from e


async def _create(request: web.Request) -> web.Response:
    manifest = await read_json(request, MAX_MANIFEST_BYTES)
    pod = await asyncio.shield(request.app[PODS].create(manifest))
    return web.json_response(pod.view(), status=201)


async def _get(request: web.Request) -> web.StreamResponse:
    pod = _pod(request)
    if not flag(request, "watch"):
        return web.json_response(pod.view())
    async with streaming(request, NDJSON) as response:
        topic = pod.journal.topic
        version, last = -1, b""
        while not pod.gone.is_set():
            version = await topic.wait_newer(version)
            shown = line(pod.view())
            if shown != last and not pod.journal.closed:
                await response.write(shown)
                last = shown
    return response


def _grace(request: web.Request) -> int | None:
    return number(request, "gracePeriodSeconds", maximum=MAX_GRACE_S)


def _refuse_static(pod: PodVm) -> None:
    if pod.stored.static_file is not None:
        raise Conflict(
            f"pod {pod.pod.name} is a static pod: take {pod.stored.static_file} out of the manifests folder instead"
        )


async def _delete(request: web.Request) -> web.Response:
    pod = _pod(request)
    _refuse_static(pod)
    await asyncio.shield(pod.request_delete(_grace(request)))
    if flag(request, "wait"):
        await pod.gone.wait()
    return web.json_response(pod.view())


async def _stop(request: web.Request) -> web.Response:
    pod = _pod(request)
    _refuse_static(pod)
    await asyncio.shield(pod.request_stop(_grace(request)))
    version = -1
    while not pod.journal.record.closed and not pod.gone.is_set():
        version = await pod.journal.topic.wait_newer(version)
    return web.json_response(pod.view())


async def _console(request: web.Request) -> web.StreamResponse:
    pod = _pod(request)
    lines = number(request, "tail", maximum=MAX_CONSOLE_LINES)
    if not flag(request, "follow") or pod.journal.record.closed:
        text = await asyncio.to_thread(console_text, pod.paths, lines)
        return web.Response(body=text, content_type="text/plain", charset="utf-8")
    async with streaming(request, "text/plain; charset=utf-8") as response:
        async for data in follow_console(pod, lines):
            await response.write(data)
    return response


# ---- archives --------------------------------------------------------------------------------------------------------


def _archive_arguments(request: web.Request, pod: PodVm) -> dict[str, Any]:
    path = request.query.get("path", "")
    if not path.startswith("/"):
        raise InvalidInput(f"{path[:80]!r} is not an absolute path", where="path")
    return {"container": target_of(pod).container(request.query.get("container")), "path": path}


def _agent(pod: PodVm) -> AgentClient:
    target = target_of(pod)
    if target.address is None:
        raise Unavailable(f"pod {target.name} {target.detail}")
    return AgentClient(target.address)


def _check_ending(agent: AgentStream) -> None:
    if agent.ending is not None and agent.ending.error is not None:
        raise agent.ending.error


async def _get_archive(request: web.Request) -> web.StreamResponse:
    """The answer is begun only with the first data, so that a path that is not there is a plain 404."""
    pod = _pod(request)
    arguments = _archive_arguments(request, pod)
    response = web.StreamResponse(headers={"Content-Type": "application/x-tar"})
    async with _agent(pod).stream("archive.get", arguments) as agent:
        async for frame in agent.frames():
            if frame.type is FrameType.STDOUT:
                if not response.prepared:
                    await response.prepare(request)
                await response.write(frame.payload)
        _check_ending(agent)
    if not response.prepared:
        raise NotFound(f"{arguments['path']}: the agent sent no archive of it")
    await response.write_eof()
    return response


async def _put_archive(request: web.Request) -> web.Response:
    pod = _pod(request)
    async with _agent(pod).stream("archive.put", _archive_arguments(request, pod)) as agent:
        sender = asyncio.create_task(_send_body(request, agent))
        try:
            async for _ in agent.frames():
                pass
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
        _check_ending(agent)
    return web.Response(status=204)


async def _send_body(request: web.Request, agent: AgentStream) -> None:
    async for chunk in request.content.iter_any():
        await agent.send_stdin(chunk)
    await agent.close_stdin()
