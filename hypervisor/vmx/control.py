"""vmx.sock: one line of JSON asks a vmx, one line answers. Both ends.

``{"call":"stats"}`` -> ``{"ok":true,"result":{"vsock":{counter:value},"fault":"..."}}``; ``{"call":"ping"}``;
``{"call":"stop"}``. A call that takes a descriptor has it beside the line (SCM_RIGHTS), and one argument:
``{"call":"insert","name":SERIAL}``. One with an argument has it in the line:
``{"call":"chain","argument":{"disk":SERIAL,"filters":[...]}}``. A refused call is
``{"ok":false,"error":"...","reason":"..."}``. A client may send several lines.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound, ProtocolError, Timeout, Unavailable

MAX_LINE = 64 * 1024
MAX_CLIENTS = 16

Call = Callable[[], Any]
Taking = Callable[[str, int], None]
Asking = Callable[[dict[str, Any]], Any]
_NONE: Mapping[str, Any] = {}
_BY_REASON: dict[str, type[HvError]] = {kind.reason: kind for kind in (InvalidInput, NotFound, Conflict)}


class ControlServer:
    """The vmx's end, driven by the owner's selector: `register`, then `handle` for its events. Never blocks.

    :param calls: what may be called, by name, each without arguments
    :param taking: likewise, with a name and a descriptor, which becomes the call's own
    :param asking: likewise, with an argument, an object
    """

    def __init__(
        self,
        listener: socket.socket,
        calls: dict[str, Call],
        taking: Mapping[str, Taking] = _NONE,
        asking: Mapping[str, Asking] = _NONE,
    ) -> None:
        self._listener = listener
        self._calls = calls
        self._taking = taking
        self._asking = asking
        self._clients: dict[socket.socket, tuple[bytes, float]] = {}
        listener.setblocking(False)

    def register(self, selector: selectors.BaseSelector) -> None:
        """Adds the listener; clients are added as they come."""
        self._selector = selector
        selector.register(self._listener, selectors.EVENT_READ, self.on_connect)

    def on_connect(self) -> None:
        """A client connects; when there are too many, the one that has been silent for longest makes room."""
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        client.setblocking(False)
        if len(self._clients) >= MAX_CLIENTS:
            self._drop(min(self._clients, key=lambda c: self._clients[c][1]))
        self._clients[client] = (b"", time.monotonic())
        self._selector.register(client, selectors.EVENT_READ, lambda: self._on_data(client))

    def _drop(self, client: socket.socket) -> None:
        self._selector.unregister(client)
        del self._clients[client]
        client.close()

    def _on_data(self, client: socket.socket) -> None:
        if client not in self._clients:
            return  # dropped in this very turn
        try:
            data, fds = _receive(client)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        *lines, rest = (self._clients[client][0] + data).split(b"\n")
        if not data or len(rest) > MAX_LINE or len(fds) > len(lines):
            self._drop(client)
            _close(fds)
            return
        self._clients[client] = (rest, time.monotonic())
        try:
            for line in lines:
                client.send(json.dumps(self._answer(line, fds)).encode() + b"\n")
        except OSError:  # gone, or it does not read its answers
            self._drop(client)
        _close(fds)

    def _answer(self, line: bytes, fds: list[int]) -> dict[str, Any]:
        """`fds`: what came along; the first is taken out by a call that wants one."""
        try:
            value = json.loads(line)
            call = value["call"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return {"ok": False, "error": 'not {"call":NAME}'}
        if isinstance(call, str) and call in self._taking and isinstance(value.get("name"), str) and fds:
            try:
                self._taking[call](value["name"], fds.pop(0))
            except HvError as error:
                return {"ok": False, "error": str(error)}
            return {"ok": True, "result": None}
        if isinstance(call, str) and call in self._asking and isinstance(value.get("argument"), dict):
            try:
                return {"ok": True, "result": self._asking[call](value["argument"])}
            except HvError as error:
                return {"ok": False, "error": str(error), "reason": error.reason}
        if not isinstance(call, str) or call not in self._calls:
            return {"ok": False, "error": f"unknown call; known: {', '.join(sorted(self._calls))}"}
        return {"ok": True, "result": self._calls[call]()}

    def close(self) -> None:
        """Closes every client and the listener."""
        for client in list(self._clients):
            self._drop(client)
        self._selector.unregister(self._listener)
        self._listener.close()


def _receive(client: socket.socket) -> tuple[bytes, list[int]]:
    data, ancillary, _, _ = client.recvmsg(MAX_LINE, socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _give(path: Path, line: bytes, fd: int, timeout: float) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect(str(path))
        socket.send_fds(sock, [line], [fd])
        answer = b""
        while not answer.endswith(b"\n") and (data := sock.recv(MAX_LINE)):
            answer += data
        return answer


async def give(path: Path, name: str, argument: str, fd: int, *, timeout: float = 5.0) -> None:
    """Calls a vmx with a name and a descriptor, which stays the caller's. Raises as `call`."""
    line = json.dumps({"call": name, "name": argument}).encode() + b"\n"
    try:
        answer = await asyncio.to_thread(_give, path, line, fd, timeout)
    except TimeoutError as error:
        raise Timeout(f"vmx at {path} did not answer {name} in {timeout:g} s") from error
    except OSError as error:
        raise Unavailable(f"vmx at {path} does not answer: {error.strerror or error}") from error
    try:
        value = json.loads(answer or b"null")
        if value is None:
            raise Unavailable(f"vmx at {path} closed the connection")
        if not value["ok"]:
            raise ProtocolError(f"vmx at {path} refused {name}: {value['error']}")
    except (ValueError, TypeError, KeyError) as error:
        raise ProtocolError(f"vmx at {path} answered nonsense to {name}") from error


async def call(path: Path, name: str, *, argument: Mapping[str, Any] | None = None, timeout: float = 5.0) -> Any:
    """Calls a vmx by its control socket.

    :param argument: of a call that has one
    :param timeout: seconds
    :raises Unavailable: no vmx listens there (`Timeout` when it does not answer)
    :raises ProtocolError: it refused the call or answered nonsense
    :raises HvError: what a call with an argument was refused with
    """
    line_out = json.dumps({"call": name} if argument is None else {"call": name, "argument": argument}).encode()
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_unix_connection(path, limit=MAX_LINE)
            try:
                writer.write(line_out + b"\n")
                await writer.drain()
                line = await reader.readline()
            finally:
                writer.close()
    except TimeoutError as error:
        raise Timeout(f"vmx at {path} did not answer {name} in {timeout:g} s") from error
    except OSError as error:
        raise Unavailable(f"vmx at {path} does not answer: {error.strerror or error}") from error
    if not line:
        raise Unavailable(f"vmx at {path} closed the connection")
    try:
        answer = json.loads(line)
        if answer["ok"]:
            return answer["result"]
        if answer.get("reason") in _BY_REASON:
            raise _BY_REASON[answer["reason"]](str(answer["error"])[:1024])
        raise ProtocolError(f"vmx at {path} refused {name}: {answer['error']}")
    except (ValueError, TypeError, KeyError) as error:
        raise ProtocolError(f"vmx at {path} answered nonsense to {name}") from error
