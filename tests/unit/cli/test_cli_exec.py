"""hv exec as a real process against the stand-in: bytes, exit codes, terminals, signals, what it imports."""

from __future__ import annotations

import hashlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hostd_standin import HV, ROOT, Hv, StandIn
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.cli import execute, session
from hypervisor.cli.exec_command import exec_


def test_streams_stay_apart_and_the_exit_code_is_the_commands(hv: Hv) -> None:
    done = hv("exec", "hello", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 7)


def test_success(hv: Hv) -> None:
    assert hv("exec", "hello", "true").returncode == 0


def test_killed_command(hv: Hv) -> None:
    assert hv("exec", "hello", "--", "sh", "-c", "kill -9 $$").returncode == 137


def test_stdin_is_half_closed(hv: Hv) -> None:
    """wc answers only after its end of file."""
    done = hv("exec", "-i", "hello", "--", "wc", "-c", input="12345")
    assert (done.stdout.strip(), done.returncode) == ("5", 0)


def test_without_i_nothing_is_read(hv: Hv) -> None:
    assert hv("exec", "hello", "--", "wc", "-c", input="12345").stdout.strip() == "0"


def test_big_data_comes_back_the_same(hv: Hv) -> None:
    data = os.urandom(32 << 20)
    done = hv("exec", "-i", "hello", "--", "cat", input=data, text=False)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


def test_command_that_does_not_read_its_input(hv: Hv) -> None:
    done = hv("exec", "-i", "hello", "--", "sh", "-c", "exit 3", input=os.urandom(8 << 20), text=False)
    assert done.returncode == 3


def test_arguments_arrive_as_they_are(hv: Hv) -> None:
    words = ["a b", "", "ä€", "x&y=z%20+", "--", "-it", "new\nline"]
    done = hv("exec", "hello", "--", sys.executable, "-c", "import sys; print(sys.argv[1:])", *words)
    assert done.stdout == f"{words}\n"


def test_container_is_asked_for_by_name(hv: Hv, host: StandIn) -> None:
    hv("exec", "-c", "side", "hello", "true")
    hv("exec", "hello", "true")
    paths = [path.partition("?")[0] for _, path in host.requests]
    assert paths == ["/exec/default/hello/side", "/hv/v1/pods/default/hello", "/exec/default/hello/main"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nothere", "--", "true"), "hv: there is no pod nothere; hv ps lists them\n"),
        (("hello", "--", "unavailable"), "hv: pod hello has no running VM\n"),
        (("a/b/c", "--", "true"), "hv: 'a/b/c' is no pod; write NAME or NAMESPACE/NAME\n"),
    ],
)
def test_own_errors_are_one_line_and_125(hv: Hv, args: tuple[str, ...], message: str) -> None:
    done = hv("exec", *args)
    assert (done.stderr, done.stdout, done.returncode) == (message, "", 125)


def test_a_session_that_breaks_is_an_error_after_its_output(hv: Hv) -> None:
    done = hv("exec", "hello", "--", "broken")
    assert (done.stdout, done.returncode) == ("before", 125)
    assert done.stderr == "hv: hostd ended the session before the process ended: the VM died\n"


@pytest.mark.parametrize("args", [(), ("hello",), ("--nope", "hello", "true"), ("hello", "-c")])
def test_wrong_usage(hv: Hv, args: tuple[str, ...]) -> None:
    done = hv("exec", *args)
    assert done.returncode == 2
    assert done.stderr.startswith("hv: ")
    assert "hv exec --help" in done.stderr
    assert done.stderr.count("\n") == 1


