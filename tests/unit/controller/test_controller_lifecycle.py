"""The documented life cycle, point by point, where no other test looks: states, reasons and conditions of a status.

Source: Kubernetes documentation, "Pod Lifecycle", "Init Containers", "Sidecar Containers".
"""

from __future__ import annotations

from typing import Any

from fake_guest import Script
from pod_bench import Bench, until

from hypervisor.controller.podvm import PodVm
from hypervisor.controller.record import Running, Waiting


def status(pod: PodVm) -> dict[str, Any]:
    found: dict[str, Any] = pod.view()["status"]
    return found


def conditions(pod: PodVm) -> dict[str, tuple[str, str]]:
    return {c["type"]: (c["status"], c.get("reason", "")) for c in status(pod)["conditions"]}


def init(*names: str) -> list[dict[str, Any]]:
    return [{"name": name, "image": "x"} for name in names]


async def test_a_pod_that_waits_for_its_vm(bench: Bench) -> None:
    bench.machines.hold.clear()
    pod = await bench.create()
    await bench.machines.busy.wait()
    assert status(pod)["phase"] == "Pending" and "podIP" not in status(pod)
    assert status(pod)["containerStatuses"][0]["state"] == {"waiting": {"reason": "ContainerCreating"}}
    assert conditions(pod) == {
        "PodReadyToStartContainers": ("False", "VmNotReady"),
        "Initialized": ("True", ""),
        "Ready": ("False", "ContainersNotReady"),
        "ContainersReady": ("False", "ContainersNotReady"),
        "PodScheduled": ("True", ""),
    }
    bench.machines.hold.set()
    await until(pod, lambda: conditions(pod)["Ready"] == ("True", ""))
    assert conditions(pod)["PodReadyToStartContainers"] == ("True", "")
    assert status(pod)["podIPs"] == [{"ip": status(pod)["podIP"]}]
    assert status(pod)["hostIPs"] == [{"ip": status(pod)["hostIP"]}]


async def test_containers_wait_while_the_pod_initializes(bench: Bench) -> None:
    bench.machines.scripts = [Script()]
    pod = await bench.create(initContainers=init("i", "j"))
    await until(pod, lambda: isinstance(pod.journal.record.container("i").state, Running))
    for waiting in (status(pod)["containerStatuses"][0], status(pod)["initContainerStatuses"][1]):
        assert waiting["state"] == {"waiting": {"reason": "PodInitializing"}}
    assert status(pod)["phase"] == "Pending"
    assert conditions(pod)["Initialized"] == ("False", "ContainersNotInitialized")


async def test_init_containers_are_tried_again_under_always_with_back_off_and_run_once(bench: Bench) -> None:
    bench.machines.scripts = [Script(ends={"i": [1, 1, 1, 0]})]
    pod = await bench.create(policy="Always", initContainers=init("i"))
    reasons: set[str] = set()

    def up() -> bool:
        state = pod.journal.record.container("i").state
        if isinstance(state, Waiting):
            reasons.add(state.reason)
        return status(pod)["phase"] == "Running"

    await until(pod, up)
    (first,) = status(pod)["initContainerStatuses"]
    assert (first["restartCount"], first["ready"]) == (3, True)
    assert first["state"]["terminated"]["reason"] == "Completed" and first["lastState"]["terminated"]["exitCode"] == 1
    assert "CrashLoopBackOff" in reasons
    started = [args["name"] for call, args in bench.machines.started[0].calls if call == "container.start"]
    assert started == ["i", "i", "i", "i", "c"]


async def test_a_pod_that_has_succeeded(bench: Bench) -> None:
    bench.machines.scripts = [Script(ends={"i": [0], "c": [0]})]
    pod = await bench.create(policy="OnFailure", initContainers=init("i"))
    await until(pod, lambda: pod.journal.record.closed)
    assert status(pod)["phase"] == "Succeeded"
    assert conditions(pod)["Initialized"] == ("True", "PodCompleted")
    assert conditions(pod)["Ready"] == conditions(pod)["ContainersReady"] == ("False", "PodCompleted")
    assert conditions(pod)["PodReadyToStartContainers"][0] == "False"
    (ended,) = status(pod)["containerStatuses"]
    assert (ended["ready"], ended["started"], ended["state"]["terminated"]["exitCode"]) == (False, False, 0)


async def test_one_container_fails_and_the_other_goes_on(bench: Bench) -> None:
    bench.machines.scripts = [Script(ends={"a": [3]})]
    pod = await bench.create(containers=init("a", "b"))
    await until(pod, lambda: "terminated" in status(pod)["containerStatuses"][0]["state"])
    assert status(pod)["phase"] == "Running" and conditions(pod)["Ready"][0] == "False"
    bench.machines.started[0].exit("b", 0)
    await until(pod, lambda: pod.journal.record.terminal)
    assert status(pod)["phase"] == "Failed"  # one failed, none is started again


async def test_a_deadline_ends_a_pod_that_restarts_for_ever(bench: Bench) -> None:
    bench.machines.scripts = [Script()]
    pod = await bench.create(policy="Always", activeDeadlineSeconds=1)
    await until(pod, lambda: pod.journal.record.closed)
    assert (status(pod)["phase"], status(pod)["reason"]) == ("Failed", "DeadlineExceeded")
    assert status(pod)["message"] == "Pod was active on the node longer than the specified deadline"
    assert status(pod)["containerStatuses"][0]["restartCount"] == 0


async def test_a_container_that_ended_by_a_signal_says_which(bench: Bench) -> None:
    pod = await bench.create()
    await until(pod, lambda: status(pod)["phase"] == "Running")
    bench.machines.started[0].exit("c", 139, signal=11)
    await until(pod, lambda: pod.journal.record.terminal)
    ended = status(pod)["containerStatuses"][0]["state"]["terminated"]
    assert (ended["exitCode"], ended["signal"], ended["reason"]) == (139, 11, "Error")
