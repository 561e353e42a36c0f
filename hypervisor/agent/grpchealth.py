"""One health check over gRPC: as much of HTTP/2 and protobuf as ``grpc.health.v1.Health/Check`` needs, without TLS.

Pure functions over a byte channel. What is sent is fixed: preface, settings, one request. Of what comes, frames are
read until the stream ends; only the message counts, for header blocks (HPACK) need not be understood to know it: a call
that failed has none. Bounded: 64 KiB in all.

Source: RFC 9113; gRPC, "gRPC over HTTP2" and "GRPC Health Checking Protocol".
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable

SERVING = 1
STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
MAX_ANSWER = 64 * 1024
PATH = "/grpc.health.v1.Health/Check"
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEAD = struct.Struct(">HBBBI")  # length (16 + 8 bits), type, flags, stream
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY = 0, 1, 3, 4, 6, 7
_END_STREAM, _ACK, _END_HEADERS, _PADDED = 1, 1, 4, 8
_NO_TABLE_NO_PUSH = struct.pack(">HIHI", 1, 0, 2, 0)
_STREAM = 1

Receive = Callable[[], Awaitable[bytes]]
Send = Callable[[bytes], Awaitable[None]]


class GrpcError(Exception):
    """There is no answer to the check; why."""


def render_request(host: str, port: int, service: str, timeout_s: float) -> bytes:
    """All that a client sends, but acknowledgements."""
    shown = f"[{host}]" if ":" in host else host
    headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", PATH),
        (":authority", f"{shown}:{port}"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "kube-probe/1.34"),
        ("grpc-timeout", f"{max(1, round(timeout_s * 1000))}m"),
    ]
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in headers)  # literals, never indexed
    name = service.encode()
    message = b"\x0a" + _varint(len(name)) + name if name else b""
    frames = _frame(_SETTINGS, 0, 0, _NO_TABLE_NO_PUSH) + _frame(_HEADERS, _END_HEADERS, _STREAM, block)
    return _PREFACE + frames + _frame(_DATA, _END_STREAM, _STREAM, struct.pack(">BI", 0, len(message)) + message)


def _text(text: str) -> bytes:
    """An HPACK string without Huffman's code."""
    data = text.encode("utf-8", "surrogateescape")
    if len(data) < 127:
        return bytes((len(data),)) + data
    return b"\x7f" + _varint(len(data) - 127) + data


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes((*out, number))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    length = len(payload)
    return _HEAD.pack(length >> 8, length & 255, kind, flags, stream) + payload


async def read_status(receive: Receive, send: Send) -> int:
    """The ``ServingStatus`` of the answer.

    :raises GrpcError: there is none
    """
    data, message = bytearray(), bytearray()
    left = MAX_ANSWER
    while True:
        while (frame := _take_frame(data)) is None:
            more = await receive()
            left -= len(more)
            if not more:
                raise GrpcError("the connection ended before an answer; does it speak gRPC without TLS?")
            if left < 0:
                raise GrpcError(f"the answer has more than {MAX_ANSWER} bytes")
            data += more
        kind, flags, stream, payload = frame
        if kind in (_SETTINGS, _PING) and not flags & _ACK:
            await send(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
        if kind == _GOAWAY or (kind == _RST_STREAM and stream == _STREAM):
            raise GrpcError(f"the server ended the call (error code {int.from_bytes(payload[-4:], 'big')})")
        if kind == _DATA and stream == _STREAM:
            message += _unpadded(flags, payload)
        if kind in (_DATA, _HEADERS) and stream == _STREAM and flags & _END_STREAM:
            return _parse_answer(bytes(message))


def _take_frame(data: bytearray) -> tuple[int, int, int, bytes] | None:
    """The first whole frame, which is taken out of `data`."""
    if len(data) < _HEAD.size:
        return None
    high, low, kind, flags, stream = _HEAD.unpack_from(data)
    end = _HEAD.size + (high << 8 | low)
    if end > MAX_ANSWER:
        raise GrpcError("what came back is not HTTP/2")
    if len(data) < end:
        return None
    payload = bytes(data[_HEAD.size : end])
    del data[:end]
    return kind, flags, stream & 0x7FFFFFFF, payload


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & _PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise GrpcError("the answer is damaged")
    return payload[1 : len(payload) - payload[0]]


def _parse_answer(data: bytes) -> int:
    """:raises GrpcError: the call failed, or it is another message"""
    if not data:
        raise GrpcError("the call failed: no such service, or no health service")
    if len(data) < 5 or data[0] != 0 or int.from_bytes(data[1:5], "big") != len(data) - 5:
        raise GrpcError("the answer is no health status")
    status, position = 0, 5
    while position < len(data):
        tag, position = _read_varint(data, position)
        if tag & 7 == 2:
            length, position = _read_varint(data, position)
            position += length
        elif tag & 7 == 0:
            value, position = _read_varint(data, position)
            status = value if tag >> 3 == 1 else status
        else:
            raise GrpcError("the answer is no health status")
    return status


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise GrpcError("the answer is cut off")
