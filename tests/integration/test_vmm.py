"""VMs under a real QEMU, confined as in production: started, controlled, killed, found again; and nothing ever left."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from agent_vm import IMAGE_DISK, AgentVm, make_image
from tiny_guest import AGAIN, HALT, POWER_OFF, RESET, tiny_guest

from hypervisor.agent import wire
from hypervisor.errors import Conflict, HvError, NotFound, Unavailable, VmFailed
from hypervisor.vmm.capabilities import HostCapabilities, probe
from hypervisor.vmm.cgroup import Cgroups
from hypervisor.vmm.config import MIB, DataDisk, ImageDisk, VmConfig
from hypervisor.vmm.death import VmDied
from hypervisor.vmm.directory import Processes, VmDirectory, boot_id
from hypervisor.vmm.guest import GuestImage
from hypervisor.vmm.identity import IdentityPool
from hypervisor.vmm.launch import Ready, adopt, start
from hypervisor.vmm.plan import LaunchPlan, plan_launch
from hypervisor.vmm.sweep import find_processes, sweep
from hypervisor.vmm.vm import RunningVm, StopTimeouts
from hypervisor.vmx.config import VmxConfig, VmxFds
from hypervisor.vmx.process import ProcessId
from hypervisor.vmx.zygote import Zygote
from hypervisor.vsock.address import VsockAddress
from hypervisor.vsock.connect import connect

pytestmark = pytest.mark.qemu

SHORT = StopTimeouts(agent_s=1.0, acpi_s=0.3, quit_s=5.0)


@dataclass
class Bench:
    """What a test starts VMs with."""

    state: Path
    capabilities: HostCapabilities
    pool: IdentityPool
    zygote: Zygote
    started: list[RunningVm] = field(default_factory=list)

    def plan(self, guest: GuestImage, **fields: Any) -> LaunchPlan:
        fields = {"memory_bytes": 64 * MIB, "net": "none", "data_disk": DataDisk(size_bytes=16 * MIB)} | fields
        config = VmConfig(name="test/vm", guest=guest, **fields)
        return plan_launch(config, self.capabilities, self.state / f"vm{len(self.started)}", self.pool.take())

    async def start(self, plan: LaunchPlan, ready: Ready | None = None, **how: Any) -> RunningVm:
        vm = await start(plan, self.zygote, ready=ready, **how)
        self.started.append(vm)
        return vm

    async def tiny(self, text: str = "tiny guest is up\n", then: bytes = HALT, **fields: Any) -> RunningVm:
        return await self.start(self.plan(tiny_guest(self.state / "guest", text, then), **fields))

    async def abandon(self, vm: RunningVm) -> None:
        """As a daemon that ends: the test has to end the VM."""
        await vm.detach()
        self.started.remove(vm)

    def leftovers(self) -> list[str]:
        """Everything of the VMs that is still there."""
        cgroups = Cgroups(self.capabilities.cgroup_layout, self.capabilities.cgroup_scope)
        scopes = [d.parent for d in cgroups.paths("x").directories]
        found = [str(d) for scope in scopes if scope.exists() for d in scope.iterdir() if d.is_dir()]
        for folder in [self.state / f"vm{i}" for i in range(len(self.started) + 1)]:
            found += [str(folder)] if folder.exists() else []
            found += [str(process) for process in find_processes(folder)]
        return found


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@asynccontextmanager
async def make_bench(state: Path) -> AsyncIterator[Bench]:
    capabilities = await probe(state, guest_kernel=None, accelerator="tcg", vsock="vhost-user")
    async with Zygote.start() as zygote:
        gc.collect()  # what an earlier test's event loop left to the collector
        before = open_fds()
        bench = Bench(state, capabilities, IdentityPool(capabilities), zygote)
        try:
            yield bench
            for vm in bench.started:
                await vm.end_now()
                await vm.remove()
            assert bench.leftovers() == []
            assert open_fds() <= before
        finally:
            for i in range(len(bench.started) + 1):
                await sweep(state / f"vm{i}", capabilities)


@pytest.fixture
async def bench(short_path: Path) -> AsyncIterator[Bench]:
    async with make_bench(short_path) as made:
        yield made


def status_of(pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


async def until(condition: Callable[[], bool], what: str, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.01)


async def printed(vm: RunningVm, text: bytes, count: int = 1) -> None:
    await until(lambda: vm.console_tail(1 << 20).count(text) >= count, f"{count} times {text!r} on the console")


# ---- a life
# ------------------------------------------------------------------------------------------------------------


async def test_start_and_stop(bench: Bench) -> None:
    image = bench.state / "image,odd name.erofs"
    image.write_bytes(bytes(8192))
    vm = await bench.tiny(image_disks=(ImageDisk(serial="img-1", path=image),), net="user")
    await printed(vm, b"tiny guest is up\n")
    assert await vm.status() == "running"
    assert list(vm.timings) == ["directory", "sockets", "cgroup", "disk", "qemu", "vmx", "qmp"]
    stats = await vm.stats()
    if vm.plan.block == "qemu":
        blocks = await vm.execute("query-block")
        assert [b["inserted"]["ro"] for b in blocks] == [True, False, True]
    else:
        assert list(stats.vmx["disks"]) == ["hv-root", "hv-data", "img-1"]
    assert stats.vmx["vsock"]["frontend_connected"] == 1
    report = await vm.stop(timeouts=SHORT)
    assert report.step == "quit"
    assert [step for step, _ in report.failed] == ["acpi"]
    assert not report.death.failed
    assert await vm.status() == "dead"
    assert (await vm.stop()).step == "dead"
    with pytest.raises(Unavailable, match="has ended"):
        await vm.pause()


@pytest.mark.root
async def test_both_processes_are_confined(bench: Bench) -> None:
    vm = await bench.tiny()
    for pid in vm.pids.values():
        status = status_of(pid)
        assert set(status["Uid"].split()) == {str(vm.plan.identity.uid)}
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    cgroup = vm.plan.cgroup
    members = cgroup.cgroups().processes(cgroup.cgroups().paths(cgroup.name))
    assert cgroup.layout.kind == "none" or set(vm.pids.values()) <= set(members)


async def test_an_existing_directory_is_not_touched(bench: Bench) -> None:
    plan = bench.plan(tiny_guest(bench.state / "guest"))
    vm = await bench.start(plan)
    with pytest.raises(Conflict, match="exists"):
        await start(plan, bench.zygote)
    assert await vm.status() == "running"
    with pytest.raises(Conflict, match="still runs"):
        await vm.remove()


async def test_pause_resume_reset(bench: Bench) -> None:
    vm = await bench.tiny()
    await printed(vm, b"is up")
    await vm.pause()
    await vm.pause()
    assert await vm.status() == "paused"
    await vm.resume()
    assert await vm.status() == "running"
    for count in (2, 3):
        await vm.reset()
        await printed(vm, b"is up", count)


async def test_after_a_reset_a_guests_own_reset_still_ends_it(bench: Bench) -> None:
    vm = await bench.tiny("x\n")
    await vm.reset()
    await vm.execute("human-monitor-command", {"command-line": "o /b 0x64 0xfe"})
    assert (await vm.wait_dead()).cause == "panic"


async def test_events(bench: Bench) -> None:
    vm = await bench.tiny()

    async def names() -> list[str]:
        return [event.name async for event in vm.events()]

    reading = asyncio.create_task(names())
    await asyncio.sleep(0)
    await vm.pause()
    await vm.stop()
    assert await reading == ["STOP", "SHUTDOWN"]


# ---- the stop ladder
# -----------------------------------------------------------------------------------------------------


async def test_the_agent_ends_it(bench: Bench) -> None:
    vm = await bench.tiny()
    report = await vm.stop(lambda: vm.execute("quit"), SHORT)
    assert (report.step, report.failed) == ("agent", ())


async def test_an_agent_that_fails_and_one_that_hangs(bench: Bench) -> None:
    async def broken() -> None:
        raise HvError("no answer")

    for shutdown in (broken, asyncio.Event().wait):
        vm = await bench.tiny()
        report = await vm.stop(shutdown, replace(SHORT, agent_s=0.2))
        assert report.step == "quit"
        assert [step for step, _ in report.failed] == ["agent", "acpi"]


async def test_a_hung_qemu_is_killed(bench: Bench) -> None:
    vm = await bench.tiny()
    os.kill(vm.pids["qemu"], signal.SIGSTOP)
    report = await vm.stop(timeouts=StopTimeouts(acpi_s=0.2, quit_s=0.2))
    assert report.step == "kill"
    assert report.seconds < 15


async def test_a_paused_vm_is_not_asked_politely(bench: Bench) -> None:
    vm = await bench.tiny()
    await vm.pause()
    assert (await vm.stop(timeouts=SHORT)).step == "quit"


# ---- deaths
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("then", "cause", "says"), [(POWER_OFF, "guest", "powered off"), (RESET, "panic", "panicked, or its init rebooted")]
)
async def test_the_guest_ends_it(bench: Bench, then: bytes, cause: str, says: str) -> None:
    vm = await bench.tiny("last words\n", then)
    death = await vm.wait_dead()
    assert (death.cause, death.console_tail) == (cause, "last words\n")
    assert says in death.reason


async def test_killed_qemu_is_seen_at_once(bench: Bench) -> None:
    vm = await bench.tiny()
    await printed(vm, b"is up")
    begun = time.monotonic()
    os.kill(vm.pids["qemu"], signal.SIGKILL)
    death = await vm.wait_dead()
    assert time.monotonic() - begun < 1
    assert (death.cause, death.reason) == ("qemu", "QEMU was killed (signal 9)")
    assert death.failed
    assert "tiny guest is up" in death.describe()


async def test_killed_vmx_takes_qemu_along(bench: Bench) -> None:
    vm = await bench.tiny()
    begun = time.monotonic()
    os.kill(vm.pids["vmx"], signal.SIGKILL)
    death = await vm.wait_dead()
    assert time.monotonic() - begun < 2
    assert death.cause == "vmx"
    assert "signal 9" in death.reason or "ended" in death.reason


async def test_a_flood_on_the_console_is_bounded(bench: Bench) -> None:
    vm = await bench.tiny("flood " * 100 + "\n", AGAIN, console_bytes=16 * 1024)
    log = vm.plan.files.console_log
    await until(lambda: b"earlier bytes dropped" in vm.console_tail(1 << 20), "the log is cut")
    assert log.stat().st_size <= 16 * 1024
    assert await vm.status() == "running"


# ---- starts that fail
# ----------------------------------------------------------------------------------------------------


async def test_a_kernel_that_is_none(bench: Bench) -> None:
    guest = tiny_guest(bench.state / "guest")
    guest.kernel.write_bytes(b"\x7fELF nonsense")
    with pytest.raises(VmFailed, match="before it was set up") as caught:
        await start(bench.plan(guest), bench.zygote)
    assert "QEMU said last" in str(caught.value)


async def test_a_disk_that_is_missing(bench: Bench) -> None:
    disk = ImageDisk(serial="img-1", path=bench.state / "none.erofs")
    with pytest.raises(NotFound, match=r"disk img-1: there is no .*none\.erofs"):
        await bench.tiny(image_disks=(disk,))


async def test_a_guest_that_is_never_ready(bench: Bench) -> None:
    async def never(_: VsockAddress) -> None:
        await asyncio.Event().wait()

    plan = bench.plan(tiny_guest(bench.state / "guest", "waiting for Godot\n"))
    with pytest.raises(VmFailed, match=r"not ready within 2 s\nthe guest's console said last:\nwaiting for Godot"):
        await start(plan, bench.zygote, ready=never, ready_timeout_s=2)


async def test_a_guest_that_dies_before_it_is_ready(bench: Bench) -> None:
    async def never(_: VsockAddress) -> None:
        await asyncio.Event().wait()

    plan = bench.plan(tiny_guest(bench.state / "guest", "oops\n", RESET))
    with pytest.raises(VmDied) as caught:
        await start(plan, bench.zygote, ready=never)
    assert (caught.value.death.cause, caught.value.death.console_tail) == ("panic", "oops\n")


async def test_readiness_that_fails(bench: Bench) -> None:
    async def fail(_: VsockAddress) -> None:
        raise HvError("wrong wire version")

    with pytest.raises(HvError, match="wrong wire version"):
        await start(bench.plan(tiny_guest(bench.state / "guest")), bench.zygote, ready=fail)


@pytest.mark.parametrize("milliseconds", [0, 3, 10, 20, 30, 50, 100, 200, 400])
async def test_cancelled_at_any_point(bench: Bench, milliseconds: int) -> None:
    async def never(_: VsockAddress) -> None:
        await asyncio.Event().wait()

    starting = asyncio.create_task(start(bench.plan(tiny_guest(bench.state / "guest")), bench.zygote, ready=never))
    await asyncio.sleep(milliseconds / 1000)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting


async def test_a_zygote_that_is_gone(bench: Bench) -> None:
    async with Zygote.start() as gone:
        os.kill(gone.pid, signal.SIGKILL)
        await gone.wait_exit()
        with pytest.raises(Unavailable, match="zygote"):
            await start(bench.plan(tiny_guest(bench.state / "guest")), gone)


@dataclass
class KillsVmx:
    """A zygote whose first `times` children are killed as soon as they are there."""

    zygote: Zygote
    times: int

    async def fork(self, config: VmxConfig, fds: VmxFds) -> ProcessId:
        process = await self.zygote.fork(config, fds)
        if self.times > 0:
            self.times -= 1
            os.kill(process.pid, signal.SIGKILL)
            async with asyncio.timeout(5):
                while process.alive():  # noqa: ASYNC110 -- until its zygote has reaped it
                    await asyncio.sleep(0.001)
        return process


async def test_a_vmx_killed_before_it_has_a_successor_costs_one_more_attempt(bench: Bench) -> None:
    zygote = KillsVmx(bench.zygote, times=1)
    vm = await start(bench.plan(tiny_guest(bench.state / "guest")), zygote)
    bench.started.append(vm)
    assert zygote.times == 0
    assert await vm.status() == "running"


async def test_a_vmx_that_is_killed_each_time_fails_the_start_with_the_reason(bench: Bench) -> None:
    zygote = KillsVmx(bench.zygote, times=10)
    with pytest.raises(HvError, match=r"QEMU|vmx|process"):
        await start(bench.plan(tiny_guest(bench.state / "guest")), zygote)
    assert zygote.times == 8  # once more, and no oftener


async def test_a_lost_control_connection_is_made_anew(bench: Bench) -> None:
    vm = await bench.tiny()
    await vm._qmp.close()
    assert await vm.status() == "running"


# ---- another daemon
# ------------------------------------------------------------------------------------------------------


async def test_adopted(bench: Bench) -> None:
    vm = await bench.tiny()
    await vm.detach()
    found = await adopt(vm.plan.directory)
    assert found is not None
    bench.started[0] = found
    assert (found.pids, found.address, found.plan) == (vm.pids, vm.address, vm.plan)
    assert await found.status() == "running"
    os.kill(found.pids["qemu"], signal.SIGKILL)
    assert (await found.wait_dead()).cause == "qemu"


async def test_dead_ones_are_not_adopted(bench: Bench) -> None:
    assert await adopt(bench.state / "never") is None
    vm = await bench.tiny()
    await vm.end_now()
    assert await adopt(vm.plan.directory) is None


@pytest.mark.parametrize("victim", ["qemu", "vmx"])
async def test_half_a_vm_is_not_adopted_and_is_swept(bench: Bench, victim: str) -> None:
    vm = await bench.tiny()
    await bench.abandon(vm)
    killed = ProcessId.of(vm.pids[victim])
    killed.kill()
    await killed.wait_exit()
    assert await adopt(vm.plan.directory) is None
    await sweep(vm.plan.directory, bench.capabilities)


async def test_a_forged_record_is_not_believed(bench: Bench) -> None:
    vm = await bench.tiny()
    await bench.abandon(vm)
    me = ProcessId.of(os.getpid())
    files = vm.plan.files
    honest = files.read_processes()
    for forged in (replace(honest, qemu=me), replace(honest, vmx=me), Processes(boot_id())):
        files.write_processes(forged)
        assert await adopt(files.path) is None
    config = json.loads(files.config.read_text())
    files.config.write_text(json.dumps(config | {"directory": "/elsewhere"}))
    files.write_processes(honest)
    assert await adopt(files.path) is None
    await sweep(files.path, bench.capabilities)


CRASH = """
import asyncio, os, signal, sys
from pathlib import Path
from hypervisor.vmm import launch, records
from hypervisor.vmm.plan import LaunchPlan
from hypervisor.vmx.zygote import Zygote

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

