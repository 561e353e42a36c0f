"""The host daemon with real guests: containers' ends, restarts, lost VMs, killed daemons.

The daemons here have short back-offs; everything else is as users have it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLES, processes_naming, wait_for

from hypervisor.controller.hostfiles import only_daemon, prepare
from hypervisor.controller.paths import state_directory
from hypervisor.errors import Conflict

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
_RUN = """
import asyncio, sys
from hypervisor.controller.backoff import BackoffPolicy
from hypervisor.controller.hostd import HostConfig, serve
from hypervisor.controller.paths import state_directory
from hypervisor.controller.services import Times
times = Times(boot_s=float(sys.argv[2]), agent_s=5, storage_s=1, backoff=BackoffPolicy(initial_s=0.5, cap_s=2))
asyncio.run(serve(HostConfig(state_directory(sys.argv[1]), times=times)))
"""


class Daemon:
    """A daemon of the tests' own, as a process that can be killed."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, boot_s: float = 90) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        argv = [sys.executable, "-c", _RUN, str(self.state), str(boot_s)]
        with (self.state.parent / "out").open("ab") as out:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
        wait_for(self._listens, "hostd listens")

    def _listens(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            pytest.fail(f"hostd ended: {(self.state.parent / 'out').read_text()}")
        try:
            return json.loads((self.state / "host.json").read_text())["pid"] == self.process.pid
        except (OSError, ValueError):
            return False

    def end(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(30)

    def call(self, method: str, path: str, body: object = None) -> Any:
        port = json.loads((self.state / "host.json").read_text())["port"]
        token = (self.state / "token").read_text().strip()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as e:
            text = e.read()
        try:
            return json.loads(text)
        except ValueError:
            return text.decode()

    def run(self, name: str, script: str, *, policy: str = "Never", **spec: Any) -> None:
        answer = self.call("POST", "/hv/v1/pods", pod_manifest(name, script, policy=policy, **spec))
        assert answer["kind"] == "Pod", answer

    def pod(self, name: str) -> Any:
        return self.call("GET", f"/hv/v1/pods/default/{name}")

    def wait(self, name: str, condition: Callable[[Any], bool], what: str, timeout: float = 60) -> Any:
        deadline = time.monotonic() + timeout
        while not condition(pod := self.pod(name)):
            if time.monotonic() > deadline:
                pytest.fail(f"pod {name}: not within {timeout:g} s: {what}; it is {pod.get('status')}")
            time.sleep(0.05)
        return pod

    def wait_running(self, name: str) -> Any:
        return self.wait(name, lambda p: "running" in state_of(p), "runs")

    def wait_phase(self, name: str, phase: str) -> Any:
        return self.wait(name, lambda p: p["status"]["phase"] == phase, phase)

    def remove(self, name: str) -> None:
        self.call("DELETE", f"/hv/v1/pods/default/{name}?gracePeriodSeconds=0&wait=1")

    def folder(self, name: str) -> Path:
        return self.state / "pods" / self.pod(name)["metadata"]["uid"][:8]

    def pid_of(self, name: str, part: str) -> int:
        return int(json.loads((self.folder(name) / "vm/processes.json").read_text())[part]["pid"])

    def log(self, name: str) -> str:
        return str(self.call("GET", f"/containerLogs/default/{name}/c"))


def pod_manifest(name: str, script: str, *, policy: str = "Never", **spec: Any) -> dict[str, Any]:
    container = {"name": "c", "image": "busybox", "imagePullPolicy": "Never", "args": ["sh", "-c", script]}
    body = {"restartPolicy": policy, "terminationGracePeriodSeconds": 1, "containers": [container]} | spec
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": body}


def state_of(pod: Any, index: int = 0) -> Any:
    return pod["status"]["containerStatuses"][index]["state"]


def restarts_of(pod: Any) -> int:
    return int(pod["status"]["containerStatuses"][0]["restartCount"])


@contextmanager
def daemon_in(folder: Path) -> Iterator[Daemon]:
    folder.chmod(0o711)
    daemon = Daemon(folder / "s")
    try:
        daemon.start()
        answer = daemon.call("POST", "/hv/v1/images/import", {"path": str(SAMPLES / "busybox.tar")})
        assert "error" not in str(answer), answer
        yield daemon
        daemon.call("POST", "/hv/v1/host/stop?pods=1")
        assert daemon.process is not None
        assert daemon.process.wait(60) == 0
        wait_for(lambda: not processes_naming(str(folder)), "no process is left", 10)
        assert list((daemon.state / "pods").iterdir()) == []
        assert f"{folder}/" not in Path("/proc/self/mounts").read_text()
    finally:
        for pid, _ in processes_naming(str(folder)):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    folder = Path(tempfile.mkdtemp(prefix="hvt-"))
    try:
        with daemon_in(folder) as it:
            yield it
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- to its end ------------------------------------------------------------------------------------------------------


def test_exit_code_and_log_outlive_the_vm(daemon: Daemon) -> None:
    daemon.run("once", "echo out; echo err >&2; exit 7")
    pod = daemon.wait_phase("once", "Failed")
    assert state_of(pod)["terminated"]["exitCode"] == 7
    wait_for(lambda: not (daemon.folder("once") / "vm").exists(), "the VM is gone")
    assert sorted(daemon.log("once").split()) == ["err", "out"]
    assert json.loads(daemon.pod("once")["metadata"]["annotations"]["podvisor.dev/timing"])["boot"] > 0
    daemon.remove("once")
    assert daemon.pod("once")["reason"] == "NotFound"


def test_program_that_is_not_there(daemon: Daemon) -> None:
    manifest = pod_manifest("typo", "")
    manifest["spec"]["containers"][0]["args"] = ["no-such-program"]
    daemon.call("POST", "/hv/v1/pods", manifest)
    ended = state_of(daemon.wait_phase("typo", "Failed"))["terminated"]
    assert ended["exitCode"] == 127
    assert ended["reason"] == "StartError"
    assert "no-such-program" in ended["message"]
    daemon.remove("typo")


def test_always_restarts_with_back_off_and_shows_it(daemon: Daemon) -> None:
    daemon.run("again", "exit 3", policy="Always")
    pod = daemon.wait(
        "again",
        lambda p: p["status"]["containerStatuses"][0]["restartCount"] >= 2 and "waiting" in state_of(p),
        "waits",
    )
    status = pod["status"]["containerStatuses"][0]
    assert status["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    assert status["lastState"]["terminated"]["exitCode"] == 3
    assert pod["status"]["phase"] == "Running"
    daemon.remove("again")


def test_on_failure_ends_when_it_succeeds_and_init_comes_first(daemon: Daemon) -> None:
    mounts = {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    base = {"image": "busybox", "imagePullPolicy": "Never", **mounts}
    init = base | {"name": "first", "args": ["sh", "-c", "echo ready > /v/made"]}
    main = base | {"name": "c", "args": ["sh", "-c", "cat /v/made; [ -e /v/seen ] || { touch /v/seen; exit 1; }"]}
    spec = {"initContainers": [init], "containers": [main], "volumes": [{"name": "v", "emptyDir": {}}]}
    daemon.run("retry", "", policy="OnFailure", **spec)
    pod = daemon.wait_phase("retry", "Succeeded")
    assert pod["status"]["containerStatuses"][0]["restartCount"] == 1
    assert pod["status"]["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 0
    assert "ready" in daemon.log("retry")
    daemon.remove("retry")


def test_stop_sends_sigterm_waits_and_keeps_the_log(daemon: Daemon) -> None:
    daemon.run("calm", "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.1; done", policy="Always")
    daemon.wait("calm", lambda _: "up" in daemon.log("calm"), "says that it is up")
    pod = daemon.call("POST", "/hv/v1/pods/default/calm/stop?gracePeriodSeconds=20")
    assert pod["status"]["phase"] == "Succeeded"
    assert daemon.log("calm").split() == ["up", "bye"]
    daemon.remove("calm")


# ---- lost VMs --------------------------------------------------------------------------------------------------------


def test_killed_qemu_fails_the_pod_with_that_reason(daemon: Daemon) -> None:
    daemon.run("killed", "sleep 1000")
    daemon.wait_running("killed")
    os.kill(daemon.pid_of("killed", "qemu"), signal.SIGKILL)  # a vmx is replaced instead: test_succession.py
    pod = daemon.wait_phase("killed", "Failed")
    assert pod["status"]["reason"] == "VmFailed"
    assert "QEMU" in pod["status"]["message"]
    assert "killed (signal 9)" in pod["status"]["message"]
    assert state_of(pod)["terminated"]["exitCode"] == 137
    daemon.remove("killed")


def test_lost_vm_is_replaced_when_the_policy_is_always(daemon: Daemon) -> None:
    daemon.run("phoenix", "sleep 1000", policy="Always")
    daemon.wait_running("phoenix")
    os.kill(daemon.pid_of("phoenix", "qemu"), signal.SIGKILL)
    pod = daemon.wait("phoenix", lambda p: restarts_of(p) == 1 and "running" in state_of(p), "runs in another VM")
    assert pod["status"]["containerStatuses"][0]["lastState"]["terminated"]["reason"] == "VmFailed"
    assert "message" not in pod["status"]
    daemon.remove("phoenix")


def test_agent_that_dies_is_named_with_the_console(daemon: Daemon) -> None:
    manifest = pod_manifest("deed", "sleep 1; echo c > /proc/sysrq-trigger; sleep 100")
    manifest["spec"]["containers"][0]["securityContext"] = {"privileged": True}
    daemon.call("POST", "/hv/v1/pods", manifest)
    pod = daemon.wait_phase("deed", "Failed")
    assert pod["status"]["reason"] == "VmFailed"
    assert "panic" in pod["status"]["message"]
    assert "sysrq" in daemon.call("GET", "/hv/v1/pods/default/deed/console")
    daemon.remove("deed")


# ---- killed daemons --------------------------------------------------------------------------------------------------


def _status_on_disk(daemon: Daemon) -> dict[str, Any]:
    for path in (daemon.state / "pods").glob("*/status.json"):
        try:
            return dict(json.loads(path.read_text()))
        except ValueError:
            pass
    return {}


_PHASES: dict[str, Callable[[Daemon], bool]] = {
    "accepted": lambda _: True,
    "vm starting": lambda d: any((d.state / "pods").glob("*/vm")),
    "qemu started": lambda d: any('"qemu"' in p.read_text() for p in (d.state / "pods").glob("*/vm/processes.json")),
    "set up": lambda d: bool(_status_on_disk(d).get("vm_up")),
    "running": lambda d: "running" in str(_status_on_disk(d).get("containers")),
}


@pytest.mark.parametrize("phase", _PHASES)
def test_daemon_killed_at_each_phase_of_a_start(daemon: Daemon, phase: str) -> None:
    daemon.run("survivor", "echo alive; sleep 1000")
    wait_for(lambda: _PHASES[phase](daemon), phase)
    daemon.end(signal.SIGKILL)
    daemon.start()
    daemon.wait_running("survivor")
    wait_for(lambda: daemon.log("survivor") == "alive\n", "its output is in the log")  # it runs before it writes
    assert len(list((daemon.state / "pods").iterdir())) == 1
    assert len([line for _, line in processes_naming(str(daemon.state)) if "qemu-system" in line]) == 1
    daemon.remove("survivor")


def test_pods_run_on_while_the_daemon_is_away_and_their_end_is_seen(daemon: Daemon) -> None:
    daemon.run("stays", "sleep 1000")
    daemon.run("ends", "sleep 4; exit 5")
    daemon.wait_running("stays")
    before = daemon.pid_of("stays", "qemu")
    daemon.wait_running("ends")
    daemon.end(signal.SIGTERM)
    time.sleep(5)  # the container ends meanwhile
    daemon.start()
    assert state_of(daemon.wait_phase("ends", "Failed"))["terminated"]["exitCode"] == 5
    assert "running" in state_of(daemon.wait_running("stays"))
    assert daemon.pid_of("stays", "qemu") == before
    assert daemon.pod("stays")["status"]["containerStatuses"][0]["restartCount"] == 0
    daemon.remove("stays")
    daemon.remove("ends")


def test_vm_that_died_while_the_daemon_was_away(daemon: Daemon) -> None:
    daemon.run("lost", "sleep 1000")
    daemon.wait_running("lost")
    pid = daemon.pid_of("lost", "qemu")
    daemon.end(signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    daemon.start()
    pod = daemon.wait_phase("lost", "Failed")
    assert "while no daemon was running" in pod["status"]["message"]
    daemon.remove("lost")


def test_deletion_is_finished_by_the_next_daemon(daemon: Daemon) -> None:
    daemon.run("going", "trap '' TERM; while :; do sleep 0.1; done")
    daemon.wait_running("going")
    daemon.call("DELETE", "/hv/v1/pods/default/going?gracePeriodSeconds=3")
    daemon.end(signal.SIGKILL)
    daemon.start()
    wait_for(lambda: daemon.pod("going").get("reason") == "NotFound", "it is gone", 30)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_guest_that_never_reaches_its_agent(daemon: Daemon) -> None:
    daemon.end(signal.SIGTERM)
    daemon.start(boot_s=1)
    manifest = pod_manifest("stuck", "true", policy="Never")
    manifest["metadata"]["annotations"] = {"podvisor.dev/cold": "true"}  # a clone would be there within a second
    assert daemon.call("POST", "/hv/v1/pods", manifest)["kind"] == "Pod"
    pod = daemon.wait_phase("stuck", "Failed")
    assert pod["status"]["reason"] == "VmFailed"
    assert "did not reach its agent within 1 s" in pod["status"]["message"]
    daemon.remove("stuck")
    daemon.end(signal.SIGTERM)
    daemon.start()


def test_static_pod_follows_its_file(daemon: Daemon) -> None:
    folder = daemon.state / "manifests"
    (folder / "bad.yaml").write_text("kind: Pod\napiVersion: v1\nspec: {containers: [{imag: x}]}\n")
    (folder / "web.json").write_text(json.dumps(pod_manifest("web", "sleep 1000", policy="Always")))
    wait_for(lambda: daemon.pod("web")["kind"] == "Pod", "the pod is there")
    daemon.wait_running("web")
    broken = daemon.call("GET", "/hv/v1/host")["static_pods"]["broken"]
    assert broken[0]["file"] == "bad.yaml"
    assert "imag: unknown field" in broken[0]["error"]
    assert daemon.call("DELETE", "/hv/v1/pods/default/web")["reason"] == "Conflict"
    for file in folder.iterdir():
        file.unlink()
    wait_for(lambda: daemon.pod("web").get("reason") == "NotFound", "the pod is gone", 30)


def test_second_daemon_is_refused(daemon: Daemon) -> None:
    paths = state_directory(daemon.state)
    prepare(paths)
    assert daemon.process is not None
    with pytest.raises(Conflict, match=f"process {daemon.process.pid}"), only_daemon(paths):
        pass


def test_too_much_memory_is_refused_before_anything_is_made(daemon: Daemon) -> None:
    manifest = pod_manifest("huge", "true")
    manifest["spec"]["containers"][0]["resources"] = {"limits": {"memory": "4Ti"}}
    answer = daemon.call("POST", "/hv/v1/pods", manifest)
    assert answer["code"] == 507
    assert "lower resources.limits.memory" in answer["message"]
    assert daemon.pod("huge")["reason"] == "NotFound"


def test_missing_image_is_shown_and_tried_again(daemon: Daemon) -> None:
    manifest = pod_manifest("noimage", "true")
    manifest["spec"]["containers"][0]["image"] = "localhost/no/such"
    daemon.call("POST", "/hv/v1/pods", manifest)
    pod = daemon.wait("noimage", lambda p: "Err" in state_of(p).get("waiting", {}).get("reason", ""), "ErrImage")
    assert state_of(pod)["waiting"]["reason"] == "ErrImageNeverPull"
    assert not (daemon.folder("noimage") / "vm").exists()
    daemon.remove("noimage")


@contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """A file system of its own (not tmpfs: what is written there counts as the writer's memory)."""
    folder = Path(tempfile.mkdtemp(prefix="hvt-"))
    image = folder.with_suffix(".img")
    try:
        with image.open("wb") as file:
            file.truncate(size)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, folder], check=True)
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=False)
        folder.rmdir()
        image.unlink()


@pytest.mark.root
def test_full_host_disk_stops_the_vm_until_there_is_room() -> None:
    with small_disk(600_000_000) as folder, daemon_in(folder) as daemon:
        daemon.run("eater", "sleep 2; head -c 200000000 /dev/zero > /big; sync; echo written; sleep 1000")
        daemon.wait_running("eater")
        filler = folder / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - 40_000_000)
        daemon.wait("eater", lambda p: p["status"].get("reason") == "HostDiskFull", "stands still")
        filler.unlink()
        daemon.wait("eater", lambda _: daemon.log("eater") == "written\n", "goes on")
        assert "reason" not in daemon.pod("eater")["status"]
        daemon.remove("eater")
