"""The WebSocket and HTTP clients, against wsproto's and aiohttp's servers and against broken ones."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hostd_standin import TOKEN, StandIn
from hypothesis import given
from hypothesis import strategies as st
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Ping, Request

from hypervisor.cli import rest, session, ws
from hypervisor.cli.rest import Connection
from hypervisor.cli.state import Endpoint
from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound, ProtocolError, Timeout, Unavailable


def endpoint(host: StandIn) -> Endpoint:
    return Endpoint(str(host.state), "127.0.0.1", host._runner.addresses[0][1], TOKEN)


# ---- frames ----------------------------------------------------------------------------------------------------------


def wsproto_server() -> WSConnection:
    """wsproto's server side after its handshake: an implementation of RFC 6455 that is not ours."""
    server = WSConnection(ConnectionType.SERVER)
    server.receive_data(
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert [type(e) for e in server.events()] == [Request]
    server.send(AcceptConnection())
    return server


@given(st.lists(st.binary(max_size=70000), max_size=3))
def test_what_is_encoded_wsproto_decodes(messages: list[bytes]) -> None:
    server = wsproto_server()
    got = bytearray()
    for message in messages:
        server.receive_data(ws.encode(ws.BINARY, message))
        got += b"".join(e.data for e in server.events() if isinstance(e, BytesMessage))
    assert bytes(got) == b"".join(messages)


@given(st.lists(st.tuples(st.binary(max_size=70000), st.booleans()), max_size=5), st.integers(1, 5000))
def test_what_wsproto_encodes_is_decoded(pieces: list[tuple[bytes, bool]], step: int) -> None:
    """Fragments are joined, pings come between them, and bytes may be cut anywhere."""
    server = wsproto_server()
    data, expected, message = b"", [], b""
    for payload, finished in [*pieces, (b"end", True)]:
        data += server.send(BytesMessage(payload, message_finished=finished)) + server.send(Ping(b"?"))
        message += payload
        if finished:
            expected.append((ws.BINARY, message))
            message = b""
    data += server.send(CloseConnection(1000, "bye"))
    decoder, got = ws.Decoder(), []
    for start in range(0, len(data), step):
        decoder.feed(data[start : start + step])
        got += decoder.messages()
    assert [m for m in got if m[0] == ws.BINARY] == expected
    assert got[-1] == (ws.CLOSE, b"\x03\xe8bye")
    assert (ws.PING, b"?") in got


@pytest.mark.parametrize(
    "data",
    [
        b"\x82\x81\x00\x00\x00\x00a",  # masked
        b"\xc2\x01a",  # a reserved bit
        b"\x83\x01a",  # an opcode that there is not
        b"\x80\x01a",  # a continuation of nothing
        b"\x02\x01a\x82\x01b",  # a message within another
        b"\x09\x00",  # a fragmented ping
        b"\x89\x7e\x00\x7e" + b"a" * 126,  # a long one
        b"\x82\x7f\x00\x00\x00\x00\x7f\xff\xff\xff",  # 2 GiB
    ],
)
def test_broken_frames_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="hostd sent"):
        list(ws.Decoder(data).messages())


@given(st.binary(max_size=300))
def test_any_bytes_give_messages_or_an_error(data: bytes) -> None:
    with suppress(ProtocolError):
        list(ws.Decoder(data).messages())


