"""A small HTTP/1.1 client for one daemon on loopback.

Not `http.client`: importing that costs 40 ms (its e-mail parser, ssl), which is more than all the rest of ``hv exec``.
It speaks what hostd's API needs: keep-alive, chunked bodies both ways, bodies read as they come, and the upgrade to a
WebSocket, after which `Connection.detach` hands over the socket.
"""

from __future__ import annotations

import json
import socket

from hypervisor.cli.state import Endpoint
from hypervisor.errors import (
    Conflict,
    HostUnfit,
    HvError,
    InvalidInput,
    NotFound,
    ProtocolError,
    ResourceExhausted,
    Timeout,
    Unavailable,
)

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing costs 8 ms
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, Self

    from hypervisor.cli.tls import TlsSocket

    Stream = socket.socket | TlsSocket
    Write = Callable[[bytes], None]
    Body = bytes | Callable[[Write], None]

CONNECT_TIMEOUT = 5.0
QUICK = 30.0  # seconds for a call that only reads state
MAX_HEAD = 64 * 1024
MAX_JSON = 64 * 1024 * 1024
CHUNK = 256 * 1024

_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_BY_CODE: dict[int, type[HvError]] = {
    404: NotFound,
    409: Conflict,
    501: HostUnfit,
    503: Unavailable,
    504: Timeout,
    507: ResourceExhausted,
}


def quote(text: str) -> str:
    """Percent-encodes everything but unreserved characters; undecodable bytes of argv survive."""
    return "".join(chr(b) if b in _UNRESERVED else f"%{b:02X}" for b in text.encode("utf-8", "surrogateescape"))


def target(parts: Sequence[str], query: Iterable[tuple[str, str]] = ()) -> str:
    """A request target from path parts and query pairs, each quoted."""
    path = "".join(f"/{quote(p)}" for p in parts)
    pairs = "&".join(f"{quote(k)}={quote(v)}" for k, v in query)
    return f"{path}?{pairs}" if pairs else path


def error_from(status: int, body: bytes) -> HvError:
    """The exception that a refused request stands for: from its Status object, or its text where it has none."""
    message = ""
    try:
        parsed = json.loads(body)
        message = str(parsed.get("message") or "") if isinstance(parsed, dict) else ""
    except ValueError:
        message = body[:500].decode("utf-8", "replace").strip().partition("\n")[0]
    if status == 401:
        return HvError("hostd refused the token of its state folder; run: hv host stop, then the command again")
    if status in (400, 422):
        return InvalidInput(message or f"hostd refused the request (HTTP {status})")
    return _BY_CODE.get(status, HvError)(message or f"hostd answered HTTP {status}")


class _Reader:
    """Buffered reading from a socket, with limits."""

    def __init__(self, sock: Stream) -> None:
        self._sock = sock
        self.buffer = bytearray()

    def _fill(self) -> bool:
        try:
            data = self._sock.recv(CHUNK)
        except TimeoutError as e:
            raise Timeout(f"hostd did not answer within {self._sock.gettimeout():g} s; see hv host status") from e
        except OSError as e:
            raise Unavailable(f"the connection to hostd broke ({e.strerror or e}); see hv host status") from e
        self.buffer += data
        return bool(data)

    def until(self, mark: bytes, limit: int = MAX_HEAD) -> bytes:
        """Everything up to and including `mark`."""
        while (at := self.buffer.find(mark, 0, limit)) < 0:
            if len(self.buffer) >= limit:
                raise ProtocolError("hostd's answer is too long; is something else listening on its port?")
            if not self._fill():
                raise Unavailable("hostd closed the connection; see hv host status")
        end = at + len(mark)
        data = bytes(self.buffer[:end])
        del self.buffer[:end]
        return data

    def some(self, limit: int) -> bytes:
        """Between one and `limit` bytes; empty at the end of the stream."""
        if not self.buffer and not self._fill():
            return b""
        data = bytes(self.buffer[:limit])
        del self.buffer[:limit]
        return data


class Response:
    """An answer whose body is read as it comes, once."""

    def __init__(self, reader: _Reader, status: int, headers: dict[str, str]) -> None:
        self._reader = reader
        self.status = status
        self.headers = headers
        self._body: Iterator[bytes] | None = None

    def chunks(self) -> Iterator[bytes]:
        """The body in pieces; a second call goes on where the first was left.

        :raises Unavailable: the connection broke before the body's end
        """
        if self._body is None:
            self._body = self._pieces()
        return self._body

    def _pieces(self) -> Iterator[bytes]:
        if self.status < 200 or self.status in (204, 304):
            return iter(())
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            return self._chunked()
        length = self.headers.get("content-length")
        if length is None:
            return iter(lambda: self._reader.some(CHUNK), b"")
        return self._exactly(_number(length, 10))

    def _exactly(self, left: int) -> Iterator[bytes]:
        while left > 0:
            data = self._reader.some(min(left, CHUNK))
            if not data:
                raise Unavailable("hostd closed the connection in the middle of an answer; see hv host status")
            left -= len(data)
            yield data

    def _chunked(self) -> Iterator[bytes]:
        while size := _number(self._reader.until(b"\r\n").split(b";")[0].decode("latin-1"), 16):
            yield from self._exactly(size)
            self._reader.until(b"\r\n")
        while self._reader.until(b"\r\n") != b"\r\n":
            pass  # trailers

    def read(self, limit: int = MAX_JSON) -> bytes:
        """The whole body; longer than `limit` is a `ProtocolError`."""
        body = bytearray()
        for data in self.chunks():
            body += data
            if len(body) > limit:
                raise ProtocolError(f"hostd's answer is longer than {limit} bytes")
        return bytes(body)

    def json(self) -> Any:
        """The body as JSON."""
        try:
            return json.loads(self.read())
        except ValueError as e:
            raise ProtocolError(f"hostd's answer is no JSON: {e}") from e

    def objects(self) -> Iterator[dict[str, Any]]:
        """A body of one JSON object a line, as they come."""
        rest = b""
        for data in self.chunks():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.strip():
                    yield _object(line)
        if rest.strip():
            yield _object(rest)


