"""What probes and hooks do: run a program in the container, GET, connect, or just wait.

All of it happens in the guest (the agent's ``probe``). TLS is not in the guest: for HTTPS the host speaks it through a
channel into the pod (``dial``), to its loopback address, without verifying the certificate. Redirects are followed as
kubelets do: up to ten, within one host; one that leads elsewhere counts as an answer.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from hypervisor.agent.httpget import Answer, HttpError, read_answer, render_request
from hypervisor.agent.wire import FrameType
from hypervisor.controller.spec import Action, ExecAction, GrpcAction, HttpAction, SleepAction, TcpAction
from hypervisor.errors import HvError
from hypervisor.introspect.agent import AgentClient, AgentStream

ANSWER_S = 10.0
"""Beyond an action's own time-out: how long the agent may take to say so. A busy guest under TCG needs a while."""
MAX_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
_RECEIVE = 16 * 1024
LOOPBACK = "127.0.0.1"


class Outcome(NamedTuple):
    """What came of it. `answered`: an HTTP server said something, whatever it was."""

    ok: bool
    message: str = ""
    answered: bool = False


class Actions:
    """Those of one container.

    :param address: the pod's own, which servers listen on
    """

    def __init__(self, agent: AgentClient, container: str, address: str) -> None:
        self._agent = agent
        self._container = container
        self._address = address

    async def run(self, action: Action, timeout_s: float) -> Outcome:
        """Does it once.

        :raises Unavailable: the agent cannot be reached, or does not answer; whether it was done is unknown
        :raises HvError: the container does not run
        """
        match action:
            case SleepAction(seconds):
                await asyncio.sleep(min(seconds, timeout_s))
                return Outcome(True)
            case ExecAction(command):
                return _outcome(await self._ask(timeout_s, exec={"argv": list(command)}))
            case TcpAction(port, host):
                return _outcome(await self._ask(timeout_s, tcp={"host": host or self._address, "port": port}))
            case GrpcAction(port, service):
                args = {"host": self._address, "port": port, "service": service}
                return _outcome(await self._ask(timeout_s, grpc=args))
            case HttpAction():
                return await self._http(action, timeout_s)

    async def _ask(self, timeout_s: float, **handler: Any) -> dict[str, Any]:
        args = {"container": self._container, "timeout_s": float(timeout_s), **handler}
        return await self._agent.call("probe", args, timeout=timeout_s + ANSWER_S)

    # ---- HTTP --------------------------------------------------------------------------------------------------------

    async def _http(self, action: HttpAction, timeout_s: float) -> Outcome:
        host = action.host or (LOOPBACK if action.https else self._address)
        scheme = "https" if action.https else "http"
        url = f"{scheme}://{host}:{action.port}{action.path}"
        for _ in range(MAX_REDIRECTS + 1):
            result = await self._get(url, action, timeout_s)
            if result.get("status") not in _REDIRECTS or not result.get("location"):
                return _outcome(result)
            target = urljoin(url, str(result["location"]))
            if urlsplit(target).hostname != urlsplit(url).hostname or urlsplit(target).scheme not in ("http", "https"):
                return Outcome(True, f"Probe terminated redirects at {target[:200]}", True)
            url = target
        return Outcome(False, f'Get "{url[:200]}": stopped after {MAX_REDIRECTS} redirects', True)

    async def _get(self, url: str, action: HttpAction, timeout_s: float) -> dict[str, Any]:
        parts = urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            return {"ok": False, "message": f"redirected to {url[:200]!r}, which has no such port"}
        if parts.scheme == "https":
            return await self._get_tls(port, path, action, timeout_s)
        headers = [{"name": name, "value": value} for name, value in action.headers]
        return await self._ask(
            timeout_s, http={"host": parts.hostname or LOOPBACK, "port": port, "path": path, "headers": headers}
        )

    async def _get_tls(self, port: int, path: str, action: HttpAction, timeout_s: float) -> dict[str, Any]:
        what = f'Get "https://{LOOPBACK}:{port}{path}"'
        try:
            async with asyncio.timeout(timeout_s), self._agent.stream("dial", {"port": port}) as stream:
                answer = await _fetch(_Tls(stream), port, path, action)
        except TimeoutError:
            return {"ok": False, "message": f"{what}: no answer within {timeout_s:g} s"}
        except (HttpError, ssl.SSLError, HvError) as e:
            return {"ok": False, "message": f"{what}: {e}"}
        ok = 200 <= answer.status < 400
        message = "" if ok else f"HTTP probe failed with statuscode: {answer.status}"
        return {"ok": ok, "message": message, "status": answer.status, "location": answer.location}


def _outcome(result: dict[str, Any]) -> Outcome:
    return Outcome(result.get("ok") is True, str(result.get("message") or ""), "status" in result)


async def _fetch(tls: _Tls, port: int, path: str, action: HttpAction) -> Answer:
    request = render_request(LOOPBACK, port, path, list(action.headers), usual_port=443)
    await tls.step(tls.object.do_handshake)
    await tls.step(lambda: tls.object.write(request))
    return await read_answer(tls.receive)


class _Tls:
    """TLS over a ``dial``."""

    def __init__(self, stream: AgentStream) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self._stream = stream
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = context.wrap_bio(self._in, self._out)

    async def step(self, function: Callable[[], Any]) -> Any:
        """The result of `function`, fed with what comes and its output sent as long as it wants more."""
        while True:
            try:
                result = function()
            except ssl.SSLWantReadError:
                await self._flush()
                frame = await self._stream.receive()
                if frame.type is FrameType.STDOUT and frame.payload:
                    self._in.write(frame.payload)
                else:
                    self._in.write_eof()
            else:
                await self._flush()
                return result

    async def receive(self) -> bytes:
        """The next bytes; none at the end, clean or not."""
        try:
            return bytes(await self.step(lambda: self.object.read(_RECEIVE)))
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""

    async def _flush(self) -> None:
        if self._out.pending:
            await self._stream.send_stdin(self._out.read())
