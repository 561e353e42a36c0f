"""A cluster of hosts on this machine, for tests: ``hv`` and the real ``kubectl`` on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypervisor.cli.cluster_state import MASTER, ClusterPaths

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "guest-images/out/samples"
KUBECTL = Path(sys.executable).parent / "kubectl"
WEBSOCKETS = ("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "KUBECTL_PORT_FORWARD_WEBSOCKETS")
"""What makes kubectl use WebSockets ("true") or SPDY ("false")."""


class Cluster:
    """``hv`` and ``kubectl`` on one cluster."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.paths = ClusterPaths(state)

    def hv(self, *args: str, timeout: float = 120) -> str:
        return self._checked(self.run_hv(*args, timeout=timeout))

    def run_hv(self, *args: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """As `hv`, whatever its exit code."""
        return self._run([sys.executable, "-m", "hypervisor.cli.main", "--state-dir", str(self.state), *args], timeout)

    def kubectl(self, *args: str, config: Path | None = None, stdin: str = "", timeout: float = 90) -> str:
        config = config or self.paths.kubeconfig
        return self._checked(self._run([str(KUBECTL), "--kubeconfig", str(config), *args], timeout, stdin))

    def _run(self, command: list[str], timeout: float, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False, cwd=self.state,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(self.state)},
        )  # fmt: skip

    def _checked(self, done: subprocess.CompletedProcess[str]) -> str:
        if done.returncode:
            raise AssertionError(f"{done.args[1:]} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def kill_everything(self) -> None:
        """Every process of the cluster, VMs included, with SIGKILL."""
        for component in (MASTER, "host-1", "host-2"):
            process = self.paths.process(component)
            assert process is not None
            process.kill()
        self._kill_all(self.state)

    def kill_host(self, name: str) -> None:
        """A host's daemon and its VMs, with SIGKILL: as if its power failed."""
        process = self.paths.process(name)
        assert process is not None
        process.kill()
        self._kill_all(self.paths.host(name))

    def _kill_all(self, folder: Path) -> None:
        for pid in self.processes(folder):
            os.kill(pid, 9)
        deadline = time.monotonic() + 10
        while self.processes(folder) and time.monotonic() < deadline:
            time.sleep(0.05)

    def processes(self, folder: Path | None = None) -> list[int]:
        """Processes whose command line names the state folder, or one below it."""
        name = os.fsencode(folder or self.state)
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes()
            except OSError:
                continue
            if name in words and int(path.parts[2]) != os.getpid():
                found.append(int(path.parts[2]))
        return found


@contextmanager
def running_cluster(images: tuple[str, ...], *options: str, within: float = 60.0) -> Iterator[Cluster]:
    """Two hosts with these sample images; everything has gone afterwards.

    :param within: seconds until every node is Ready
    """
    state = Path(tempfile.mkdtemp(prefix="hvc-"))
    state.chmod(0o711)
    made = Cluster(state)
    try:
        for image in images:
            made.hv("image", "import", str(SAMPLES / f"{image}.tar"))
        made.hv("host", "stop")
        began = time.monotonic()
        made.hv("cluster", "up", "--hosts", "2", *options)
        assert time.monotonic() - began < within
        yield made
    finally:
        made.hv("cluster", "down", "--delete", "--now")
        left = made.processes()
        shutil.rmtree(state, ignore_errors=True)
    assert left == []
