"""Probes, hooks, termination messages and sidecars with real guests: several containers a pod, so that few VMs do.

The daemon has short back-offs; everything else is as users have it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import HV, wait_for
from test_hostd import Daemon, daemon, state_of

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

__all__ = ["daemon"]

BASE = {"image": "busybox", "imagePullPolicy": "Never"}


def container(name: str, script: str, **more: Any) -> dict[str, Any]:
    return BASE | {"name": name, "args": ["sh", "-c", script]} | more


def look(command: str, **more: Any) -> dict[str, Any]:
    return {"exec": {"command": ["sh", "-c", command]}, "periodSeconds": 1, "timeoutSeconds": 5} | more


def status(pod: Any, name: str) -> Any:
    groups = pod["status"]["containerStatuses"], pod["status"].get("initContainerStatuses", ())
    return next(c for group in groups for c in group if c["name"] == name)


def condition(pod: Any, kind: str) -> str:
    return next(str(c["status"]) for c in pod["status"]["conditions"] if c["type"] == kind)


def log(daemon: Daemon, pod: str, name: str) -> str:
    return str(daemon.call("GET", f"/containerLogs/default/{pod}/{name}"))


def run_in(daemon: Daemon, pod: str, name: str, *command: str) -> str:
    argv = [HV, "exec", "-c", name, pod, "--", *command]
    environment = os.environ | {"HV_STATE_DIR": str(daemon.state)}
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture
def removed(daemon: Daemon) -> Iterator[list[str]]:
    """Names of pods to remove at the end."""
    names: list[str] = []
    yield names
    for name in names:
        daemon.remove(name)


SERVE = "mkdir -p /w/cgi-bin; echo fine > /w/ok; exec httpd -f -p 8080 -h /w"


def test_probes_of_every_kind(daemon: Daemon, removed: list[str]) -> None:
    web = container(
        "web",
        f"sleep 2; {SERVE}",
        ports=[{"name": "http", "containerPort": 8080}],
        startupProbe={"tcpSocket": {"port": "http"}, "periodSeconds": 1, "failureThreshold": 60},
        readinessProbe={"httpGet": {"port": "http", "path": "/ready"}, "periodSeconds": 1, "timeoutSeconds": 5},
        livenessProbe={"httpGet": {"port": 8080, "path": "/ok"}, "periodSeconds": 1, "timeoutSeconds": 5},
    )
    ill = container(
        "ill",
        "touch /tmp/fine; trap 'exit 9' TERM; while :; do sleep 0.1; done",
        livenessProbe=look("test -e /tmp/fine && rm /tmp/fine", failureThreshold=1, initialDelaySeconds=1),
    )
    daemon.run("probed", "", policy="Always", containers=[web, ill], terminationGracePeriodSeconds=5)
    removed.append("probed")
    pod = daemon.wait("probed", lambda p: status(p, "web")["started"], "the startup probe is content")
    assert not status(pod, "web")["ready"]
    assert condition(pod, "Ready") == condition(pod, "ContainersReady") == "False"
    pod = daemon.wait("probed", lambda p: status(p, "ill")["restartCount"] >= 1, "the ill one is started again")
    ended = status(pod, "ill")["lastState"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (9, "Error")
    assert status(pod, "web")["restartCount"] == 0


def test_hooks_and_messages(daemon: Daemon, removed: list[str]) -> None:
    hooks = {
        "postStart": {"exec": {"command": ["sh", "-c", "echo hello > /shared/post"]}},
        "preStop": {"exec": {"command": ["sh", "-c", "echo bye > /shared/pre"]}},
    }
    mount = {"volumeMounts": [{"name": "v", "mountPath": "/shared"}]}
    calm = container(
        "calm",
        "trap 'cat /shared/post /shared/pre > /dev/termination-log; exit 0' TERM; while :; do sleep 0.1; done",
        lifecycle=hooks,
        **mount,
    )
    loud = container("loud", "echo one; echo two; exit 3", terminationMessagePolicy="FallbackToLogsOnError", **mount)
    volumes = [{"name": "v", "emptyDir": {}}]
    daemon.run("hooked", "", containers=[calm, loud], volumes=volumes, terminationGracePeriodSeconds=20)
    removed.append("hooked")
    pod = daemon.wait(
        "hooked",
        lambda p: "running" in status(p, "calm")["state"] and "terminated" in status(p, "loud")["state"],
        "one runs, one has ended",
    )
    assert status(pod, "loud")["state"]["terminated"]["message"] == "one\ntwo\n"
    pod = daemon.call("POST", "/hv/v1/pods/default/hooked/stop")
    ended = status(pod, "calm")["state"]["terminated"]
    assert (ended["exitCode"], ended["message"]) == (0, "hello\nbye\n")


def test_sidecar_serves_the_main_container_and_ends_after_it(daemon: Daemon, removed: list[str]) -> None:
    sidecar = container(
        "web",
        f"trap 'echo over; exit 0' TERM; ({SERVE}) & wait",
        restartPolicy="Always",
        startupProbe={"httpGet": {"port": 8080, "path": "/ok"}, "periodSeconds": 1, "failureThreshold": 60},
    )
    main = container("c", "wget -qO- http://127.0.0.1:8080/ok")
    daemon.run("job", "", initContainers=[sidecar], containers=[main], terminationGracePeriodSeconds=10)
    removed.append("job")
    pod = daemon.wait_phase("job", "Succeeded")
    assert state_of(pod)["terminated"]["exitCode"] == 0
    assert status(pod, "web")["state"]["terminated"]["exitCode"] == 0
    assert daemon.log("job") == "fine\n"


# ---- what a pod takes of its disk ------------------------------------------------------------------------------------


def test_who_takes_more_than_the_limit_is_stopped_and_its_pod_evicted(daemon: Daemon, removed: list[str]) -> None:
    mount = {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    limit = {"resources": {"limits": {"ephemeral-storage": "8Mi"}}}
    full = "dd if=/dev/zero of=/v/x bs=64k count=900 2>&1; ls -ld /v; id -G; wc -c < /v/x"
    calm = container("calm", "head -c 7000000 /dev/zero > /x && echo fits; exec sleep 1000", **limit)
    volumes = [{"name": "v", "emptyDir": {"sizeLimit": "1Mi"}}]
    context = {"fsGroup": 2000, "runAsUser": 1000, "runAsGroup": 1000, "supplementalGroups": [3000]}
    greedy = container("greedy", f"until [ -e /v/go ]; do sleep 0.1; done; {full}; exec sleep 1000", **mount)
    calm["securityContext"] = {"runAsUser": 0}
    daemon.run("greedy", "", policy="Always", containers=[calm, greedy], volumes=volumes, securityContext=context)
    removed.append("greedy")
    daemon.wait("greedy", lambda p: condition(p, "Ready") == "True", "runs")
    wait_for(lambda: "fits" in log(daemon, "greedy", "calm"), "what fits is written")
    usage = daemon.call("GET", "/hv/v1/top")["pods"][0]
    assert usage["volumes"]["v"]["used_bytes"] < 65536 and usage["volumes"]["v"]["capacity_bytes"] == 1 << 20
    assert 7_000_000 < usage["containers"]["calm"]["disk_bytes"] < 8 << 20
    run_in(daemon, "greedy", "greedy", "touch", "/v/go")
    pod = daemon.wait_phase("greedy", "Failed")
    assert pod["status"]["reason"] == "Evicted"
    assert pod["status"]["message"].startswith('Usage of EmptyDir volume "v" exceeds the limit "1Mi"')
    assert condition(pod, "DisruptionTarget") == "True"
    said = log(daemon, "greedy", "greedy")
    assert "quota exceeded" in said.lower()
    assert "drwxrwsrwx" in said and "2000" in said
    assert "1000 2000 3000" in said
    written = int(said.strip().splitlines()[-1])
    assert written + 4096 > (1 << 20) and written <= (1 << 20) + (64 << 10)


def test_the_layers_of_ended_attempts_are_given_back(daemon: Daemon, removed: list[str]) -> None:
    limit = {"resources": {"limits": {"ephemeral-storage": "16Mi"}}}  # of a disk of 33 MiB
    again = container("c", "dd if=/dev/zero of=/x bs=1M count=13 || exit 7; exit 1", **limit)
    daemon.run("again", "", policy="OnFailure", containers=[again])
    removed.append("again")
    pod = daemon.wait("again", lambda p: status(p, "c")["restartCount"] >= 3, "it was started again")
    assert status(pod, "c")["lastState"]["terminated"]["exitCode"] == 1
