"""A host of the tests' own, driven through the command line; everything it made is gone at the end, or the run fails.

The fixture ladder: guest image (built) -> `host` (one daemon for the session, sample images in it) -> `pod` (a running
busybox pod) -> `fresh_host` (a daemon of one test's own, for tests that kill it).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HV = ROOT / ".venv/bin/hv"
SAMPLES = ROOT / "guest-images/out/samples"
#: how many times longer than usual every wait may take: the KVM lane's guest is slow
PATIENCE = float(os.environ.get("HV_TEST_PATIENCE", "1"))


@dataclass(frozen=True)
class Host:
    """A host's daemon and its state folder."""

    state: Path

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"HV_STATE_DIR": str(self.state)}

    def hv(
        self, *args: str, stdin: bytes | None = b"", check: bool = True, timeout: float = 120
    ) -> subprocess.CompletedProcess[bytes]:
        """``hv ARGS``; with `check`, a failure fails the test with what was printed."""
        limit = timeout * PATIENCE
        done = subprocess.run([HV, *args], input=stdin, capture_output=True, env=self.environment, timeout=limit)
        if check and done.returncode:
            pytest.fail(f"hv {' '.join(args)}: exit code {done.returncode}\n{done.stderr.decode(errors='replace')}")
        return done

    def json(self, *args: str) -> Any:
        return json.loads(self.hv(*args, "-o", "json").stdout)

    def daemon_pid(self) -> int:
        return int(json.loads((self.state / "host.json").read_text())["pid"])

    def processes(self) -> list[str]:
        """Command lines of live processes that name the state folder."""
        return [line for _, line in processes_naming(str(self.state))]


def processes_naming(text: str) -> list[tuple[int, str]]:
    """Live processes, this one left out, whose command line, environment or root names `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if text in line and state != "Z":
            found.append((int(entry.name), line))
    return found


def wait_for(condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
    """Polls `condition`; fails the test with `what` when it does not hold in time."""
    deadline = time.monotonic() + timeout * PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout * PATIENCE:g} s: {what}")
        time.sleep(0.05)


def keep_logs(folder: Path) -> None:
    """Logs and consoles below `folder` go where HV_TEST_LOGS says, if it does: of a machine that is gone afterwards."""
    if "HV_TEST_LOGS" not in os.environ:
        return
    for path in folder.rglob("*"):
        if path.is_file() and (path.suffix == ".log" or "console" in path.name):
            target = Path(os.environ["HV_TEST_LOGS"], folder.name, path.relative_to(folder))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


@contextmanager
def running_host() -> Iterator[Host]:
    folder = Path(tempfile.mkdtemp(prefix="hvt-"))
    folder.chmod(0o711)
    host = Host(folder / "s")
    try:
        host.hv("host", "start")
        host.hv("image", "import", str(SAMPLES / "busybox.tar"))
        yield host
        host.hv("host", "stop", "--pods")
        wait_for(lambda: not host.processes(), f"all processes of {host.state} end", 20)
        mounts = Path("/proc/self/mounts").read_text()
        assert str(folder) not in mounts, "mounts were left behind"
    finally:
        keep_logs(folder)
        for pid, _ in processes_naming(str(folder)):
            os.kill(pid, 9)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    """One daemon for the whole session; tests leave no pods behind in it."""
    with running_host() as it:
        yield it


@pytest.fixture
def fresh_host() -> Iterator[Host]:
    """A daemon of this test's own."""
    with running_host() as it:
        yield it


@pytest.fixture(scope="module")
def pod(host: Host) -> Iterator[str]:
    """The name of a running busybox pod that a module's tests share."""
    name = f"shared-{uuid.uuid4().hex[:6]}"
    host.hv("run", "-d", "--name", name, "busybox", "--", "sleep", "1000000")
    yield name
    host.hv("rm", "-f", name)
