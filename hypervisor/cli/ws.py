"""The client's side of RFC 6455, as much of it as the ``*.channel.k8s.io`` subprotocols need.

Not wsproto: importing it costs 55 ms, and it masks byte by byte. Theory of operation: `handshake` upgrades a
`Connection`; then bytes received go into `Decoder.feed`, which gives whole messages (fragments joined) and control
frames, and `encode` makes masked frames to send. No I/O here: `hypervisor.cli.session` owns the socket.
"""

from __future__ import annotations

import os
from binascii import b2a_base64

from hypervisor.cli.rest import Connection, error_from
from hypervisor.errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
MAX_MESSAGE = 8 * 1024 * 1024
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def encode(opcode: int, payload: bytes) -> bytes:
    """One final frame, masked as a client must."""
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, 0x80 | size))
    elif size < 0x10000:
        head = bytes((0x80 | opcode, 0x80 | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, 0x80 | 127)) + size.to_bytes(8, "big")
    key = os.urandom(4)
    return head + key + _mask(payload, key)


def _mask(payload: bytes, key: bytes) -> bytes:
    size = len(payload)
    stream = (key * (size // 4 + 1))[:size]  # one XOR of two long numbers: some 500 times a byte loop
    return (int.from_bytes(payload, "little") ^ int.from_bytes(stream, "little")).to_bytes(size, "little")


class Decoder:
    """Turns received bytes into messages. Holds at most one message and one partial frame."""

    def __init__(self, data: bytes = b"") -> None:
        self._buffer = bytearray(data)
        self._kind = CONTINUATION
        self._message = bytearray()

    def feed(self, data: bytes) -> None:
        """Adds received bytes."""
        self._buffer += data

    def messages(self) -> Iterator[tuple[int, bytes]]:
        """Whole messages and control frames as (opcode, payload), while there are any.

        :raises ProtocolError: the server broke RFC 6455 or a limit; the connection cannot be used any more
        """
        while frame := self._frame():
            final, opcode, payload = frame
            if opcode >= CLOSE:
                if not final or len(payload) > 125:
                    raise ProtocolError("hostd sent a broken WebSocket control frame")
                yield opcode, payload
            elif message := self._join(final, opcode, payload):
                yield message

    def _join(self, final: bool, opcode: int, payload: bytes) -> tuple[int, bytes] | None:
        if (opcode == CONTINUATION) != (self._kind != CONTINUATION):
            raise ProtocolError("hostd sent WebSocket fragments out of order")
        if final and opcode != CONTINUATION:
            return opcode, payload
        self._kind = opcode or self._kind
        self._message += payload
        if len(self._message) > MAX_MESSAGE:
            raise ProtocolError(f"hostd sent a message longer than {MAX_MESSAGE} bytes")
        if not final:
            return None
        whole = self._kind, bytes(self._message)
        self._kind, self._message = CONTINUATION, bytearray()
        return whole

    def _frame(self) -> tuple[bool, int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        final, opcode, size, start = bool(buffer[0] & 0x80), buffer[0] & 0x0F, buffer[1], 2
        if buffer[0] & 0x70 or size & 0x80 or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise ProtocolError("hostd sent a WebSocket frame that was not agreed on")
        if size >= 126:
            start += 2 if size == 126 else 8
            if len(buffer) < start:
                return None
            size = int.from_bytes(buffer[2:start], "big")
        if size > MAX_MESSAGE:
            raise ProtocolError(f"hostd sent a message longer than {MAX_MESSAGE} bytes")
        if len(buffer) < start + size:
            return None
        payload = bytes(memoryview(buffer)[start : start + size])
        del buffer[: start + size]
        return final, opcode, payload


def handshake(connection: Connection, where: str, protocols: Sequence[str]) -> str:
    """Upgrades the connection.

    :param where: request target
    :param protocols: subprotocols, the preferred one first
    :returns: the subprotocol that the server chose
    :raises HvError: the server refused (its reason), or what answers is no WebSocket server
    """
    key = b2a_base64(os.urandom(16), newline=False)
    headers = (
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", key.decode()),
        ("Sec-WebSocket-Protocol", ", ".join(protocols)),
    )
    response = connection.request("GET", where, None, headers)
    if response.status != 101:
        raise error_from(response.status, response.read())
    chosen = response.headers.get("sec-websocket-protocol", "")
    if response.headers.get("sec-websocket-accept") != _accept(key) or chosen not in protocols:
        raise ProtocolError("what listens on hostd's port broke the WebSocket handshake; run: hv host stop, then again")
    return chosen


def _accept(key: bytes) -> str:
    try:
        from _sha1 import sha1  # type: ignore[import-not-found]  # hashlib would load OpenSSL: 4 ms
    except ImportError:
        from hashlib import sha1
    return b2a_base64(sha1(key + _GUID).digest(), newline=False).decode()