def test_endless_fragments_are_refused() -> None:
    decoder = ws.Decoder(b"\x02\x00")
    piece = b"\x00\x7e\xff\xff" + bytes(65535)
    with pytest.raises(ProtocolError, match="longer"):
        for _ in range(ws.MAX_MESSAGE // 65535 + 2):
            decoder.feed(piece)
            list(decoder.messages())


# ---- the upgrade -----------------------------------------------------------------------------------------------------


def test_handshake_takes_the_newest_subprotocol(host: StandIn) -> None:
    with Connection(endpoint(host)) as connection:
        where = rest.target(("exec", "default", "hello", "main"), [("command", "true"), ("output", "1")])
        assert ws.handshake(connection, where, session.PROTOCOLS) == session.V5


def test_a_refused_upgrade_says_why(host: StandIn) -> None:
    with Connection(endpoint(host)) as connection, pytest.raises(NotFound, match="there is no pod x"):
        ws.handshake(connection, "/exec/default/x/main?command=a", session.PROTOCOLS)


# ---- HTTP against servers that misbehave -----------------------------------------------------------------------------


@contextmanager
def canned(*answers: bytes) -> Iterator[Endpoint]:
    """A server that reads something from each connection, sends an answer and closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for answer in answers:
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield Endpoint("/nowhere", "127.0.0.1", listener.getsockname()[1], "t")
    finally:
        thread.join(10)
        listener.close()


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + body


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (answer(b"{}", "Content-Length: 2"), b"{}"),
        (answer(b"all of it"), b"all of it"),
        (answer(b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: x\r\n\r\n", "Transfer-Encoding: chunked"), b"abcde"),
        (answer(b"", "Content-Length: 0"), b""),
    ],
)
def test_bodies(data: bytes, body: bytes) -> None:
    with canned(data) as there, Connection(there) as connection:
        assert connection.request("GET", "/").read() == body


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", Unavailable, "closed the connection"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", ProtocolError, "does not speak HTTP"),
        (answer(b"", "Content-Length: x"), ProtocolError, "broken length"),
        (answer(b"", "Content-Length: -1"), ProtocolError, "broken length"),
        (answer(b"ab", "Content-Length: 3"), Unavailable, "in the middle"),
        (answer(b"zz\r\n", "Transfer-Encoding: chunked"), ProtocolError, "broken length"),
        (answer(b"3\r\nab", "Transfer-Encoding: chunked"), Unavailable, "in the middle"),
        (answer(b"", "X: " + "a" * 100_000), ProtocolError, "too long"),
        (answer(b"not json", "Content-Length: 8"), ProtocolError, "no JSON"),
    ],
)
def test_broken_answers(data: bytes, error: type[HvError], message: str) -> None:
    with canned(data) as there, Connection(there) as connection, pytest.raises(error, match=message):
        connection.get("x")


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        ("404 Not Found", b'{"message":"no pod a"}', NotFound, "^no pod a$"),
        ("409 Conflict", b'{"message":"exists"}', Conflict, "^exists$"),
        ("422 X", b'{"message":"spec: bad"}', InvalidInput, "^spec: bad$"),
        ("400 X", b"Got more than 8190 bytes\nwhen reading", InvalidInput, "^Got more than 8190 bytes$"),
        ("401 X", b"{}", HvError, "token"),
        ("500 X", b"[]", HvError, "HTTP 500"),
        ("503 X", b"", Unavailable, "HTTP 503"),
    ],
)
def test_refusals(status: str, body: bytes, error: type[HvError], message: str) -> None:
    data = answer(body, f"Content-Length: {len(body)}", status=status)
    with canned(data) as there, Connection(there) as connection, pytest.raises(error, match=message):
        connection.get("x")


@pytest.mark.parametrize("data", [b"nonsense\n", b"[1]\n"])
def test_broken_lines(data: bytes) -> None:
    with canned(answer(data)) as there, Connection(there) as connection, pytest.raises(ProtocolError, match="no JSON"):
        list(connection.call("GET", "/").objects())


def test_lines_may_come_in_pieces_and_without_an_end() -> None:
    data = answer(b'8\r\n{"a":1}\n\r\n4\r\n{"b"\r\n3\r\n:2}\r\n0\r\n\r\n', "Transfer-Encoding: chunked")
    with canned(data) as there, Connection(there) as connection:
        assert list(connection.call("GET", "/").objects()) == [{"a": 1}, {"b": 2}]


def test_a_server_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        there = Endpoint("/nowhere", "127.0.0.1", silent.getsockname()[1], "t")
        with Connection(there, 0.05) as connection, pytest.raises(Timeout, match="did not answer"):
            connection.get("x")


def test_a_refused_upload_gives_the_servers_reason() -> None:
    refusal = answer(b'{"message":"full"}', "Content-Length: 18", status="507 X")

    def upload(write: Any) -> None:
        for _ in range(10_000):
            write(os.urandom(65536))

    with canned(refusal) as there, Connection(there) as connection, pytest.raises(HvError):
        connection.call("PUT", "/", upload)


def test_what_an_upload_raises_goes_through(host: StandIn) -> None:
    def upload(write: Any) -> None:
        write(b"abc")
        raise FileNotFoundError("gone")

    with Connection(endpoint(host)) as connection, pytest.raises(FileNotFoundError):
        connection.call(
            "PUT", rest.target(("hv", "v1", "pods", "default", "hello", "archive"), [("path", "/")]), upload
        )


@given(st.text())
def test_quoting(text: str) -> None:
    from urllib.parse import unquote

    try:
        text.encode()
    except UnicodeEncodeError:
        return
    assert unquote(rest.quote(text)) == text
