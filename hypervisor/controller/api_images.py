"""Images over HTTP: list, pull, import, remove, prune. Long calls answer in JSON lines, so that progress shows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web

from hypervisor.controller.api_pods import PODS, read_json
from hypervisor.controller.api_streams import NDJSON, line, streaming
from hypervisor.errors import HvError, InvalidInput
from hypervisor.images.model import Image, Progress, ProgressEvent
from hypervisor.images.store import ImageStore
from hypervisor.introspect.status import status_of_error

STORE = web.AppKey("image_store", ImageStore)
MAX_BODY = 64 * 1024


def add_image_routes(app: web.Application, store: ImageStore) -> None:
    """Adds them to `app`, which has the pods' routes already."""
    app[STORE] = store
    app.router.add_get("/hv/v1/images", _list)
    app.router.add_delete("/hv/v1/images", _remove)
    app.router.add_post("/hv/v1/images/prune", _prune)
    app.router.add_post("/hv/v1/images/pull", _pull)
    app.router.add_post("/hv/v1/images/import", _import)


def image_object(image: Image) -> dict[str, Any]:
    """An image as clients see it."""
    config = image.config
    return {
        "id": image.id,
        "names": list(image.names),
        "digest": image.digest,
        "size_bytes": image.size_bytes,
        "created": image.created,
        "config": {
            "entrypoint": list(config.entrypoint),
            "cmd": list(config.cmd),
            "env": list(config.env),
            "user": config.user,
            "workdir": config.workdir,
            "exposed_ports": list(config.exposed_ports),
        },
    }


async def _list(request: web.Request) -> web.Response:
    images = await asyncio.to_thread(request.app[STORE].list)
    return web.json_response({"images": [image_object(i) for i in images]})


async def _remove(request: web.Request) -> web.Response:
    reference = request.query.get("reference", "")
    if not reference:
        raise InvalidInput("name the image", where="reference")
    removed = await asyncio.to_thread(request.app[STORE].remove, reference)
    return web.json_response({"removed": image_object(removed) if removed else None})


async def _prune(request: web.Request) -> web.Response:
    in_use = request.app[PODS].images_in_use()
    removed = await asyncio.to_thread(request.app[STORE].prune, in_use)
    return web.json_response({"removed": [image_object(i) for i in removed]})


def _text(body: Any, name: str, *, required: bool = True) -> str | None:
    value = body.get(name) if isinstance(body, dict) else None
    if value is None and not required:
        return None
    if not isinstance(value, str) or not value:
        raise InvalidInput("must be a string, and not empty", where=name)
    return value


async def _pull(request: web.Request) -> web.StreamResponse:
    body = await read_json(request, MAX_BODY)
    reference, policy = _text(body, "reference"), _text(body, "policy", required=False)
    store = request.app[STORE]

    async def work(progress: Progress) -> dict[str, Any]:
        image = await store.pull(reference or "", policy=policy or "missing", progress=progress)
        return {"image": image_object(image)}

    return await _with_progress(request, work)


async def _import(request: web.Request) -> web.StreamResponse:
    body = await read_json(request, MAX_BODY)
    path, name = _text(body, "path"), _text(body, "name", required=False)
    store = request.app[STORE]

    async def work(progress: Progress) -> dict[str, Any]:
        images: Sequence[Image] = await store.import_archive(Path(path or ""), name=name, progress=progress)
        return {"images": [image_object(i) for i in images]}

    return await _with_progress(request, work)


async def _with_progress(
    request: web.Request, work: Callable[[Progress], Awaitable[dict[str, Any]]]
) -> web.StreamResponse:
    """Runs `work`; the newest progress goes out as fast as the client takes it, then the result or the error."""
    latest: dict[str, ProgressEvent] = {}
    news = asyncio.Event()

    def progress(event: ProgressEvent) -> None:
        latest[event.phase] = event
        news.set()

    async with streaming(request, NDJSON) as response:
        task = asyncio.ensure_future(work(progress))
        task.add_done_callback(lambda _: news.set())
        try:
            while not task.done() or latest:
                await news.wait()
                news.clear()
                while latest:
                    event = latest.pop(next(iter(latest)))
                    await response.write(line({"progress": asdict(event)}))
            await response.write(line(_result(task)))
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    return response


def _result(task: asyncio.Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return task.result()
    except HvError as e:
        return {"error": status_of_error(e)}
