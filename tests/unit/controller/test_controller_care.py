"""Probes, hooks, sidecars and messages of pods over made-up guests: what follows from what is seen.

Periods here are patched to milliseconds; real guests: tests/integration/test_pod_lifecycle.py.
"""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from fake_guest import FakeGuest, Script
from pod_bench import Bench, until

from hypervisor.controller import probes
from hypervisor.controller.backoff import BackoffPolicy
from hypervisor.controller.podvm import PodVm
from hypervisor.controller.probes import Count
from hypervisor.controller.record import Running, Terminated
from hypervisor.controller.spec import ExecAction, Probe

Looking = dict[str, Any]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of a probe's settings is 20 ms."""
    looking = SimpleNamespace(**vars(asyncio) | {"sleep": lambda seconds: asyncio.sleep(seconds / 50)})
    monkeypatch.setattr(probes, "asyncio", looking)


def probe(what: str, **more: Any) -> Looking:
    return {"exec": {"command": [what]}, "periodSeconds": 1, "failureThreshold": 2} | more


async def made(bench: Bench, policy: str = "Always", *, script: Script | None = None, **container: Any) -> PodVm:
    bench.machines.scripts = [script or Script()]
    return await bench.create(policy=policy, containers=[{"name": "c", "image": "x"} | container])


def guest(bench: Bench) -> FakeGuest:
    return bench.machines.started[0]


def said(pod: PodVm) -> list[str]:
    return [n.reason for n in pod.journal.notices if n.reason != "Pulled"]


def conditions(pod: PodVm) -> dict[str, str]:
    return {c["type"]: c["status"] for c in pod.view()["status"]["conditions"]}


def status(pod: PodVm) -> dict[str, Any]:
    found: dict[str, Any] = pod.view()["status"]["containerStatuses"][0]
    return found


# ---- thresholds ------------------------------------------------------------------------------------------------------


def test_results_count_when_there_are_enough_in_a_row() -> None:
    count = Count(Probe(ExecAction(("x",)), success_threshold=2, failure_threshold=3))
    results = [True, True, False, False, True, False, False, False, True, True]
    assert [count.take(ok) for ok in results] == [None, True, None, None, None, None, None, False, None, True]


def test_back_off_is_what_kubernetes_documents() -> None:
    policy, delay, delays = BackoffPolicy(), None, []
    for _ in range(8):
        delay = policy.next(delay, 1.0)
        delays.append(delay)
    assert delays == [0, 10, 20, 40, 80, 160, 300, 300]
    assert policy.next(300, 599.9) == 300
    assert policy.next(300, 600) == 0


async def test_a_grpc_probe_asks_for_its_service(bench: Bench) -> None:
    grpc = {"grpc": {"port": 50051, "service": "db"}, "periodSeconds": 1}
    pod = await made(bench, readinessProbe=grpc)
    await until(pod, lambda: conditions(pod)["Ready"] == "True")
    (asked, *_) = [args for call, args in guest(bench).calls if call == "probe"]
    assert asked["grpc"] == {"host": "10.0.2.15", "port": 50051, "service": "db"}


# ---- probes ----------------------------------------------------------------------------------------------------------


async def test_readiness_drives_ready_and_the_conditions(bench: Bench) -> None:
    script = Script(looks={"ready": False})
    pod = await made(bench, script=script, readinessProbe=probe("ready"))
    await until(pod, lambda: "Unhealthy" in said(pod))
    assert (status(pod)["ready"], status(pod)["started"]) == (False, True)
    assert conditions(pod)["Ready"] == conditions(pod)["ContainersReady"] == "False"
    script.looks["ready"] = True
    await until(pod, lambda: status(pod)["ready"])
    assert conditions(pod)["Ready"] == conditions(pod)["ContainersReady"] == "True"
    assert pod.journal.record.ready_at > 0
    script.looks["ready"] = False
    await until(pod, lambda: not status(pod)["ready"])
    assert status(pod)["restartCount"] == 0
    assert pod.journal.notices[-1].message == "Readiness probe failed: ready looked"


async def test_liveness_restarts(bench: Bench) -> None:
    script = Script()
    pod = await made(bench, script=script, livenessProbe=probe("live", terminationGracePeriodSeconds=7))
    await until(pod, lambda: status(pod)["ready"])
    script.looks["live"] = False
    await until(pod, lambda: status(pod)["restartCount"] == 1)
    script.looks["live"] = True
    assert ("container.stop", {"name": "c", "grace_s": 7}) in guest(bench).calls
    assert status(pod)["lastState"]["terminated"]["exitCode"] == 143
    assert said(pod)[:3] == ["Unhealthy", "Unhealthy", "Killing"]
    assert "failed liveness probe, will be restarted" in pod.journal.notices[3].message