def test_reader_of_the_output_goes_away(environment: dict[str, str], host: StandIn) -> None:
    """As with any other tool: quiet, and by SIGPIPE."""
    process = subprocess.Popen([*HV, "exec", "hello", "--", "yes"], stdout=-1, stderr=-1, env=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(30) == -signal.SIGPIPE
    assert process.stderr.read() == b""


def test_slow_reader_stops_the_command(environment: dict[str, str], host: StandIn) -> None:
    """What nobody reads is not kept in memory: the command writes until pipes and windows are full, then waits."""
    process = subprocess.Popen([*HV, "exec", "hello", "--", "yes"], stdout=-1, env=environment)
    assert process.stdout is not None
    process.stdout.read(1)
    status = Path(f"/proc/{process.pid}/status")
    for _ in range(20):
        assert not select.select([], [], [], 0.05)[0]  # time for a leak to show
        size = next(int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmRSS"))
        assert size < 64 * 1024, "KiB of resident memory"
    process.stdout.close()
    assert process.wait(30) == -signal.SIGPIPE


def test_sigterm_ends_it(environment: dict[str, str], host: StandIn) -> None:
    process = subprocess.Popen(
        [*HV, "exec", "hello", "--", "sh", "-c", "echo up; sleep 60"], stdout=-1, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.terminate()
    assert process.wait(30) == 143


# ---- terminals -------------------------------------------------------------------------------------------------------


class Terminal:
    """hv on a pseudo-terminal of its own."""

    def __init__(self, process: subprocess.Popen[bytes], leader: int, follower: int) -> None:
        self.process, self.leader, self.follower = process, leader, follower
        self.seen = b""

    def expect(self, text: bytes) -> None:
        while text not in self.seen:
            assert select.select([self.leader], [], [], 30)[0], f"{text!r} did not come; seen: {self.seen!r}"
            self.seen += os.read(self.leader, 65536)
        self.seen = self.seen.partition(text)[2]

    def type(self, data: bytes) -> None:
        os.write(self.leader, data)

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.follower)[3] & termios.ICANON


@contextmanager
def on_terminal(environment: dict[str, str], *args: str) -> Iterator[Terminal]:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (33, 101))
    process = subprocess.Popen(
        [*HV, *args], stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True
    )
    try:
        yield Terminal(process, leader, follower)
    finally:
        process.kill()
        process.wait()
        os.close(leader)
        os.close(follower)


def test_terminal_is_raw_sized_and_restored(environment: dict[str, str], host: StandIn) -> None:
    with on_terminal(environment, "exec", "-it", "hello", "--", "sh", "-c", "read x; stty size; read y; exit 4") as tty:
        tty.type(b"\n")
        tty.expect(b"33 101")
        assert tty.is_raw()
        tty.type(b"\n")
        assert tty.process.wait(30) == 4
        assert not tty.is_raw()


def test_window_change_is_passed_on(environment: dict[str, str], host: StandIn) -> None:
    script = "echo up; read x; stty size; read y"
    with on_terminal(environment, "exec", "-it", "hello", "--", "sh", "-c", script) as tty:
        tty.expect(b"up")
        termios.tcsetwinsize(tty.follower, (40, 120))
        tty.process.send_signal(signal.SIGWINCH)
        tty.type(b"\n")
        tty.expect(b"40 120")


def test_ctrl_c_is_typed_into_the_terminal(environment: dict[str, str], host: StandIn) -> None:
    script = "stty -isig -icanon -echo; echo up; dd bs=1 count=1 2>/dev/null | od -An -tx1"
    with on_terminal(environment, "exec", "-it", "hello", "--", "sh", "-c", script) as tty:
        tty.expect(b"up")
        tty.type(b"\x03")
        tty.expect(b"03")
        assert tty.process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_terminal_is_restored_after_a_signal(
    environment: dict[str, str], host: StandIn, number: signal.Signals
) -> None:
    with on_terminal(environment, "exec", "-it", "hello", "--", "sh", "-c", "echo up; sleep 60") as tty:
        tty.expect(b"up")
        assert tty.is_raw()
        tty.process.send_signal(number)
        assert tty.process.wait(30) == 128 + number
        assert not tty.is_raw()


def test_terminal_is_restored_after_an_error(environment: dict[str, str], host: StandIn) -> None:
    with on_terminal(environment, "exec", "-it", "hello", "--", "sh", "-c", "echo up; sleep 60") as tty:
        tty.expect(b"up")
        host.call(host._runner.cleanup())
        assert tty.process.wait(30) == 125
        assert not tty.is_raw()
        tty.expect(b"hv: hostd ")


def test_t_without_a_terminal_goes_on_without(hv: Hv) -> None:
    done = hv("exec", "-it", "hello", "--", "sh", "-c", "test -t 0 || echo none")
    assert (done.stdout, done.returncode) == ("none\n", 0)
    assert done.stderr == "hv: standard input is no terminal; going on without -t\n"


# ---- the hot path ----------------------------------------------------------------------------------------------------


def test_exec_imports_nothing_heavy(environment: dict[str, str], host: StandIn) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *HV[1:], "exec", "hello", "--", "true"],
        capture_output=True,
        text=True,
        env={k: v for k, v in environment.items() if not k.startswith("COVERAGE")},
        check=True,
        cwd=ROOT,
    )
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    heavy = {"aiohttp", "rich", "pydantic", "asyncio", "click", "wsproto", "ssl", "email", "typing", "inspect", "http"}
    assert not imported & heavy


_OPTIONS = "-i -t -it -ti -c side -cside -ic --container=x --container --stdin --tty --help"
_WORDS = st.lists(st.sampled_from([*_OPTIONS.split(), "hello", "ls", "-l", "--", "-", "", "a b"]), max_size=7)


@given(_WORDS)
def test_the_quick_parser_agrees_with_click(args: list[str]) -> None:
    """Whatever the quick parser takes, click reads the same way."""
    quick = execute.parse_quickly(args)
    if quick is None:
        return
    params: dict[str, Any] = exec_.make_context("exec", list(args)).params
    assert quick.pod == params["pod"]
    assert quick.command == list(params["command"])
    assert (quick.container or None) == (params["container"] or None)
    assert (quick.stdin, quick.tty) == (params["stdin"], params["tty"])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("-it hello -- sh -c x", ("hello", ["sh", "-c", "x"], "", True, True)),
        ("hello -c side -- ls", ("hello", ["ls"], "side", False, False)),
        ("hello ls -l", ("hello", ["ls", "-l"], "", False, False)),
        ("-i -- hello -- -x", ("hello", ["-x"], "", True, False)),
        ("hello -- -- x", ("hello", ["--", "x"], "", False, False)),
    ],
)
def test_quick_parser(args: str, expected: tuple[object, ...]) -> None:
    got = execute.parse_quickly(args.split())
    assert got is not None
    assert (got.pod, got.command, got.container, got.stdin, got.tty) == expected


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        ({"status": "Success"}, 0, ""),
        ({"status": "Failure", "message": "boom"}, None, "boom"),
        ({"status": "Failure", "details": {"causes": [{"reason": "ExitCode", "message": "3"}]}}, 3, None),
        ({"status": "Failure", "details": {"causes": [{"reason": "ExitCode", "message": "x"}]}}, None, None),
    ],
)
def test_status(status: dict[str, Any], code: int | None, message: str | None) -> None:
    outcome = session.outcome_of(status)
    assert outcome.exit_code == code
    assert message is None or outcome.message == message
