"""Suspending and resuming a pod, with made-up guests: every place at which a daemon can be killed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fake_guest import FakeGuest, Script
from pod_bench import Bench, until

from hypervisor.controller.podvm import PodVm
from hypervisor.errors import Conflict, HvError, ResourceExhausted


async def running(bench: Bench, **spec: Any) -> PodVm:
    pod = await bench.create(**spec)
    await until(pod, lambda: pod.journal.record.phase == "Running" and pod.journal.record.ready)
    return pod


def left(pod: PodVm) -> set[str]:
    return {p.name for p in pod.paths.directory.iterdir()}


async def test_suspended_and_resumed(bench: Bench) -> None:
    pod = await running(bench)
    started = pod.journal.record.container("c").state
    await pod.suspension.request("suspended")
    assert pod.machine is None
    assert left(pod) == {"pod.json", "status.json", "suspended"}
    status = pod.view()["status"]
    assert (status["phase"], status["reason"]) == ("Running", "Suspended")
    assert not status["containerStatuses"][0]["ready"]
    assert bench.pods.find("default", "p").address is None
    assert "suspended" in bench.pods.find("default", "p").detail
    await pod.suspension.request("")
    assert left(pod) == {"pod.json", "status.json", "vm"}
    assert any(call == "renew" for call, _ in bench.machines.started[-1].calls)
    await until(pod, lambda: pod.journal.record.ready)
    assert pod.journal.record.container("c").state == started
    assert "reason" not in pod.view()["status"]
    bench.machines.started[-1].exit("c", 0)
    await until(pod, lambda: pod.journal.record.closed)
    assert pod.journal.record.phase == "Succeeded"


async def test_guest_that_cannot_be_saved_goes_on(bench: Bench) -> None:
    pod = await running(bench)
    bench.machines.started[0].refuse_save = ResourceExhausted("the host's disk is full")
    with pytest.raises(ResourceExhausted, match="disk is full"):
        await pod.suspension.request("suspended")
    await until(pod, lambda: pod.journal.record.ready)
    assert pod.machine is bench.machines.started[0]
    assert left(pod) == {"pod.json", "status.json", "vm"}


async def test_snapshot_that_does_not_fit_stays(bench: Bench) -> None:
    pod = await running(bench)
    await pod.suspension.request("suspended")
    bench.machines.failures = [Conflict("it was taken with QEMU 7.2.0, here is 10.0.0")]
    with pytest.raises(Conflict, match=r"QEMU 7\.2\.0"):
        await pod.suspension.request("")
    assert left(pod) == {"pod.json", "status.json", "suspended"}
    assert pod.view()["status"]["reason"] == "Suspended"
    assert "QEMU 7.2.0" in pod.view()["status"]["message"]
    await pod.suspension.request("")
    await until(pod, lambda: pod.journal.record.ready)


async def test_requests_that_make_no_sense(bench: Bench) -> None:
    pod = await running(bench)
    with pytest.raises(Conflict, match="is not suspended"):
        await pod.suspension.request("")
    await pod.suspension.request("suspended")
    with pytest.raises(Conflict, match="is suspended already"):
        await pod.suspension.request("suspended")
    await pod.request_stop()
    await until(pod, lambda: pod.journal.record.closed)
    with pytest.raises(Conflict, match="has ended"):
        await pod.suspension.request("suspended")


async def test_pod_that_starts_cannot_be_suspended(bench: Bench) -> None:
    bench.machines.scripts = [Script(mute=True)]
    pod = await bench.create()
    with pytest.raises(Conflict, match="still starting"):
        await pod.suspension.request("suspended")


async def test_suspended_pod_is_stopped_and_removed(bench: Bench) -> None:
    pod = await running(bench)
    await pod.suspension.request("suspended")
    await pod.request_stop()
    await until(pod, lambda: pod.journal.record.closed)
    assert not pod.paths.suspended.exists()
    await pod.request_delete()
    await asyncio.wait_for(pod.gone.wait(), 5)
    assert not pod.paths.directory.exists()


# ---- daemons that were killed ----------------------------------------------------------------------------------------


async def again(bench: Bench) -> PodVm:
    await bench.restart()
    return bench.pods.get("default", "p")


def snapshot_of(pod: PodVm, guest: FakeGuest, name: str = "suspended") -> None:
    folder = pod.paths.directory / name
    folder.mkdir()
    (folder / "containers").write_text(json.dumps(guest.containers))
    (folder / "manifest.json").write_text("{}")


def record(pod: PodVm, suspend: str) -> None:
    value = json.loads(pod.paths.status.read_text())
    pod.paths.status.write_text(json.dumps(value | {"suspend": suspend}))


@pytest.mark.parametrize("partly", [False, True])
async def test_killed_while_saving(bench: Bench, partly: bool) -> None:
    pod = await running(bench)
    await bench.pods.close()
    guest = bench.machines.started[0]
    guest.held = True
    if partly:
        snapshot_of(pod, guest, "suspended.new")
    record(pod, "suspending")
    pod = await again(bench)
    await until(pod, lambda: pod.machine is not None and pod.journal.record.ready)
    assert pod.machine is guest
    assert not guest.held
    assert left(pod) == {"pod.json", "status.json", "vm"}


async def test_killed_when_saved(bench: Bench) -> None:
    """The guest must not run again: its disk is the snapshot's."""
    pod = await running(bench)
    await bench.pods.close()
    guest = bench.machines.started[0]
    guest.held = True
    snapshot_of(pod, guest)
    record(pod, "suspending")
    pod = await again(bench)
    await until(pod, lambda: pod.journal.record.suspend == "suspended")
    assert guest.held
    assert guest.ended
    assert left(pod) == {"pod.json", "status.json", "suspended"}
    await pod.suspension.request("")
    await until(pod, lambda: pod.journal.record.ready)


@pytest.mark.parametrize("started", [False, True])
async def test_killed_while_resuming(bench: Bench, started: bool) -> None:
    """What was started and never ran is ended, and started anew."""
    pod = await running(bench)
    await pod.suspension.request("suspended")
    await bench.pods.close()
    if started:
        request = pod.vm_request()
        guest = await bench.machines.resume(request, pod.paths.suspended)
    record(pod, "resuming")
    pod = await again(bench)
    await until(pod, lambda: pod.machine is not None and pod.journal.record.ready)
    if started:
        assert guest.held
        assert guest.ended
    assert left(pod) == {"pod.json", "status.json", "vm"}


async def test_killed_before_a_resumed_guest_ran(bench: Bench) -> None:
    pod = await running(bench)
    await bench.pods.close()
    guest = bench.machines.started[0]
    guest.held = True
    snapshot_of(pod, guest)
    pod = await again(bench)
    await until(pod, lambda: pod.machine is not None and pod.journal.record.ready)
    assert not guest.held
    assert left(pod) == {"pod.json", "status.json", "vm"}


async def test_suspended_pod_is_found_again(bench: Bench) -> None:
    pod = await running(bench)
    await pod.suspension.request("suspended")
    pod = await again(bench)
    with pytest.raises(HvError, match="already"):
        await pod.suspension.request("suspended")
    await pod.suspension.request("")
    await until(pod, lambda: pod.journal.record.ready)
    assert len(bench.machines.started) == 2