async def test_liveness_ends_a_pod_that_never_restarts(bench: Bench) -> None:
    pod = await made(bench, "Never", script=Script(looks={"live": False}), livenessProbe=probe("live"))
    await until(pod, lambda: pod.journal.record.terminal)
    assert pod.journal.record.phase == "Failed"


async def test_startup_holds_the_others_back_and_kills(bench: Bench) -> None:
    script = Script(looks={"up": False, "live": False})
    pod = await made(bench, script=script, startupProbe=probe("up", failureThreshold=3), livenessProbe=probe("live"))
    await until(pod, lambda: status(pod)["restartCount"] == 1)
    assert guest(bench).looks("up") >= 3
    assert guest(bench).looks("live") == 0
    assert not status(pod)["started"]
    script.looks |= {"up": True, "live": True}
    await until(pod, lambda: status(pod)["started"] and status(pod)["ready"])


async def test_initial_delay_counts_from_the_start(bench: Bench) -> None:
    pod = await made(bench, readinessProbe=probe("ready", initialDelaySeconds=20))
    await until(pod, lambda: status(pod)["started"])
    began = time.monotonic()
    await until(pod, lambda: status(pod)["ready"])
    assert time.monotonic() - began > 0.3


async def test_a_look_that_cannot_be_taken_counts_for_nothing(bench: Bench) -> None:
    pod = await made(bench, livenessProbe=probe("live", failureThreshold=1))
    await until(pod, lambda: status(pod)["ready"])
    for _ in range(5):
        guest(bench).drop_connections()
        await asyncio.sleep(0.03)
    assert (status(pod)["restartCount"], said(pod)) == (0, [])


async def test_readiness_outlives_the_daemon(bench: Bench) -> None:
    pod = await made(bench, readinessProbe=probe("ready"))
    await until(pod, lambda: status(pod)["ready"])
    await bench.restart()
    taken = bench.pods.get("default", "p")
    await until(taken, lambda: taken.machine is not None)
    assert status(taken)["ready"]


# ---- hooks -----------------------------------------------------------------------------------------------------------


async def test_post_start_comes_before_running(bench: Bench) -> None:
    hooks = {"postStart": {"exec": {"command": ["hello"]}}, "preStop": {"exec": {"command": ["bye"]}}}
    pod = await made(bench, lifecycle=hooks)
    await until(pod, lambda: isinstance(pod.journal.record.container("c").state, Running))
    assert guest(bench).looks("hello") == 1
    await pod.request_stop(10)
    await until(pod, lambda: pod.journal.record.closed)
    calls = [call for call, args in guest(bench).calls if call == "container.stop" or "bye" in str(args)]
    assert calls == ["probe", "container.stop"]


async def test_post_start_that_fails_ends_the_container(bench: Bench) -> None:
    pod = await made(
        bench, script=Script(looks={"hello": False}), lifecycle={"postStart": {"exec": {"command": ["hello"]}}}
    )
    await until(pod, lambda: status(pod)["restartCount"] >= 1)
    assert said(pod)[:2] == ["FailedPostStartHook", "Killing"]
    assert not status(pod)["ready"]


async def test_pre_stop_shares_the_grace_period_and_may_fail(bench: Bench) -> None:
    pod = await made(bench, lifecycle={"preStop": {"sleep": {"seconds": 1}}})
    await until(pod, lambda: status(pod)["ready"])
    await pod.request_stop(5)
    await until(pod, lambda: pod.journal.record.closed)
    (grace,) = [args["grace_s"] for call, args in guest(bench).calls if call == "container.stop"]
    assert 3.5 < grace < 4.1


async def test_failed_pre_stop_is_told_and_ends_it_all_the_same(bench: Bench) -> None:
    pod = await made(bench, script=Script(looks={"bye": False}), lifecycle={"preStop": {"exec": {"command": ["bye"]}}})
    await until(pod, lambda: status(pod)["ready"])
    await pod.request_stop(5)
    await until(pod, lambda: pod.journal.record.closed)
    assert "FailedPreStopHook" in said(pod)


