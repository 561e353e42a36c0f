"""WebSocket channel messages and Status objects."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.errors import InvalidInput, NotFound, Unavailable
from hypervisor.introspect.agent import Ending
from hypervisor.introspect.session import Resize, Stdin, StdinEnd
from hypervisor.introspect.status import status_of_ending, status_of_error
from hypervisor.introspect.websocket import parse_event


def test_stdin_and_its_end() -> None:
    assert parse_event(b"\x00abc", half_close=True) == Stdin(b"abc")
    assert parse_event(b"\x00", half_close=True) is None
    assert parse_event(b"\xff\x00", half_close=True) == StdinEnd()
    assert parse_event(b"\xff\x00", half_close=False) is None
    assert parse_event(b"\xff\x01", half_close=True) is None


def test_resize() -> None:
    assert parse_event(b'\x04{"Width":100,"Height":40}', half_close=True) == Resize(100, 40)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"null", b'{"Width":0,"Height":1}', b'{"Width":1e400,"Height":1}'])
def test_a_senseless_size_is_ignored(text: bytes) -> None:
    assert parse_event(b"\x04" + text, half_close=True) is None


@given(st.binary(min_size=1, max_size=200), st.booleans())
def test_no_message_breaks_the_parser(message: bytes, half_close: bool) -> None:
    parse_event(message, half_close=half_close)


def test_success() -> None:
    assert status_of_ending(Ending(0))["status"] == "Success"


@pytest.mark.parametrize("code", [1, 7, 126, 127, 137, 255])
def test_exit_code_is_a_cause(code: int) -> None:
    status = status_of_ending(Ending(code))
    assert status["reason"] == "NonZeroExitCode"
    assert status["details"]["causes"] == [{"reason": "ExitCode", "message": str(code)}]


def test_a_broken_session_is_not_an_exit_code() -> None:
    status = status_of_ending(Ending(255, error=Unavailable("the VM is gone")))
    assert (status["reason"], status["message"]) == ("InternalError", "the VM is gone")


def test_error_bodies() -> None:
    body = status_of_error(InvalidInput("is no number", where="tailLines"))
    assert body["code"] == 422
    assert body["details"]["causes"][0]["field"] == "tailLines"
    assert status_of_error(NotFound("no pod x"))["reason"] == "NotFound"
    json.dumps(body)
