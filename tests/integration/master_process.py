"""A real ``hv master`` in a process of its own, and real kubectl with its kubeconfig."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KUBECTL = Path(sys.executable).parent / "kubectl"
HV = (sys.executable, "-m", "hypervisor.cli.main")


class Kubectl:
    """kubectl with the master's kubeconfig, in a namespace."""

    def __init__(self, state: Path, namespace: str = "default", config: Path | None = None) -> None:
        self.namespace = namespace
        self.env = os.environ | {
            "KUBECONFIG": str(config or state / "admin.kubeconfig"),
            "KUBECACHEDIR": str(state / "cache"),
            "HOME": str(state),
        }

    def __call__(self, *args: str, stdin: str | None = None, code: int = 0, **env: str) -> str:
        done = subprocess.run(
            [KUBECTL, "-n", self.namespace, *args],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=30,
            env=self.env | env,
            check=False,
        )
        assert done.returncode == code, f"kubectl {args}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def get(self, *args: str) -> Any:
        return json.loads(self("get", *args, "-o", "json"))


def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Waits for a condition of the server."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.05)
    return found


class MasterProcess:
    """A master that runs, until it is ended or killed."""

    def __init__(self, state: Path, *options: str, log: Path | None = None) -> None:
        self.state, self.log = state, log or state / "log"
        state.mkdir(exist_ok=True)
        self.kubeconfig = state / "admin.kubeconfig"
        self.kubectl = Kubectl(state)
        command = [*HV, "master", "--state-dir", str(state), "--port", "0", *options]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)

    def wait_ready(self) -> MasterProcess:
        """Waits until it serves, and the namespace ``default`` has its account."""
        until(lambda: self.process.poll() is not None or "master serves" in self.log.read_text())
        assert self.process.poll() is None, self.log.read_text()
        until(lambda: "default" in self.kubectl("get", "serviceaccounts"))
        return self

    def hv(self, *args: str, code: int = 0) -> str:
        """``hv`` with the administrator's kubeconfig."""
        env = os.environ | {"KUBECONFIG": str(self.kubeconfig), "HV_STATE_DIR": str(self.state / "none")}
        done = subprocess.run(
            [*HV, *args], capture_output=True, text=True, timeout=60, env=env, stdin=subprocess.DEVNULL, check=False
        )
        assert done.returncode == code, f"hv {args}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout if not code else done.stderr

    def kill(self) -> None:
        """SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)

    def end(self) -> None:
        """SIGTERM: it ends by itself."""
        if self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(20) == 0, self.log.read_text()


@contextmanager
def running_master(state: Path, *options: str) -> Iterator[MasterProcess]:
    """A master that serves; it has ended afterwards."""
    master = MasterProcess(state, *options)
    try:
        yield master.wait_ready()
    except BaseException:
        master.kill()
        raise
    master.end()