async def test_a_grace_period_may_be_shortened(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypervisor.controller.vm_session.EXTENSION_S", 0.1)
    pod = await made(bench, script=Script(ignore_sigterm=True))
    await until(pod, lambda: status(pod)["ready"])
    await pod.request_stop(600)
    async with asyncio.timeout(5):
        while not any(call == "container.stop" for call, _ in guest(bench).calls):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)
    began = time.monotonic()
    await pod.request_stop(0.2)
    await until(pod, lambda: pod.journal.record.closed)
    assert time.monotonic() - began < 3
    assert status(pod)["state"]["terminated"]["exitCode"] == 137


# ---- messages and sidecars -------------------------------------------------------------------------------------------


async def test_termination_message(bench: Bench) -> None:
    pod = await made(
        bench, "Never", terminationMessagePath="/tmp/why", terminationMessagePolicy="FallbackToLogsOnError"
    )
    await until(pod, lambda: status(pod)["ready"])
    (args,) = [args for call, args in guest(bench).calls if call == "container.start"]
    assert args["message"] == {"path": "/tmp/why", "max_bytes": 4096, "from_logs": True}
    guest(bench).exit("c", 1, termination_message="because")
    await until(pod, lambda: pod.journal.record.terminal)
    assert status(pod)["state"]["terminated"]["message"] == "because"


SIDECARS = [
    {"name": "s1", "image": "x", "restartPolicy": "Always", "startupProbe": probe("s1-up", failureThreshold=1000)},
    {"name": "i", "image": "x"},
    {"name": "s2", "image": "x", "restartPolicy": "Always"},
]


def started(bench: Bench) -> list[str]:
    return [args["name"] for call, args in guest(bench).calls if call == "container.start"]


async def test_sidecars_start_in_order_and_end_in_reverse(bench: Bench) -> None:
    script = Script(ends={"i": [0]}, looks={"s1-up": False})
    bench.machines.scripts = [script]
    pod = await bench.create(initContainers=SIDECARS)
    await until(pod, lambda: bool(bench.machines.started) and guest(bench).looks("s1-up") >= 2)
    assert started(bench) == ["s1"]
    assert conditions(pod)["Initialized"] == "False"
    assert pod.journal.record.phase == "Pending"
    script.looks["s1-up"] = True
    await until(pod, lambda: pod.journal.record.phase == "Running")
    assert started(bench) == ["s1", "i", "s2", "c"]
    assert conditions(pod)["Initialized"] == conditions(pod)["Ready"] == "True"
    guest(bench).exit("s2", 1)  # restarts by itself, though the pod's policy is Never
    await until(pod, lambda: pod.journal.record.container("s2").restarts == 1)
    guest(bench).exit("c", 0)
    await until(pod, lambda: pod.journal.record.terminal)
    assert pod.journal.record.phase == "Succeeded"
    assert [args["name"] for call, args in guest(bench).calls if call == "container.stop"] == ["s2", "s1"]
    assert all(isinstance(c.state, Terminated) for c in pod.journal.record.init_containers)


async def test_a_failed_init_container_ends_the_sidecars_too(bench: Bench) -> None:
    bench.machines.scripts = [Script(ends={"i": [3]})]
    pod = await bench.create(initContainers=SIDECARS)
    await until(pod, lambda: pod.journal.record.terminal)
    assert pod.journal.record.phase == "Failed"
    assert [args["name"] for call, args in guest(bench).calls if call == "container.stop"] == ["s1"]


async def test_stop_ends_the_main_containers_first(bench: Bench) -> None:
    bench.machines.scripts = [Script(ends={"i": [0]})]
    pod = await bench.create(initContainers=SIDECARS)
    await until(pod, lambda: pod.journal.record.phase == "Running")
    await pod.request_stop(5)
    await until(pod, lambda: pod.journal.record.closed)
    assert [args["name"] for call, args in guest(bench).calls if call == "container.stop"] == ["c", "s2", "s1"]


async def test_sidecars_are_taken_over(bench: Bench) -> None:
    bench.machines.scripts = [Script(ends={"i": [0]})]
    pod = await bench.create(initContainers=SIDECARS)
    await until(pod, lambda: pod.journal.record.phase == "Running")
    await bench.restart()
    taken = bench.pods.get("default", "p")
    guest(bench).exit("s2", 1)
    await until(taken, lambda: taken.journal.record.container("s2").restarts == 1)
    guest(bench).exit("c", 0)
    await until(taken, lambda: taken.journal.record.terminal)
    assert taken.journal.record.phase == "Succeeded"