where, what = sys.argv[1].split()
original = getattr(launch, what)
def patched(*a, **k):
    if where == "before":
        die()
    result = original(*a, **k)
    if asyncio.iscoroutine(result):
        async def then_die():
            await result
            die()
        return then_die()
    die()
setattr(launch, what, patched)

async def main():
    plan = records.loads(LaunchPlan, sys.stdin.read(), where="stdin")
    async with Zygote.start() as zygote:
        await launch.start(plan, zygote)
        die()
asyncio.run(main())
"""


@pytest.mark.parametrize(
    "point",
    [
        "before create_data_disk", "after create_data_disk", "after format_data_disk", "before _open_ends",
        "after _open_ends", "before vmx_config",
        "before _spawn_qemu", "after _spawn_qemu", "before _connect_qmp", "after _connect_qmp",
    ],
)  # fmt: skip
async def test_a_daemon_killed_while_it_starts_a_vm(bench: Bench, point: str) -> None:
    from hypervisor.vmm import records

    plan = bench.plan(tiny_guest(bench.state / "guest"))
    daemon = await asyncio.create_subprocess_exec(
        os.sys.executable,
        "-c",
        CRASH,
        point,
        stdin=asyncio.subprocess.PIPE,  # type: ignore[attr-defined]
    )
    await daemon.communicate(records.dumps(plan).encode())
    assert daemon.returncode == -signal.SIGKILL
    assert plan.directory.exists()
    await sweep(plan.directory, bench.capabilities)
    assert bench.leftovers() == []


# ---- Linux
# ---------------------------------------------------------------------------------------------------------------


async def agent_hello(address: VsockAddress) -> dict[str, Any]:
    """Asks until somebody answers; the VM manager sets the time limit."""
    while True:
        try:
            reader, writer = await connect(address, wire.AGENT_PORT, timeout=5)
            break
        except Unavailable:
            await asyncio.sleep(0.05)
    writer.write(wire.pack_json(wire.FrameType.REQUEST, {"v": wire.VERSION, "call": "hello", "args": {}}))
    _, length = wire.parse_header(await reader.readexactly(wire.HEADER.size))
    answer = wire.parse_json(await reader.readexactly(length))
    writer.close()
    return answer


async def start_linux(bench: Bench, image: Path) -> tuple[RunningVm, AgentVm]:
    """A guest whose agent is set up, with `image` as its one image disk."""
    disks = (ImageDisk(serial=IMAGE_DISK, path=image),)
    plan = bench.plan(
        GuestImage.load(),
        memory_bytes=256 * MIB,
        net="user",
        image_disks=disks,
        data_disk=DataDisk(size_bytes=64 * MIB),
    )
    vm = await bench.start(plan, agent_hello)
    agent = AgentVm(plan.files.vmx, None)  # type: ignore[arg-type]
    await asyncio.to_thread(agent.setup)
    return vm, agent


def fill(path: Path, *, leave: int) -> None:
    """Take all of the file system but `leave` bytes."""
    host = os.statvfs(path.parent)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, host.f_bavail * host.f_frsize - leave)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 200 MiB with a short path."""
    folder = Path(tempfile.mkdtemp(prefix="hvt-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m,mode=711", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


@pytest.mark.slow
async def test_linux_boots_to_the_agent(bench: Bench) -> None:
    answers = []

    async def ready(address: VsockAddress) -> None:
        answers.append(await agent_hello(address))

    guest = GuestImage.load()
    vm = await bench.start(bench.plan(guest, memory_bytes=256 * MIB, net="user"), ready)
    assert answers[0]["result"]["kernel"] == guest.release != os.uname().release
    assert list(vm.timings)[-1] == "ready"
    await vm.detach()
    found = await adopt(vm.plan.directory)
    assert found is not None
    bench.started[0] = found
    assert (await agent_hello(found.address))["result"]["boot_id"] == answers[0]["result"]["boot_id"]
    await found.reset()
    assert (await agent_hello(found.address))["result"]["boot_id"] != answers[0]["result"]["boot_id"]


@pytest.mark.slow
async def test_linux_panics(bench: Bench) -> None:
    guest = replace(GuestImage.load(), initrd=tiny_guest(bench.state / "guest").initrd)
    vm = await bench.start(bench.plan(guest, memory_bytes=256 * MIB))
    death = await vm.wait_dead()
    assert death.cause == "panic"
    assert "Kernel panic" in death.console_tail


def test_directory_names_are_stable() -> None:
    """`hv` and people look for these."""
    files = VmDirectory(Path("/vm"))
    assert [p.name for p in (files.console_log, files.qemu_log, files.disk)] == ["console.log", "qemu.log", "disk.img"]


@pytest.mark.slow
@pytest.mark.root
async def test_a_full_host_stops_the_guest_until_there_is_space(tmp_path: Path, small_disk: Path) -> None:
    image = await asyncio.to_thread(make_image, tmp_path / "busybox.erofs")
    async with make_bench(small_disk) as bench:
        vm, agent = await start_linux(bench, image)
        await asyncio.to_thread(agent.start, "c", "sleep", "1000")
        ballast = small_disk / "ballast"
        await asyncio.to_thread(fill, ballast, leave=4 * MIB)
        writing = asyncio.ensure_future(
            asyncio.to_thread(agent.run, "c", "dd", "if=/dev/zero", "of=/big", "bs=1M", "count=32", "conv=fsync")
        )
        stopped = vm.plan.block == "qemu"  # else the guest's writes wait, and come by themselves when there is space
        while not (await vm.status() == "io-error" if stopped else await vm.writes_wait()):
            assert not writing.done()
            await asyncio.sleep(0.05)
        ballast.unlink()
        if stopped:
            await vm.resume()
        assert (await writing).code == 0
        assert await vm.status() == "running"


@pytest.mark.slow
async def test_user_network_works_confined_and_the_agent_powers_off(bench: Bench, tmp_path: Path) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello from the host\n")
        writer.close()

    image = await asyncio.to_thread(make_image, tmp_path / "busybox.erofs")
    vm, agent = await start_linux(bench, image)
    await asyncio.to_thread(agent.start, "c", "sleep", "1000")
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        said = await asyncio.to_thread(agent.run, "c", "nc", "-w", "5", "10.0.2.2", str(port))
    assert said.out == b"hello from the host\n", said.err
    report = await vm.stop(lambda: asyncio.to_thread(agent.call, "shutdown", grace_s=1))
    assert (report.step, report.death.cause) == ("agent", "stopped")
