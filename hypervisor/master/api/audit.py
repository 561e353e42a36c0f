"""A line for each request that changes something or reaches into a pod: who, what, from where, with what outcome."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import structlog
from aiohttp.web_request import BaseRequest

from hypervisor.master.api.info import RequestInfo
from hypervisor.master.auth.user import User

FLUSH_S = 0.5
MAX_BYTES = 64 << 20
_QUIET = frozenset(("get", "list", "watch", "head", "options"))
_STREAMS = frozenset(("exec", "attach", "debug", "portforward", "log"))
_COMMANDS = frozenset(("exec", "debug"))
BEGAN, ENDED = "ResponseStarted", "ResponseComplete"
"""A session has a line when it begins and one when it has ended; any other request only the latter."""


class Audit:
    """JSON lines, written in batches by one task; the file is replaced (one old one is kept) when it has grown.

    For one event loop. Lines of the last half second may be lost in a crash.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines: list[bytes] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to write."""
        if self._path is not None:
            self._task = asyncio.create_task(self._run(), name="audit")

    async def close(self) -> None:
        """Writes what is left."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            await asyncio.to_thread(self._write, self._taken())

    def began(self, request: BaseRequest, info: RequestInfo, user: User) -> None:
        """Keeps a line of a session that is about to begin: it may last for days, and not outlive this server."""
        self._keep(BEGAN, request, info, user, {"code": 101})

    def ended(self, request: BaseRequest, info: RequestInfo, user: User, code: int, seconds: float) -> None:
        """Keeps a line of a request that has been answered, unless it only read objects."""
        self._keep(ENDED, request, info, user, {"code": code, "ms": round(seconds * 1000, 2)})

    def _keep(
        self, stage: str, request: BaseRequest, info: RequestInfo, user: User, outcome: Mapping[str, Any]
    ) -> None:
        sub = info.subresource if info.kind is not None and info.subresource in info.kind.subresources else ""
        verb = info.verb if info.kind is not None else "other"
        if self._task is None or (verb in _QUIET and sub not in _STREAMS):
            return
        line = {
            "time": time.time(),
            "stage": stage,
            "verb": verb,
            "subresource": sub,
            "user": user.name,
            "resource": info.kind.resource.qualified if info.kind is not None else "",
            "namespace": info.namespace,
            "name": info.name,
            "from": request.remote,
            **outcome,
        }
        if sub in _COMMANDS:
            line["query"] = request.rel_url.query_string[:2000]
        self._lines.append(orjson.dumps(line))

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            lines = self._taken()
            if lines:
                try:
                    await asyncio.to_thread(self._write, lines)
                except OSError as e:
                    structlog.get_logger().warning("the audit log cannot be written", error=str(e), lost=len(lines))

    def _taken(self) -> list[bytes]:
        lines, self._lines = self._lines, []
        return lines

    def _write(self, lines: list[bytes]) -> None:
        if self._path is None or not lines:
            return
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "ab") as file:
            file.write(b"\n".join(lines) + b"\n")
            grown = file.tell() > MAX_BYTES
        if grown:
            self._path.replace(self._path.with_suffix(".log.1"))
