"""Introspection commands as values: what came in over TCP, and what goes to the agent over vsock.

Source: US 11513830: a request in a first protocol carries an introspection command; a second request in the virtual
socket protocol is formulated from it. Here that formulation is `agent_request`, a pure function of a frozen value.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import parse_qsl

from multidict import MultiDict, MultiMapping

from hypervisor.errors import InvalidInput
from hypervisor.introspect.agent import Ending

NS = 1_000_000_000
SHELL = ("sh",)
"""What runs in a guest when no command is given."""


@dataclass(frozen=True)
class ExecCommand:
    """Run `argv` in a container with the streams that the client asked for."""

    container: str
    argv: tuple[str, ...]
    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool

    @classmethod
    def parse(cls, container: str, query: MultiMapping[str]) -> ExecCommand:
        """:raises InvalidInput: no command, or a tty together with a separate stderr"""
        argv = tuple(query.getall("command", []))
        if not argv:
            raise InvalidInput("no command given; add ?command=...", where="command")
        streams = _streams(query)
        return cls(container, argv, **streams)

    def agent_request(self) -> tuple[str, dict[str, Any]]:
        """The second request: call name and arguments."""
        return "exec", {
            "container": self.container,
            "argv": list(self.argv),
            "env": {},
            "cwd": None,
            "user": None,
            "tty": self.tty,
            "stdin": self.stdin,
            "columns": 80,
            "rows": 24,
        }

    def ending(self, ending: Ending) -> Ending:
        """What the client is told of the process's end: all of it."""
        return ending


@dataclass(frozen=True)
class DebugCommand:
    """Run `argv` in the guest itself, beside its containers, as root."""

    argv: tuple[str, ...]
    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool

    @classmethod
    def parse(cls, query: MultiMapping[str]) -> DebugCommand:
        """:raises InvalidInput: as `ExecCommand.parse`"""
        return cls(tuple(query.getall("command", [])) or SHELL, **_streams(query))

    def agent_request(self) -> tuple[str, dict[str, Any]]:
        """The second request: call name and arguments."""
        size = {"tty": self.tty, "columns": 80, "rows": 24}
        return "debug", {"argv": list(self.argv), "stdin": self.stdin, **size}

    def ending(self, ending: Ending) -> Ending:
        """What the client is told of the process's end: all of it."""
        return ending


@dataclass(frozen=True)
class AttachCommand:
    """Join the streams of a container's own process.

    :ivar replay: begin with what the container has written so far (an extension; upstream clients never ask for it)
    :ivar exit_code: end with the process's exit code (an extension). A kubelet ends every attach that was not broken
        off with success, and clients read the code in the pod's status: `kubectl run --rm` takes anything else for a
        failure to attach, and falls back to the log
    """

    container: str
    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool
    replay: bool = False
    exit_code: bool = False

    @classmethod
    def parse(cls, container: str, query: MultiMapping[str]) -> AttachCommand:
        """:raises InvalidInput: as `ExecCommand.parse`"""
        extensions = {"replay": _flag(query, "replay"), "exit_code": _flag(query, "exitCode")}
        return cls(container, **_streams(query), **extensions)

    def agent_request(self) -> tuple[str, dict[str, Any]]:
        """The second request: call name and arguments."""
        return "attach", {
            "container": self.container,
            "stdin": self.stdin,
            "stdout": self.stdout or self.tty,
            "stderr": self.stderr and not self.tty,
            "replay": self.replay,
        }

    def ending(self, ending: Ending) -> Ending:
        """What the client is told of the process's end (see `exit_code`)."""
        return ending if self.exit_code or ending.error is not None else Ending(0)


def query_of(raw: str) -> MultiMapping[str]:
    """A request's query. A command's words are bytes, which need not be text: others than UTF-8 become surrogates, as
    in `os.fsdecode`, and reach the process as they were.

    :param raw: as it came, still quoted
    """
    return MultiDict(parse_qsl(raw, keep_blank_values=True, errors="surrogateescape"))


StreamCommand = ExecCommand | DebugCommand | AttachCommand


