"""Every refused request becomes a Kubernetes ``Status``, in one place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import structlog
from aiohttp import web

from hypervisor.errors import HvError
from hypervisor.introspect.status import status_of_error

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    404: "NotFound",
    405: "MethodNotAllowed",
    413: "RequestEntityTooLarge",
}
_answer_begun: ContextVar[list[bool]] = ContextVar("answer_begun")
"""Of the request that this task handles: empty until its answer has begun."""


async def note_started(_request: web.Request, _response: web.StreamResponse) -> None:
    """From here on an error cannot be answered any more. For ``app.on_response_prepare``."""
    _answer_begun.get([]).append(True)


def status_object(code: int, reason: str, message: str) -> dict[str, Any]:
    """A failure that is no `HvError`."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers a raised error, or breaks off an answer that has begun: a cut stream must not look complete."""
    _answer_begun.set([])
    try:
        return await handler(request)
    except HvError as e:
        return _answer(request, e, status_of_error(e))
    except web.HTTPException as e:
        message = f"{request.method} {request.path}: {e.text or e.reason}"
        return _answer(request, e, status_object(e.status, _REASONS.get(e.status, "BadRequest"), message))
    except ConnectionError:
        raise  # the client has gone
    except Exception as e:
        structlog.get_logger().exception("request failed", method=request.method, path=request.path)
        return _answer(request, e, status_object(500, "InternalError", "internal error; hostd.log has the reason"))


def _answer(request: web.Request, error: Exception, body: dict[str, Any]) -> web.Response:
    if _answer_begun.get([]):
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError(f"broken off: {error}") from error
    return web.json_response(body, status=body["code"])
