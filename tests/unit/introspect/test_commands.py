"""Requests become commands, commands become requests to the agent: values in, values out."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import MultiDict

from hypervisor.errors import InvalidInput
from hypervisor.introspect.commands import NS, AttachCommand, ExecCommand, LogsCommand, parse_rfc3339_ns, query_of


def query(**values: str | list[str]) -> MultiDict[str]:
    pairs: MultiDict[str] = MultiDict()
    for key, value in values.items():
        for one in [value] if isinstance(value, str) else value:
            pairs.add(key, one)
    return pairs


def test_words_that_are_no_text_stay_what_they_are() -> None:
    command = ExecCommand.parse("c", query_of("command=%FF%FEa+b&command=%C3%A4&command=&output=1"))
    assert [os.fsencode(word) for word in command.argv] == [b"\xff\xfea b", "ä".encode(), b""]


def test_exec_keeps_every_argument_in_order() -> None:
    command = ExecCommand.parse("c", query(command=["sh", "-c", "a  b", ""], stdout="true", stdin="1"))
    call, args = command.agent_request()
    assert call == "exec"
    assert args["argv"] == ["sh", "-c", "a  b", ""]
    assert (args["stdin"], args["tty"]) == (True, False)


def test_both_spellings_of_the_streams() -> None:
    a = ExecCommand.parse("c", query(command="x", input="1", output="1", error="1"))
    b = ExecCommand.parse("c", query(command="x", stdin="true", stdout="true", stderr="true"))
    assert a == b


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"stdout": "1"}, "command"),
        ({"command": "x"}, "stdin"),
        ({"command": "x", "tty": "1", "stdout": "1", "stderr": "1"}, "stderr"),
        ({"command": "x", "stdout": "maybe"}, "stdout"),
    ],
)
def test_bad_exec_names_the_field(values: dict[str, str], where: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        ExecCommand.parse("c", query(**values))
    assert caught.value.where == where


def test_attach_with_a_tty_asks_for_one_output() -> None:
    _, args = AttachCommand.parse("c", query(stdin="1", stdout="1", tty="1")).agent_request()
    assert (args["stdout"], args["stderr"], args["replay"]) == (True, False, False)


def test_logs_since_seconds_is_measured_from_now() -> None:
    command = LogsCommand.parse("c", query(sinceSeconds="5", tailLines="0", limitBytes="9"), now_ns=100 * NS)
    assert (command.since_ns, command.tail, command.limit_bytes) == (95 * NS, 0, 9)


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"tailLines": "-1"}, "tailLines"),
        ({"tailLines": "x"}, "tailLines"),
        ({"limitBytes": "0"}, "limitBytes"),
        ({"sinceSeconds": "0"}, "sinceSeconds"),
        ({"sinceTime": "yesterday"}, "sinceTime"),
        ({"sinceTime": "2026-01-31T12:00:00"}, "sinceTime"),
        ({"sinceSeconds": "1", "sinceTime": "2026-01-31T12:00:00Z"}, "sinceTime"),
        ({"follow": "si"}, "follow"),
    ],
)
def test_bad_logs_names_the_field(values: dict[str, str], where: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        LogsCommand.parse("c", query(**values))
    assert caught.value.where == where


@given(st.integers(0, 4_000_000_000), st.integers(0, NS - 1))
def test_rfc3339_keeps_nanoseconds(seconds: int, fraction: int) -> None:
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{fraction:09d}Z"
    assert parse_rfc3339_ns(text) == seconds * NS + fraction


def test_rfc3339_with_an_offset() -> None:
    assert parse_rfc3339_ns("1970-01-01T01:00:01.5+01:00") == NS + NS // 2
