"""``probe``: is a container well? One look: a program in it, an HTTP GET, a TCP connection, a gRPC health check.
Hooks run so too.

The agent lives in the pod's network namespace. It looks once and says what it saw; when to look, and what follows from
it, is the host's business (hypervisor/controller/probes.py).
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Any

from .engine import Engine
from .errors import invalid
from .exec import Spawned, ending, send_signal, spawn_in
from .exec_request import ExecRequest
from .fields import Fields, check_command
from .httpget import HttpError, read_answer, render_request
from .spec import parse_name
from .streams import Pump

MAX_OUTPUT = 10 * 1024
RECEIVE = 16 * 1024
HTTP_PORT = 80
_SIGKILL = 9


async def run_probe(args: dict[str, Any], engine: Engine) -> dict[str, Any]:
    """The call: {"ok", "message"}, of ``http`` also {"status", "location"} where an answer came.

    :raises AgentError: Invalid, NotFound, Conflict: there was nothing to look at
    """
    fields = Fields(args, "probe")
    container = engine.running(parse_name(fields, "container"))
    timeout_s = fields.seconds("timeout_s", 1.0)
    kinds = [k for k in ("exec", "http", "tcp", "grpc") if args.get(k) is not None]
    if len(kinds) != 1:
        raise invalid("probe: give one of exec, http, tcp and grpc")
    handler = fields.object(kinds[0])
    fields.done()
    if kinds[0] == "exec":
        argv = handler.texts("argv")
        handler.done()
        check_command(argv, container.spec.env, "probe.exec")
        request = ExecRequest(argv, container.spec.env, container.spec.cwd, container.user, None)
        async with spawn_in(container, request, engine.reaper) as spawned:
            return await _exec(spawned, timeout_s)
    look = _LOOKS[kinds[0]](handler)
    look.timeout_s = timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            return await look.run()
    except TimeoutError:
        return _bad(f"{look.what}: no answer within {timeout_s:g} s")
    except HttpError as e:
        return _bad(f"{look.what}: {e}")
    except OSError as e:
        return _bad(f"{look.what}: {_why(e)}")


def _bad(message: str) -> dict[str, Any]:
    return {"ok": False, "message": message}


def _why(error: OSError) -> str:
    return (os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)).lower()


# ---- a program -------------------------------------------------------------------------------------------------------


async def _exec(spawned: Spawned, timeout_s: float) -> dict[str, Any]:
    """Runs it to its end; one that takes too long is killed."""
    kept = bytearray()

    def keep(data: bytes) -> None:
        kept.extend(data[: MAX_OUTPUT - len(kept)])

    pumps = [Pump(fd, keep) for _kind, fd in spawned.process.outputs]
    spawned.process.outputs = []
    try:
        try:
            status = await asyncio.wait_for(asyncio.shield(spawned.status), timeout_s)
        except TimeoutError:
            send_signal(spawned.pid, _SIGKILL)
            await spawned.status
            return _bad(f"command timed out after {timeout_s:g} s")
        spawned.process.report.read_rest()
        for pump in pumps:
            pump.drain()
    finally:
        for pump in pumps:
            pump.close()
        if not spawned.status.done():
            send_signal(spawned.pid, _SIGKILL)
    end = ending(status, spawned.process.report.error)
    if end["error"]:
        return _bad(end["error"]["message"])
    return {"ok": end["exit_code"] == 0, "message": kept.decode("utf-8", "replace"), "exit_code": end["exit_code"]}


# ---- a connection ----------------------------------------------------------------------------------------------------


class _Tcp:
    """Whether somebody takes connections at a port."""

    timeout_s = 1.0

    def __init__(self, fields: Fields) -> None:
        self.host = fields.text("host", "127.0.0.1", limit=255)
        self.port = fields.integer("port", low=1, high=65535)
        self._more(fields)
        fields.done()
        self.what = f"dial tcp {self.host}:{self.port}"

    def _more(self, fields: Fields) -> None:
        """Fields of other kinds."""

    async def connect(self) -> socket.socket:
        """A connection; raises OSError."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
        try:
            await loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return sock

    async def run(self) -> dict[str, Any]:
        """Connects, and closes at once."""
        (await self.connect()).close()
        return {"ok": True, "message": ""}


class _Http(_Tcp):
    """One GET."""

    def _more(self, fields: Fields) -> None:
        self.path = fields.text("path", "/", limit=8192)
        self.headers = [_header(f) for f in fields.objects("headers")]
        if any(c <= " " or c == "\x7f" for c in self.path):
            raise invalid(f"probe.http.path: {self.path[:80]!r} has blanks or control characters; quote them")

    async def run(self) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        self.what = f'Get "http://{self.host}:{self.port}{self.path}"'
        with await self.connect() as sock:
            request = render_request(self.host, self.port, self.path, self.headers, usual_port=HTTP_PORT)
            await loop.sock_sendall(sock, request)
            answer = await read_answer(lambda: loop.sock_recv(sock, RECEIVE))
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        ok = 200 <= answer.status < 400
        message = "" if ok else f"HTTP probe failed with statuscode: {answer.status}"
        return {"ok": ok, "message": message, "status": answer.status, "location": answer.location}


class _Grpc(_Tcp):
    """One health check."""

    def _more(self, fields: Fields) -> None:
        self.service = fields.text("service", "", limit=1024)

    async def run(self) -> dict[str, Any]:
        from . import grpchealth

        loop = asyncio.get_running_loop()
        self.what = f"grpc {self.host}:{self.port}"
        with await self.connect() as sock:
            await loop.sock_sendall(sock, grpchealth.render_request(self.host, self.port, self.service, self.timeout_s))
            try:
                status = await grpchealth.read_status(
                    lambda: loop.sock_recv(sock, RECEIVE), lambda data: loop.sock_sendall(sock, data)
                )
            except grpchealth.GrpcError as e:
                return _bad(f"{self.what}: {e}")
        if status == grpchealth.SERVING:
            return {"ok": True, "message": ""}
        said = grpchealth.STATUSES[status] if status < len(grpchealth.STATUSES) else str(status)
        return _bad(f'service unhealthy (responded with "{said}")')


_LOOKS = {"tcp": _Tcp, "http": _Http, "grpc": _Grpc}


def _header(fields: Fields) -> tuple[str, str]:
    name, value = fields.text("name", limit=256), fields.text("value", "", limit=8192)
    fields.done()
    if any(c in name + value for c in "\r\n") or ":" in name or not name:
        raise invalid(f"probe.http.headers: {name[:80]!r} is no header's name, or its value has line ends")
    return name, value