@dataclass(frozen=True)
class LogsCommand:
    """Read a container's log; every bound is optional.

    :ivar tail: lines from the end
    :ivar since_ns: nanoseconds since the epoch; older lines are left out
    :ivar limit_bytes: stop after so many bytes of output
    """

    container: str
    previous: bool = False
    follow: bool = False
    tail: int | None = None
    since_ns: int | None = None
    limit_bytes: int | None = None
    timestamps: bool = False

    @classmethod
    def parse(cls, container: str, query: MultiMapping[str], *, now_ns: int | None = None) -> LogsCommand:
        """:raises InvalidInput: a number that is none or negative, a bad time, sinceSeconds and sinceTime together"""
        return cls(
            container=container,
            previous=_flag(query, "previous"),
            follow=_flag(query, "follow"),
            tail=_number(query, "tailLines", minimum=0),
            since_ns=_since(query, time.time_ns() if now_ns is None else now_ns),
            limit_bytes=_number(query, "limitBytes", minimum=1),
            timestamps=_flag(query, "timestamps"),
        )

    def agent_request(self) -> tuple[str, dict[str, Any]]:
        """The second request: call name and arguments."""
        return "logs", {
            "container": self.container,
            "previous": self.previous,
            "follow": self.follow,
            "tail": self.tail,
            "since_ns": self.since_ns,
            "limit_bytes": self.limit_bytes,
            "timestamps": self.timestamps,
        }


def _streams(query: MultiMapping[str]) -> Mapping[str, bool]:
    """The stream flags, in either spelling: kubelet's own (input, output, error) and the API server's."""
    streams = {
        "stdin": _flag(query, "stdin") or _flag(query, "input"),
        "stdout": _flag(query, "stdout") or _flag(query, "output"),
        "stderr": _flag(query, "stderr") or _flag(query, "error"),
        "tty": _flag(query, "tty"),
    }
    if streams["tty"] and streams["stderr"]:
        raise InvalidInput("a terminal has no separate stderr; leave one of tty and stderr out", where="stderr")
    if not (streams["stdin"] or streams["stdout"] or streams["stderr"]):
        raise InvalidInput("ask for at least one of stdin, stdout, stderr", where="stdin")
    return streams


def _flag(query: MultiMapping[str], name: str) -> bool:
    value = query.get(name, "").lower()
    if value in ("", "0", "false", "f", "no"):
        return False
    if value in ("1", "true", "t", "yes"):
        return True
    raise InvalidInput(f"{value!r} is not a boolean; use true or false", where=name)


def _number(query: MultiMapping[str], name: str, *, minimum: int) -> int | None:
    text = query.get(name, "")
    if not text:
        return None
    try:
        value = int(text)
    except ValueError:
        raise InvalidInput(f"{text!r} is not a whole number", where=name) from None
    if value < minimum:
        raise InvalidInput(f"{value} is less than {minimum}", where=name)
    return value


def _since(query: MultiMapping[str], now_ns: int) -> int | None:
    seconds = _number(query, "sinceSeconds", minimum=1)
    text = query.get("sinceTime", "")
    if seconds is not None and text:
        raise InvalidInput("give sinceSeconds or sinceTime, not both", where="sinceTime")
    if seconds is not None:
        return now_ns - seconds * NS
    return parse_rfc3339_ns(text) if text else None


def parse_rfc3339_ns(text: str) -> int:
    """Nanoseconds since the epoch of an RFC 3339 time with up to nine fractional digits.

    :raises InvalidInput: not such a time, or one without a zone
    """
    whole, dot, rest = text.partition(".")
    digits = len(rest) - len(rest.lstrip("0123456789"))
    fraction, zone = (rest[:digits], rest[digits:]) if dot else ("", "")
    try:
        moment = datetime.fromisoformat(whole + zone)
    except ValueError:
        raise InvalidInput(
            f"{text!r} is not an RFC 3339 time such as 2026-01-31T12:00:00Z", where="sinceTime"
        ) from None
    if moment.tzinfo is None:
        raise InvalidInput(f"{text!r} has no time zone; end it with Z", where="sinceTime")
    return int(moment.timestamp()) * NS + int((fraction + "0" * 9)[:9])
