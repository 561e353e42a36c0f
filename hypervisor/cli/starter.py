"""Starts a host's daemon in the background, and waits until it listens."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hypervisor.cli.connect import connect_running
from hypervisor.cli.rest import Connection
from hypervisor.errors import Unavailable

START_TIMEOUT = 60.0  # seconds; a cold KVM probe is part of it
LOOK_EVERY = 0.02
GRACE_AFTER_DEATH = 5.0  # seconds that another hv's daemon gets, when ours ended because that one holds the lock


def start_host(state: str, timeout: float | None, options: Sequence[str] = ()) -> Connection:
    """Starts ``hv hostd`` in a session of its own, its output in ``<state>/hostd.log``.

    :param timeout: of the connection that is returned
    :param options: of ``hv hostd``
    :raises InvalidInput: the state folder's name is too long; nothing was made
    :raises Unavailable: it ended, or did not listen within `START_TIMEOUT`; the message carries its last lines
    """
    from hypervisor.controller.paths import state_directory

    folder = state_directory(state).root  # hostd would refuse one that is too long, but it would have been made by then
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        log = folder / "hostd.log"
        with log.open("ab") as output:
            start = output.tell()
            print(f"hv: starting hostd (log: {log})", file=sys.stderr)  # noqa: T201
            process = _spawn(state, output.fileno(), options)
    except OSError as e:
        raise Unavailable(f"cannot use the state folder {state}: {e.strerror}; give another with --state-dir") from e
    return _wait_listening(state, process, log, start, timeout)


def _spawn(state: str, output: int, options: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "hypervisor.cli.main", "--state-dir", state, "hostd", *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | _package_path(),
        )
    except OSError as e:
        raise Unavailable(
            f"cannot start hostd by {sys.executable}: {e.strerror}; this user must be able to execute it"
        ) from e


def _package_path() -> dict[str, str]:
    """``-m`` from another folder must find the same package, also when it runs from a source tree."""
    root = Path(__file__).resolve().parents[2]
    return {"PYTHONPATH": str(root)}


def _wait_listening(
    state: str, process: subprocess.Popen[bytes], log: Path, start: int, timeout: float | None
) -> Connection:
    deadline = time.monotonic() + START_TIMEOUT
    died = False
    while time.monotonic() < deadline:
        connection = connect_running(state, timeout)
        if connection is not None:
            return connection
        if not died and process.poll() is not None:
            died = True
            deadline = min(deadline, time.monotonic() + (GRACE_AFTER_DEATH if _held(state) else 0.0))
        elif died:
            time.sleep(LOOK_EVERY)
        else:
            _wait_exit(process, LOOK_EVERY)
    if not died:
        process.terminate()
        raise Unavailable(f"hostd did not listen within {START_TIMEOUT:g} s; its log is {log}")
    raise Unavailable(
        f"hostd ended at once (exit code {process.returncode}): {last_line(log, start)}; its log is {log}"
    )


def _wait_exit(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Waits for the process's end, at most so long."""
    fd = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(seconds * 1000)
    finally:
        os.close(fd)


def _held(state: str) -> bool:
    """Whether a daemon holds the state folder's lock."""
    import fcntl

    try:
        with (Path(state) / "host.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def last_line(log: Path, start: int) -> str:
    """What a daemon said last, in the log that it has written from `start` on."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            lines = file.read(1 << 20).decode("utf-8", "replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1][:500].removeprefix("hv: ") if lines else "it said nothing"
