"""The least of HTTP/1.1 that a probe needs: one GET, the status of its answer, where it redirects to.

Pure functions over a byte channel, so that the host can use them too (HTTPS probes: TLS is not in the guest). Bounded:
64 KiB of header, and of the body only what is read out of courtesy, 10 KiB, as kubelets do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

MAX_HEAD = 64 * 1024
MAX_BODY = 10 * 1024
_HEAD_END = b"\r\n\r\n"
_DEFAULTS = (("User-Agent", "kube-probe/1.34"), ("Accept", "*/*"))

Receive = Callable[[], Awaitable[bytes]]
"""The next bytes; none at the end."""


class HttpError(Exception):
    """What came back is not HTTP."""


class Answer(NamedTuple):
    """`status` and, of a redirect, where to."""

    status: int
    location: str


def render_request(host: str, port: int, path: str, headers: list[tuple[str, str]], *, usual_port: int) -> bytes:
    """A whole request; `headers` come instead of the usual ones of the same name (an empty value leaves one out)."""
    given = {name.lower() for name, _ in headers}
    shown = f"[{host}]" if ":" in host else host
    own = [("Host", shown if port == usual_port else f"{shown}:{port}"), *_DEFAULTS]
    lines = [f"GET {path or '/'} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in own if name.lower() not in given]
    lines += [f"{name}: {value}" for name, value in headers if value]
    lines += ["Connection: close", "", ""]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape")


async def read_answer(receive: Receive) -> Answer:
    """Reads an answer, its body too as far as that is short.

    :raises HttpError: it is none
    """
    data = b""
    while _HEAD_END not in data:
        more = await receive()
        if not more:
            raise HttpError("the connection ended before an answer" if not data else "the answer's header is cut off")
        data += more
        if len(data) > MAX_HEAD:
            raise HttpError(f"the answer's header has more than {MAX_HEAD} bytes")
    head, _, body = data.partition(_HEAD_END)
    status, fields = _parse_head(head)
    await _read_body(receive, len(body), fields.get("content-length", ""))
    return Answer(status, fields.get("location", ""))


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *rest = head.decode("latin-1").split("\r\n")
    parts = first.split(" ", 2)
    if len(parts) < 2 or not parts[0].startswith("HTTP/1.") or len(parts[1]) != 3 or not parts[1].isdigit():
        raise HttpError(f"malformed HTTP response {first[:80]!r}")
    fields = {}
    for line in rest:
        name, _, value = line.partition(":")
        fields[name.strip().lower()] = value.strip()
    return int(parts[1]), fields


async def _read_body(receive: Receive, have: int, length: str) -> None:
    wanted = min(int(length), MAX_BODY) if length.isdigit() and len(length) < 18 else MAX_BODY
    while have < wanted:
        more = await receive()
        if not more:
            return
        have += len(more)