def _object(line: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError as e:
        raise ProtocolError(f"hostd sent a line that is no JSON: {e}") from e
    if not isinstance(parsed, dict):
        raise ProtocolError("hostd sent a line that is no JSON object")
    return parsed


def _number(text: str, base: int) -> int:
    try:
        value = int(text.strip(), base)
    except ValueError:
        value = -1
    if value < 0:
        raise ProtocolError("hostd's answer has a broken length; is something else listening on its port?")
    return value


class _Refused(Exception):
    """The peer does not take any more of a request. Never leaves this module."""


class Connection:
    """One TCP connection to a daemon; a context manager. One request at a time: the next ends the last answer."""

    def __init__(self, endpoint: Endpoint, timeout: float | None = QUICK) -> None:
        """Connects.

        :param timeout: seconds without a byte before a call is given up; None waits for ever
        :raises ConnectionError, TimeoutError: nobody listens there
        """
        self.endpoint = endpoint
        self._sock = self._open()
        self._sock.settimeout(timeout)
        self._reader = _Reader(self._sock)
        self._answer: Response | None = None

    def _open(self) -> Stream:
        sock = socket.create_connection((self.endpoint.address, self.endpoint.port), CONNECT_TIMEOUT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; harmless twice."""
        self._sock.close()

    def set_timeout(self, timeout: float | None) -> None:
        """Seconds without a byte before the next call is given up; None waits for ever."""
        self._sock.settimeout(timeout)

    def detach(self) -> tuple[Stream, bytes]:
        """The socket and what was read of it beyond the answer, after an upgrade. The caller closes it."""
        return self._sock, bytes(self._reader.buffer)

    def request(
        self,
        method: str,
        where: str,
        body: Body | None = None,
        headers: Iterable[tuple[str, str]] = (),
    ) -> Response:
        """Sends a request and reads the head of its answer, whatever the status.

        :param body: bytes, or a function that is given another one to write pieces with, which are sent chunked;
            what it raises goes through, and leaves the request unfinished: close the connection then
        :raises Unavailable: the connection broke
        """
        if self._answer is not None:
            for _ in self._answer.chunks():
                pass  # whoever asked had read enough
        whole = body if isinstance(body, bytes) else b""
        lines = [f"{method} {where} HTTP/1.1", f"Host: {self.endpoint.address}:{self.endpoint.port}"]
        if self.endpoint.token:
            lines.append(f"Authorization: Bearer {self.endpoint.token}")
        lines += [f"{k}: {v}" for k, v in headers]
        if isinstance(body, bytes):
            lines.append(f"Content-Length: {len(body)}")
        elif body is not None:
            lines.append("Transfer-Encoding: chunked")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        try:
            self._write(head + whole)
            if body is not None and not isinstance(body, bytes):
                body(self._write_piece)
                self._write(b"0\r\n\r\n")
        except _Refused as e:
            # A server that refuses an upload answers and closes before it has read all: the answer says why.
            return self._read_head(e.__cause__)
        return self._read_head()

    def _write(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as e:
            raise _Refused from e

    def _write_piece(self, data: bytes) -> None:
        if data:
            self._write(b"%x\r\n" % len(data) + data + b"\r\n")

    def _read_head(self, cause: BaseException | None = None) -> Response:
        try:
            head = self._reader.until(b"\r\n\r\n").decode("latin-1")
        except Unavailable as e:
            raise e from cause
        first, *lines = head.rstrip("\r\n").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
            raise ProtocolError("what listens on hostd's port does not speak HTTP; run: hv host stop, then again")
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        self._answer = Response(self._reader, int(words[1]), headers)
        return self._answer

    def call(
        self,
        method: str,
        where: str,
        body: Body | None = None,
        headers: Iterable[tuple[str, str]] = (),
    ) -> Response:
        """As `request`, but a refusal is raised as what it stands for.

        :raises HvError: see `error_from`
        """
        response = self.request(method, where, body, headers)
        if response.status >= 400:
            raise error_from(response.status, response.read())
        return response

    def get(self, *parts: str, query: Iterable[tuple[str, str]] = ()) -> Any:
        """The JSON that a path answers with."""
        return self.call("GET", target(parts, query)).json()

    def post(self, *parts: str, query: Iterable[tuple[str, str]] = (), value: Any = None) -> Response:
        """Sends `value` as JSON."""
        kind = (("Content-Type", "application/json"),)
        return self.call("POST", target(parts, query), json.dumps(value).encode() if value is not None else b"", kind)
