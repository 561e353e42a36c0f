"""The life of a pod, with made-up guests: states, restarts, losses, take-overs. See `fake_guest` for what is real."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from typing import Any

import pytest
from fake_guest import Script
from pod_bench import Bench, manifest, until

from hypervisor.controller.feed import AgentFeed
from hypervisor.controller.record import Running, Terminated, Waiting, from_json, to_json
from hypervisor.errors import Conflict, InvalidInput, NotFound, ResourceExhausted, VmFailed
from hypervisor.images.model import ImageConfig
from hypervisor.introspect.agent import AgentClient


def state(pod: Any, name: str = "c") -> Any:
    return pod.journal.record.container(name).state


async def test_a_pod_runs_to_its_end_and_its_vm_goes(bench: Bench) -> None:
    bench.machines.scripts = [Script(ends={"c": [7]})]
    pod = await bench.create()
    assert pod.view()["status"]["phase"] == "Pending"
    await until(pod, lambda: pod.journal.record.closed)
    record = pod.journal.record
    assert (record.phase, state(pod).exit_code, state(pod).reason) == ("Failed", 7, "Error")
    assert not pod.paths.vm.exists()
    assert (pod.paths.logs / "c/0.log").read_text().endswith("hello\n")
    assert bench.pods.find("default", "p").archived_logs == pod.paths.logs
    await pod.request_delete()
    await asyncio.wait_for(pod.gone.wait(), 5)
    assert not pod.paths.directory.exists()
    with pytest.raises(NotFound):
        bench.pods.get("default", "p")


async def test_running_pod_is_ready_and_reachable(bench: Bench) -> None:
    pod = await bench.create()
    await until(pod, lambda: pod.journal.record.phase == "Running")
    view = pod.view()
    conditions = {c["type"]: c["status"] for c in view["status"]["conditions"]}
    assert conditions["Ready"] == "True"
    assert "startedAt" in view["status"]["containerStatuses"][0]["state"]["running"]
    assert bench.pods.find("default", "p").address is not None
    assert set(json.loads(view["metadata"]["annotations"]["podvisor.dev/timing"])) >= {"pull", "vm", "boot", "setup"}


async def test_always_restarts_at_once_then_with_back_off(bench: Bench) -> None:
    bench.machines.scripts = [Script(ends={"c": [1, 1, 1, None]})]
    pod = await bench.create(policy="Always")
    seen: list[str] = []

    def done() -> bool:
        found = state(pod)
        if isinstance(found, Waiting) and found.reason not in seen:
            seen.append(found.reason)
        return pod.journal.record.container("c").restarts == 3 and isinstance(found, Running)

    await until(pod, done)
    assert seen == ["ContainerCreating", "CrashLoopBackOff"]
    last = pod.journal.record.container("c").last
    assert last is not None
    assert last.exit_code == 1
    assert pod.journal.record.phase == "Running"


async def test_on_failure_stops_at_success(bench: Bench) -> None:
    bench.machines.scripts = [Script(ends={"c": [1, 0]})]
    pod = await bench.create(policy="OnFailure")
    await until(pod, lambda: pod.journal.record.phase == "Succeeded")
    assert pod.journal.record.container("c").restarts == 1


async def test_init_containers_run_in_turn_and_a_failed_one_fails_the_pod(bench: Bench) -> None:
    bench.machines.scripts = [Script(ends={"i": [0], "j": [2]})]
    init = [{"name": "i", "image": "x"}, {"name": "j", "image": "x"}]
    pod = await bench.create(initContainers=init)
    await until(pod, lambda: pod.journal.record.terminal)
    started = [a["name"] for call, a in bench.machines.started[0].calls if call == "container.start"]
    assert started == ["i", "j"]
    assert pod.journal.record.phase == "Failed"
    assert pod.view()["status"]["initContainerStatuses"][1]["state"]["terminated"]["exitCode"] == 2


async def test_refused_start_is_the_containers_end(bench: Bench) -> None:
    bench.machines.scripts = [Script(refuse={"c": "no such program"})]
    pod = await bench.create()
    await until(pod, lambda: pod.journal.record.terminal)
    assert (state(pod).reason, state(pod).exit_code, state(pod).message) == ("StartError", 127, "no such program")


async def test_oom_is_named(bench: Bench) -> None:
    pod = await bench.create()
    await until(pod, lambda: isinstance(state(pod), Running))
    bench.machines.started[0].exit("c", 137, oom_killed=True, signal=9)
    await until(pod, lambda: pod.journal.record.terminal)
    assert (state(pod).reason, state(pod).exit_code) == ("OOMKilled", 137)


# ---- images ----------------------------------------------------------------------------------------------------------


async def test_images_are_tried_again(bench: Bench) -> None:
    bench.images.failures = [NotFound("no such image"), NotFound("no such image")]
    pod = await bench.create()
    await until(pod, lambda: isinstance(state(pod), Waiting) and state(pod).reason == "ImagePullBackOff")
    assert "no such image" in state(pod).message
    await until(pod, lambda: isinstance(state(pod), Running))


async def test_pod_that_waits_for_an_image_can_be_stopped(bench: Bench) -> None:
    bench.images.failures = [NotFound("no such image")] * 1000
    pod = await bench.create()
    await until(pod, lambda: isinstance(state(pod), Waiting) and state(pod).reason == "ImagePullBackOff")
    await pod.request_stop()
    await until(pod, lambda: pod.journal.record.closed)
    assert (pod.journal.record.phase, pod.journal.record.reason) == ("Failed", "Stopped")


async def test_image_without_a_command_fails_before_a_vm_is_started(bench: Bench) -> None:
    bench.images.config = ImageConfig()
    pod = await bench.create()
    await until(pod, lambda: pod.journal.record.terminal)
    assert state(pod).reason == "CreateContainerConfigError"
    assert "no command given" in pod.journal.record.message
    assert not bench.machines.started


# ---- lost VMs --------------------------------------------------------------------------------------------------------


async def test_dead_vm_fails_the_pod_with_its_reason(bench: Bench) -> None:
    pod = await bench.create()
    await until(pod, lambda: isinstance(state(pod), Running))
    await bench.machines.started[0].die("QEMU was killed (signal 9)")
    await until(pod, lambda: pod.journal.record.closed)
    record = pod.journal.record
    assert (record.phase, record.reason, record.message) == ("Failed", "VmFailed", "QEMU was killed (signal 9)")
    assert (state(pod).exit_code, state(pod).reason) == (137, "VmFailed")
    assert pod.paths.console.read_bytes() == b"booting\n"
    assert "QEMU was killed" in bench.pods.find("default", "p").detail


async def test_dead_vm_is_replaced_under_always(bench: Bench) -> None:
    bench.machines.scripts = [Script(ends={"done": [0]}), Script()]
    containers = [{"name": "c", "image": "x"}, {"name": "done", "image": "x"}]
    pod = await bench.create(policy="OnFailure", containers=containers)
    await until(pod, lambda: isinstance(state(pod), Running) and isinstance(state(pod, "done"), Terminated))
    await bench.machines.started[0].die("vmx was killed")
    await until(pod, lambda: pod.journal.record.container("c").restarts == 1)
    assert pod.journal.record.vm_starts == 2
    started = [a["name"] for call, a in bench.machines.started[1].calls if call == "container.start"]
    assert started == ["c"]  # what had succeeded stays done
    assert pod.journal.record.message == ""


async def test_silent_agent_is_given_up(bench: Bench) -> None:
    pod = await bench.create()
    await until(pod, lambda: isinstance(state(pod), Running))
    guest = bench.machines.started[0]
    guest.silent = True
    guest.drop_connections()
    await until(pod, lambda: pod.journal.record.closed, timeout=60)
    assert "does not answer" in pod.journal.record.message


async def test_broken_connection_loses_no_end(bench: Bench) -> None:
    pod = await bench.create()
    await until(pod, lambda: isinstance(state(pod), Running))
    guest = bench.machines.started[0]
    guest.drop_connections()
    guest.exit("c", 4)
    await until(pod, lambda: pod.journal.record.terminal)
    assert state(pod).exit_code == 4


async def test_connection_that_broke_after_a_long_silence_is_made_anew(bench: Bench) -> None:
    """Patience begins when the connection is lost: an agent that has nothing to tell says nothing."""
    pod = await bench.create()
    await until(pod, lambda: isinstance(state(pod), Running))
    guest = bench.machines.started[0]
    feed = AgentFeed(AgentClient(guest.address), patience_s=0.3)
    following = asyncio.create_task(feed.run())
    try:
        await feed.wait_ready()
        await asyncio.sleep(0.6)
        before = sum(call == "events" for call, _ in guest.calls)
        guest.drop_connections()
        async with asyncio.timeout(10):
            while sum(call == "events" for call, _ in guest.calls) == before:
                assert not following.done()
                await asyncio.sleep(0.01)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_vm_that_cannot_start_is_tried_again_under_always(bench: Bench) -> None:
    bench.machines.failures = [VmFailed("no luck"), VmFailed("no luck")]
    pod = await bench.create(policy="Always")
    await until(pod, lambda: isinstance(state(pod), Running))
    assert pod.journal.record.vm_starts == 3


async def test_vm_that_cannot_start_fails_the_pod_under_never(bench: Bench) -> None:
    bench.machines.failures = [VmFailed("no luck")]
    pod = await bench.create()
    await until(pod, lambda: pod.journal.record.closed)
    assert (pod.journal.record.phase, pod.journal.record.message) == ("Failed", "no luck")
    assert bench.pods.find("default", "p").detail == "has failed: no luck"


async def test_deadline(bench: Bench) -> None:
    pod = await bench.create(policy="Always", activeDeadlineSeconds=1)
    await until(pod, lambda: pod.journal.record.terminal)
    assert (pod.journal.record.phase, pod.journal.record.reason) == ("Failed", "DeadlineExceeded")


# ---- stop and delete -------------------------------------------------------------------------------------------------


async def test_stop_keeps_the_pod_listed(bench: Bench) -> None:
    pod = await bench.create(policy="Always")
    await until(pod, lambda: isinstance(state(pod), Running))
    await pod.request_stop(5)
    await until(pod, lambda: pod.journal.record.closed)
    assert (pod.journal.record.phase, state(pod).exit_code) == ("Failed", 143)
    assert ("container.stop", {"name": "c", "grace_s": 5.0}) in bench.machines.started[0].calls


async def test_delete_without_grace_does_not_wait_for_the_guest(bench: Bench) -> None:
    bench.machines.scripts = [Script(ignore_sigterm=True)]
    pod = await bench.create(policy="Always")
    await until(pod, lambda: isinstance(state(pod), Running))
    await pod.request_stop(60)
    assert pod.view()["metadata"].get("deletionTimestamp") is None
    await pod.request_delete(0)
    await asyncio.wait_for(pod.gone.wait(), 5)


async def test_stop_after_delete_changes_nothing(bench: Bench) -> None:
    bench.machines.scripts = [Script(ignore_sigterm=True)]
    pod = await bench.create()
    await until(pod, lambda: isinstance(state(pod), Running))
    await pod.request_delete(1)
    await pod.request_stop(60)
    intent = pod.journal.record.intent
    assert (intent.kind, intent.grace_s) == ("delete", 1)
    await asyncio.wait_for(pod.gone.wait(), 10)


async def test_ended_pods_vm_waits_for_readers(bench: Bench) -> None:
    bench.machines.scripts = [Script(ends={"c": [0]})]
    pod = await bench.create()
    with pod.session():
        await until(pod, lambda: pod.journal.record.terminal)
        await asyncio.sleep(0.05)
        assert bench.pods.find("default", "p").address is not None
    await until(pod, lambda: pod.journal.record.closed)


# ---- admission -------------------------------------------------------------------------------------------------------


async def test_name_is_taken_until_the_pod_is_gone(bench: Bench) -> None:
    pod = await bench.create()
    with pytest.raises(Conflict, match="there is a pod p in namespace default already"):
        await bench.create()
    await pod.request_delete(0)
    await asyncio.wait_for(pod.gone.wait(), 5)
    await bench.create()


async def test_bad_manifest_changes_nothing(bench: Bench) -> None:
    with pytest.raises(InvalidInput):
        await bench.create(restartPolicy="Perhaps")
    assert list(bench.paths.pods.iterdir()) == []


async def test_memory_is_promised_once(bench: Bench) -> None:
    limits = {"resources": {"limits": {"memory": "1500Mi"}}}
    containers = [{"name": "c", "image": "x"} | limits]
    await bench.create("a", containers=containers)
    await bench.create("b", containers=containers)
    with pytest.raises(ResourceExhausted, match=r"lower resources\.limits\.memory or remove a pod"):
        await bench.create("d", containers=containers)
    assert len(list(bench.paths.pods.iterdir())) == 2
    await bench.pods.get("default", "a").request_delete(0)
    await asyncio.wait_for(bench.pods.get("default", "a").gone.wait(), 5)
    await bench.create("d", containers=containers)


async def test_so_many_vms_start_at_a_time(bench: Bench) -> None:
    bench.machines.hold.clear()
    pods = [await bench.create(f"p{i}") for i in range(6)]
    await asyncio.wait_for(bench.machines.busy.wait(), 5)
    await asyncio.sleep(0.05)  # those that should not start get the time to do so
    bench.machines.hold.set()
    for pod in pods:
        await until(pod, lambda pod=pod: isinstance(state(pod), Running))
    assert bench.machines.most_starting == bench.starts


# ---- another daemon --------------------------------------------------------------------------------------------------


async def test_running_pod_is_taken_over(bench: Bench) -> None:
    pod = await bench.create(policy="Always")
    await until(pod, lambda: isinstance(state(pod), Running))
    await bench.restart()
    taken = bench.pods.get("default", "p")
    bench.machines.started[0].exit("c", 3)
    await until(taken, lambda: taken.journal.record.container("c").restarts == 1)
    assert len(bench.machines.started) == 1
    assert bench.images.resolved[-1] == ("c", "ab" * 32)  # the image that it runs with, not a newer one


async def test_end_that_nobody_saw_is_recorded(bench: Bench) -> None:
    pod = await bench.create()
    await until(pod, lambda: isinstance(state(pod), Running))
    await bench.pods.close()
    bench.machines.started[0].exit("c", 9)
    await bench.restart()
    taken = bench.pods.get("default", "p")
    await until(taken, lambda: taken.journal.record.closed)
    assert state(taken).exit_code == 9


async def test_start_that_was_cut_short_is_begun_anew(bench: Bench) -> None:
    bench.machines.hold.clear()
    pod = await bench.create()
    await until(pod, lambda: pod.journal.record.vm_starts == 1)
    bench.machines.hold.set()
    await bench.restart()
    taken = bench.pods.get("default", "p")
    await until(taken, lambda: isinstance(state(taken), Running))


async def test_closed_pod_stays_as_it_was(bench: Bench) -> None:
    bench.machines.scripts = [Script(ends={"c": [0]})]
    pod = await bench.create()
    await until(pod, lambda: pod.journal.record.closed)
    before = pod.view()
    await bench.restart()
    assert bench.pods.get("default", "p").view() == before


async def test_unfinished_acceptance_and_damaged_pods(bench: Bench) -> None:
    half = bench.paths.pods / "12345678"
    (half / "vm").mkdir(parents=True)
    bad = bench.paths.pods / "87654321"
    bad.mkdir()
    (bad / "pod.json").write_text("{")
    await bench.restart()
    assert not half.exists()
    assert half / "vm" in bench.machines.swept
    assert bad.exists()


async def test_record_survives_the_disk(bench: Bench) -> None:
    bench.machines.scripts = [Script(ends={"c": [1, None]})]
    pod = await bench.create(policy="Always", initContainers=[])
    await until(pod, lambda: pod.journal.record.container("c").restarts == 1)
    record = pod.journal.record
    assert from_json(json.loads(json.dumps(to_json(record)))) == record


async def test_host_stop_removes_all_and_accepts_none(bench: Bench) -> None:
    await bench.create("a")
    await bench.create("b")
    await asyncio.wait_for(bench.pods.remove_all(), 10)
    assert list(bench.pods) == []
    with pytest.raises(Exception, match="stopping"):
        await bench.pods.create(manifest("d"))


# ---- what the guest hands over ---------------------------------------------------------------------------------------


def _tar(*members: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for member in members:
            archive.addfile(member)
    return file.getvalue()


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "hostile",
    [
        _tar(_member("../escaped")),
        _tar(_member("/escaped")),
        _tar(_member("c/../../escaped")),
        _tar(_member("a/b/c/d/e")),
        _tar(_member("c/0.log"), _member("c/0.log")),
        b"no archive" * 100,
        _tar(_member("c", tarfile.SYMTYPE, "/"), _member("c/escaped")),
    ],
)
async def test_hostile_archive_of_logs_writes_nothing_outside(bench: Bench, hostile: bytes) -> None:
    bench.machines.scripts = [Script(ends={"c": [0]}, logs=hostile)]
    pod = await bench.create()
    await until(pod, lambda: pod.journal.record.closed)
    left = {p.name for p in pod.paths.directory.iterdir()} | {p.name for p in bench.paths.pods.iterdir()}
    assert left <= {"pod.json", "status.json", "console.log", "logs", pod.paths.directory.name}
    assert not any(p.is_symlink() for p in pod.paths.directory.rglob("*"))


async def test_vm_left_from_a_start_that_was_cut_short_is_ended(bench: Bench) -> None:
    bench.machines.scripts = [Script(mute=True), Script()]
    pod = await bench.create()
    await until(pod, lambda: pod.machine is not None)
    await bench.restart()
    taken = bench.pods.get("default", "p")
    await until(taken, lambda: isinstance(state(taken), Running))
    assert len(bench.machines.started) == 2
    assert await bench.machines.started[0].wait_dead() == "removed"


async def test_guest_that_never_answers(bench: Bench) -> None:
    bench.machines.scripts = [Script(mute=True)]
    pod = await bench.create()
    await until(pod, lambda: pod.journal.record.closed, timeout=20)
    assert pod.journal.record.message == ("the guest did not reach its agent within 4 s; last of the console: booting")


async def test_full_disk_of_the_host_is_shown_while_it_lasts(bench: Bench) -> None:
    pod = await bench.create()
    await until(pod, lambda: isinstance(state(pod), Running))
    bench.machines.started[0].disk.put_nowait(True)
    await until(pod, lambda: pod.journal.record.reason == "HostDiskFull")
    bench.machines.started[0].disk.put_nowait(False)
    await until(pod, lambda: pod.journal.record.reason == "")
    assert pod.journal.record.phase == "Running"
