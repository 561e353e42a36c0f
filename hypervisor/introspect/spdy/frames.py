"""Frames: bytes to values and back. Pure but for the state of header compression, one `FrameReader` and one
`FrameWriter` a connection.

Source: SPDY Protocol, Draft 3.1, section 2.2 and 2.6. Frames that Kubernetes' peers never send (CREDENTIAL, NOOP) are
skipped; every length is checked before it is believed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hypervisor.errors import ProtocolError
from hypervisor.introspect.spdy.headers import HeaderReader, HeaderWriter

VERSION = 3
MAX_FRAME = 4 * 1024 * 1024
"""Bytes of a frame's body; 2^24 - 1 is what the field could hold, 32 KiB what peers send."""
FIN, UNIDIRECTIONAL = 0x01, 0x02

PROTOCOL_ERROR, INVALID_STREAM, REFUSED_STREAM, CANCEL, INTERNAL_ERROR = 1, 2, 3, 5, 6
"""RST_STREAM status codes."""

_HEAD = struct.Struct(">II")
_ID = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class SynStream:
    """A stream begins."""

    stream: int
    headers: Mapping[str, str]
    fin: bool = False
    unidirectional: bool = False
    associated: int = 0
    priority: int = 0


@dataclass(frozen=True, slots=True)
class SynReply:
    """The other side accepts a stream."""

    stream: int
    headers: Mapping[str, str] = field(default_factory=dict)
    fin: bool = False


@dataclass(frozen=True, slots=True)
class RstStream:
    """A stream ends at once, in both directions."""

    stream: int
    status: int


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings: nothing here depends on any."""


@dataclass(frozen=True, slots=True)
class Ping:
    """To be sent back, if its id is of the other side's parity."""

    id: int


@dataclass(frozen=True, slots=True)
class GoAway:
    """No new streams any more."""

    last_stream: int
    status: int = 0


@dataclass(frozen=True, slots=True)
class Headers:
    """More headers of a stream."""

    stream: int
    headers: Mapping[str, str]
    fin: bool = False


@dataclass(frozen=True, slots=True)
class WindowUpdate:
    """So many bytes more may be sent; stream 0 is the whole connection."""

    stream: int
    delta: int


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of a stream."""

    stream: int
    data: bytes
    fin: bool = False


Frame = SynStream | SynReply | RstStream | Settings | Ping | GoAway | Headers | WindowUpdate | Data


class FrameReader:
    """Frames out of bytes that come in pieces of any size."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._headers = HeaderReader()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with `data`.

        :raises ProtocolError: what came is no SPDY/3; the connection cannot be used further
        """
        self._buffer += data
        while len(self._buffer) >= _HEAD.size:
            first, second = _HEAD.unpack_from(self._buffer)
            flags, length = second >> 24, second & 0xFFFFFF
            if length > MAX_FRAME:
                raise ProtocolError(f"SPDY: a frame of {length} bytes; at most {MAX_FRAME} are taken")
            if len(self._buffer) < _HEAD.size + length:
                return
            body = bytes(self._buffer[_HEAD.size : _HEAD.size + length])
            del self._buffer[: _HEAD.size + length]
            frame = self._frame(first, flags, body)
            if frame is not None:
                yield frame

    def _frame(self, first: int, flags: int, body: bytes) -> Frame | None:
        if not first >> 31:
            return Data(first & _ID, body, bool(flags & FIN))
        version, kind = first >> 16 & 0x7FFF, first & 0xFFFF
        if version != VERSION:
            raise ProtocolError(f"SPDY: version {version}; this side speaks {VERSION}.1")
        return self._control(kind, flags, body)

    def _control(self, kind: int, flags: int, body: bytes) -> Frame | None:
        fin = bool(flags & FIN)
        match kind:
            case 1:
                stream, associated = _numbers(body, 2)
                headers = self._headers.read(_after(body, 10))
                unidirectional = bool(flags & UNIDIRECTIONAL)
                return SynStream(stream & _ID, headers, fin, unidirectional, associated & _ID, body[8] >> 5)
            case 2:
                return SynReply(_numbers(body, 1)[0] & _ID, self._headers.read(body[4:]), fin)
            case 3:
                stream, status = _numbers(body, 2)
                return RstStream(stream & _ID, status)
            case 4:
                return Settings()
            case 6:
                return Ping(_numbers(body, 1)[0])
            case 7:
                last, status = _numbers(body, 2)
                return GoAway(last & _ID, status)
            case 8:
                return Headers(_numbers(body, 1)[0] & _ID, self._headers.read(body[4:]), fin)
            case 9:
                stream, delta = _numbers(body, 2)
                return WindowUpdate(stream & _ID, delta & _ID)
        return None


def _numbers(body: bytes, count: int) -> tuple[int, ...]:
    if len(body) < 4 * count:
        raise ProtocolError(f"SPDY: a control frame of {len(body)} bytes is too short")
    return struct.unpack_from(f">{count}I", body)


def _after(body: bytes, start: int) -> bytes:
    if len(body) < start:
        raise ProtocolError(f"SPDY: a control frame of {len(body)} bytes is too short")
    return body[start:]


class FrameWriter:
    """Frames to bytes; to be sent in the order in which they were rendered."""

    def __init__(self) -> None:
        self._headers = HeaderWriter()

    def render(self, frame: Frame) -> bytes:
        """The bytes of a frame."""
        match frame:
            case Data(stream, data, fin):
                return _HEAD.pack(stream & _ID, FIN * fin << 24 | len(data)) + data
            case SynStream(stream, headers, fin, unidirectional, associated, priority):
                flags = FIN * fin | UNIDIRECTIONAL * unidirectional
                fixed = struct.pack(">IIBB", stream, associated, priority << 5, 0)
                return _control(1, flags, fixed + self._headers.write(headers))
            case SynReply(stream, headers, fin):
                return _control(2, FIN * fin, struct.pack(">I", stream) + self._headers.write(headers))
            case RstStream(stream, status):
                return _control(3, 0, struct.pack(">II", stream, status))
            case Settings():
                return _control(4, 0, struct.pack(">I", 0))
            case Ping(number):
                return _control(6, 0, struct.pack(">I", number))
            case GoAway(last, status):
                return _control(7, 0, struct.pack(">II", last, status))
            case Headers(stream, headers, fin):
                return _control(8, FIN * fin, struct.pack(">I", stream) + self._headers.write(headers))
            case WindowUpdate(stream, delta):
                return _control(9, 0, struct.pack(">II", stream, delta))
        raise AssertionError(frame)


def _control(kind: int, flags: int, body: bytes) -> bytes:
    return _HEAD.pack(1 << 31 | VERSION << 16 | kind, flags << 24 | len(body)) + body
