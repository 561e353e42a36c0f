"""Small parts of the command line, each by itself."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.cli import doctor, host, main, pods, progress, starter
from hypervisor.cli.rest import Connection
from hypervisor.cli.state import pod_reference, read_endpoint, state_dir
from hypervisor.cli.terminal import DETACH_KEYS, DetachFilter
from hypervisor.controller.paths import state_directory
from hypervisor.errors import InvalidInput, Unavailable
from hypervisor.vmm.checks import Finding

# ---- detach keys -----------------------------------------------------------------------------------------------------


@given(st.binary(max_size=30), st.lists(st.integers(1, 5)))
def test_detach_keys_are_found_however_they_come(data: bytes, cuts: list[int]) -> None:
    data = data.replace(b"\x00", DETACH_KEYS[:1]).replace(b"\x01", DETACH_KEYS[1:])
    keys, sent, detached, rest = DetachFilter(), b"", False, data
    for cut in [*cuts, len(data) + 1]:
        piece, rest = rest[:cut], rest[cut:]
        if piece and not detached:
            out, detached = keys.feed(piece)
            sent += out
    at = data.find(DETACH_KEYS)
    assert detached is (at >= 0)
    held = data[:-1] if data.endswith(DETACH_KEYS[:1]) else data
    assert sent == (data[:at] if detached else held)


# ---- the state folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HV_STATE_DIR": "/s"},
        {"HV_STATE_DIR": "~/s"},
        {"HV_STATE_DIR": "relative"},
        {"XDG_STATE_HOME": "/x"},
        {"XDG_STATE_HOME": "relative"},
    ],
)
def test_the_state_folder_is_the_daemons(
    monkeypatch: pytest.MonkeyPatch, uid: int, environment: dict[str, str]
) -> None:
    """hv has a copy of the rule, since importing the daemon's would cost more than a whole hv exec."""
    for name in ("HV_STATE_DIR", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.geteuid", lambda: uid)
    assert state_dir() == str(state_directory().root)
    assert state_dir("/given") == str(state_directory("/given").root)


def test_somebody_elses_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied", "token")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(Unavailable, match="belongs to another user"):
        read_endpoint(str(tmp_path))


@pytest.mark.parametrize("text", ["", "/", "a/", "/a", "a/b/c"])
def test_bad_pod_names(text: str) -> None:
    with pytest.raises(InvalidInput, match="NAMESPACE/NAME"):
        pod_reference(text)


# ---- starting the daemon ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message"),
    [("print('no'); raise SystemExit(3)", r"exit code 3\): no; its log"), ("pass", "it said nothing")],
)
def test_a_daemon_that_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    def spawn(_state: str, output: int, _options: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["python3", "-c", code], stdout=output, stderr=output)

    monkeypatch.setattr(starter, "_spawn", spawn)
    with pytest.raises(Unavailable, match=message):
        starter.start_host(str(tmp_path / "s"), 1)


def test_a_python_that_this_user_may_not_execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The venv of another user, say: the state folder is not to blame."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    with pytest.raises(Unavailable, match=r"cannot start hostd by .*python3: No such file"):
        starter.start_host(str(tmp_path / "s"), 1)


def test_a_daemon_that_never_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[subprocess.Popen[bytes]] = []

    def spawn(_state: str, output: int, _options: object) -> subprocess.Popen[bytes]:
        running.append(subprocess.Popen(["sleep", "60"], stdout=output, stderr=output))
        return running[0]

    monkeypatch.setattr(starter, "_spawn", spawn)
    monkeypatch.setattr(starter, "START_TIMEOUT", 0.1)
    with pytest.raises(Unavailable, match="did not listen"):
        starter.start_host(str(tmp_path / "s"), 1)
    assert running[0].wait(10) == -15


def test_held_lock(tmp_path: Path) -> None:
    assert not starter._held(str(tmp_path))
    with (tmp_path / "host.lock").open("w") as lock:
        assert not starter._held(str(tmp_path))
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert starter._held(str(tmp_path))


# ---- what is printed -------------------------------------------------------------------------------------------------


def test_findings(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("a", "ok", "here"), Finding("b", "fail", "gone", "apt install b", True)]
    assert doctor.print_findings(findings[:1], "table") == 0
    assert doctor.print_findings(findings, "table") == 1
    printed = capsys.readouterr().out
    assert "MISSING   b       gone\n                  fix: apt install b\n" in printed
    assert printed.endswith("hv run cannot work here yet: b\n")
    assert doctor.print_findings(findings, "json") == 1


def test_bars(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bars("x") as show:
        show({"phase": "download", "done": 1, "total": 10})
        show({"phase": "download", "done": 10, "total": 10})
        show({"phase": "done"})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"phase": "Pending"}, None),
        ({"phase": "Failed", "reason": "VmFailed", "message": "it died"}, "VmFailed: it died"),
        ({"phase": "Failed"}, "Failed"),
        ({"phase": "Failed", "containerStatuses": [{"name": "c", "state": {"terminated": {"exitCode": 1}}}]}, None),
        ({"containerStatuses": [{"name": "c", "state": {"waiting": {"reason": "ErrImagePull"}}}]}, "ErrImagePull"),
        ({"containerStatuses": [{"name": "c", "state": {"waiting": {"reason": "ContainerCreating"}}}]}, None),
    ],
)
def test_why_a_pod_cannot_run(status: dict[str, object], expected: str | None) -> None:
    assert pods.failure({"status": status}, "c") == expected


@pytest.mark.parametrize(
    ("args", "expected"),
    [([], ""), (["ps"], "ps"), (["--state-dir", "x", "run", "-d"], "run"), (["--state-dir=x", "exec"], "exec")],
)
def test_command_of_a_line(args: list[str], expected: str) -> None:
    assert main.command_of(args) == expected


def test_a_bug_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_args: object) -> int:
        raise RuntimeError("oops")

    monkeypatch.setattr(main, "_run", fail)
    assert main.main(["ps"]) == 1
    assert capsys.readouterr().err == "hv: RuntimeError: oops (a bug; HV_DEBUG=1 shows where)\n"


def test_stop_of_a_process_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon may end between its answer and our look at it."""

    class Ended:
        """A connection to a daemon whose process is no more."""

        class endpoint:  # noqa: N801 - an attribute of that name
            pid = 2**22 + 1

        def post(self, *_path: str, query: object) -> Ended:
            return self

        def read(self) -> bytes:
            return b""

    connection: Connection = Ended()  # type: ignore[assignment]
    host.stop_host(connection, pods=False)


def test_what_only_a_daemon_can_end(tmp_path: Path) -> None:
    """Pods, and the warm pool of a daemon that was killed: `hv host stop --pods` starts one for either."""
    assert not host._has_vms(str(tmp_path))
    for name in ("pods", "warm"):
        (tmp_path / name).mkdir()
        assert not host._has_vms(str(tmp_path))
        (tmp_path / name / "x").mkdir()
        assert host._has_vms(str(tmp_path))
        (tmp_path / name / "x").rmdir()
