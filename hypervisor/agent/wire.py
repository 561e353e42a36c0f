"""The wire protocol between a host and the pod VM agent, version 1.

Theory of operation
-------------------
The agent listens on AF_VSOCK port `AGENT_PORT`. A connection carries one *call* at a time::

    host                                   agent
     | -- REQUEST {"v":1,"call":C,"args":A} --> |
     | <-- RESPONSE {"ok":true,"result":R} ---- |      a unary call ends here; the next REQUEST may follow
     | <== STDIN STDOUT STDERR ... frames ====> |      a streaming call goes on until END, then the connection closes

A refused call is answered ``RESPONSE {"ok":false,"error":{"reason":..., "message":...}}``; the connection stays usable.
A frame that breaks a rule below ends the connection: there is no way to find the next frame's start.

A frame is a 5-byte header (type, then payload length as a big-endian 32-bit number) and the payload. Every type has its
own length limit (`LIMITS`), checked before one byte of the payload is read. Flow control is the transport's: a
receiver that does not read stops the sender; nobody buffers more than one frame a stream.

docs/wire-protocol.md lists the calls with their arguments and results.
"""

from __future__ import annotations

import enum
import json
import struct
from typing import Any, NamedTuple

VERSION = 1
AGENT_PORT = 1024

HEADER = struct.Struct(">BI")
MAX_DATA = 256 * 1024
MAX_JSON = 4 * 1024 * 1024


class WireError(Exception):
    """The peer broke the protocol; the connection cannot be used any more."""


class FrameType(enum.IntEnum):
    """What a frame carries. The empty STDIN, STDOUT or STDERR frame is that stream's end of file (half-close)."""

    REQUEST = 1  # JSON, host to agent
    RESPONSE = 2  # JSON, agent to host
    STDIN = 3  # bytes, host to agent; also a tar going in
    STDOUT = 4  # bytes, agent to host; also log lines and a tar coming out
    STDERR = 5  # bytes, agent to host
    RESIZE = 6  # two big-endian 16-bit numbers: columns, rows
    SIGNAL = 7  # one byte: signal number
    EVENT = 8  # JSON, agent to host
    END = 9  # JSON, agent to host: how a streaming call ended; the last frame


_EXACT = {FrameType.RESIZE: 4, FrameType.SIGNAL: 1}
LIMITS: dict[FrameType, int] = {
    FrameType.REQUEST: MAX_JSON,
    FrameType.RESPONSE: MAX_JSON,
    FrameType.STDIN: MAX_DATA,
    FrameType.STDOUT: MAX_DATA,
    FrameType.STDERR: MAX_DATA,
    FrameType.RESIZE: 4,
    FrameType.SIGNAL: 1,
    FrameType.EVENT: MAX_JSON,
    FrameType.END: MAX_JSON,
}
_TYPES = {int(t): t for t in FrameType}


class Frame(NamedTuple):
    """One frame; `payload` is at most ``LIMITS[type]`` bytes."""

    type: FrameType
    payload: bytes


def parse_header(header: bytes) -> tuple[FrameType, int]:
    """The type and payload length of a frame.

    :param header: exactly ``HEADER.size`` bytes
    :raises WireError: unknown type, or a length that its type forbids
    """
    number, length = HEADER.unpack(header)
    kind = _TYPES.get(number)
    if kind is None:
        raise WireError(f"unknown frame type {number}")
    if length > LIMITS[kind]:
        raise WireError(f"{kind.name} frame of {length} bytes; at most {LIMITS[kind]} are allowed")
    if kind in _EXACT and length != _EXACT[kind]:
        raise WireError(f"{kind.name} frame of {length} bytes; it must have {_EXACT[kind]}")
    return kind, length


def pack_header(kind: FrameType, length: int) -> bytes:
    """The header of a frame whose payload has `length` bytes.

    :raises WireError: that is longer than its type allows
    """
    parse_header(header := HEADER.pack(kind, length))
    return header


def pack(kind: FrameType, payload: bytes = b"") -> bytes:
    """A frame as bytes; raises like `pack_header`."""
    return pack_header(kind, len(payload)) + payload


def pack_json(kind: FrameType, value: object) -> bytes:
    """A frame that carries `value` as compact UTF-8 JSON; raises like `pack`."""
    return pack(kind, json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogateescape"))


def parse_json(payload: bytes) -> dict[str, Any]:
    """The JSON object in a frame's payload.

    :raises WireError: not UTF-8, not JSON, nested too deeply, or not an object
    """
    try:
        value = json.loads(payload.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as e:
        raise WireError(f"payload is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise WireError(f"payload is a JSON {type(value).__name__}, not an object")
    return value


def pack_resize(columns: int, rows: int) -> bytes:
    """A RESIZE frame; sizes are clamped to 16 bits."""
    return pack(FrameType.RESIZE, struct.pack(">HH", min(columns, 0xFFFF), min(rows, 0xFFFF)))


def parse_resize(payload: bytes) -> tuple[int, int]:
    """``(columns, rows)`` of a RESIZE frame's payload."""
    columns, rows = struct.unpack(">HH", payload)
    return columns, rows


class Decoder:
    """Frames out of a byte stream, whatever its pieces. Not thread-safe; holds at most one incomplete frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._broken: str | None = None

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes, in order.

        :raises WireError: the stream broke a rule; every later call raises the same
        """
        if self._broken:
            raise WireError(self._broken)
        self._buffer += data
        frames: list[Frame] = []
        try:
            while len(self._buffer) >= HEADER.size:
                kind, length = parse_header(bytes(self._buffer[: HEADER.size]))
                end = HEADER.size + length
                if len(self._buffer) < end:
                    break
                frames.append(Frame(kind, bytes(self._buffer[HEADER.size : end])))
                del self._buffer[:end]
        except WireError as e:
            self._broken = str(e)
            raise
        return frames

    @property
    def pending(self) -> int:
        """Bytes of an incomplete frame; 0 at a frame boundary, where an end of file is in order."""
        return len(self._buffer)
