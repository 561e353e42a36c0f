"""The fault server's honest rival: guest RAM as a plain private mapping of the template's file, served by the kernel.

Both sides are the same guest out of the same template, the same QEMU with the same devices, started by the same code
below; they differ in where RAM comes from. Ours has a vmx that serves faults and prefetches the working set; the rival
has no vmx at all, for vhost-user back ends cannot share a private mapping, and so no vsock either. What both can be
asked is the serial line: the guest's kernel echoes what is typed there. That is the sign of life.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host import fresh_host
from measure import Figure
from residence import vm_parts_mib

from hypervisor.vmm import launch, records
from hypervisor.vmm.argv import Fd
from hypervisor.vmm.capabilities import RAM_LIBRARY, USERFAULTFD
from hypervisor.vmm.plan import LaunchPlan
from hypervisor.vmm.qmp import Qmp
from hypervisor.vmm.templates.frames import HostFrames
from hypervisor.vmm.templates.template import Manifest, Template
from hypervisor.vmx.config import RamConfig, RamFds, VmxConfig, VmxFds
from hypervisor.vmx.process import ProcessId
from hypervisor.vmx.zygote import Zygote

COUNT = 20
RUN_ON_S = 1.0
"""What a guest runs for after its sign of life; then it is stopped, so that many do not starve each other."""
KINDS = ("ours", "rival")
NAMES = {"ours": "fault server", "rival": "private mapping"}


@dataclass(frozen=True)
class Guest:
    """What clones are made from."""

    plan: LaunchPlan
    template: Template
    frames: HostFrames
    zygote: Zygote


@dataclass(frozen=True)
class Clone:
    """One that has shown its sign of life, and stands still."""

    pids: dict[str, int]
    seconds: float
    faults: int


def run(rounds: int) -> list[Figure]:
    """Starts in turn, then the memory of `COUNT` clones of each kind, one kind at a time."""
    with fresh_host("busybox") as host:
        for _ in range(2):  # makes the template, and records the working set
            host.run("run", "--rm", "busybox", "--", "true")
        host.run("run", "-d", "--name", "one", "busybox", "--", "sleep", "100000")
        (config,) = (host.state / "pods").glob("*/vm/config.json")
        plan = records.loads(LaunchPlan, config.read_bytes(), where=str(config))
        return asyncio.run(_measure(plan, rounds))


async def _measure(plan: LaunchPlan, rounds: int) -> list[Figure]:
    assert plan.clone is not None
    path = plan.clone.template
    manifest = records.loads(Manifest, (path / "template.json").read_bytes(), where="template.json")
    starts: dict[str, list[Clone]] = {kind: [] for kind in KINDS}
    parts: dict[str, list[Counter[str]]] = {}
    with HostFrames() as frames:
        async with Zygote.start() as zygote:
            guest = Guest(plan, Template(path, manifest), frames, zygote)
            for _ in range(rounds):
                for kind in KINDS:
                    async with contextlib.AsyncExitStack() as stack:
                        starts[kind].append(await stack.enter_async_context(_clone(guest, kind)))
            for kind in KINDS:
                async with contextlib.AsyncExitStack() as stack:
                    clones = [await stack.enter_async_context(_clone(guest, kind)) for _ in range(COUNT)]
                    parts[kind] = [vm_parts_mib(clone.pids) for clone in clones]
    return _figures(starts, parts)


def _figures(starts: dict[str, list[Clone]], parts: dict[str, list[Counter[str]]]) -> list[Figure]:
    what = "start of vmx and QEMU to the guest's echo on its serial line"
    times = {kind: tuple(clone.seconds for clone in clones) for kind, clones in starts.items()}
    rival = statistics.median(times["rival"])
    figures = [
        Figure(f"{NAMES['ours']}: {what}, p50", "s", times["ours"], bar=rival),
        Figure(f"{NAMES['rival']}: {what}, p50", "s", times["rival"]),
    ]
    for kind, clones in starts.items():
        faults = tuple(float(clone.faults) for clone in clones)
        figures.append(Figure(f"{NAMES[kind]}: faults that QEMU took in the kernel by then", "faults", faults))
    for kind, rows in parts.items():
        pss = tuple(float(row.total()) for row in rows)
        figures.append(Figure(f"{NAMES[kind]}: PSS, one of {COUNT} clones", "MiB", pss))
        for part in sorted(rows[0]):
            figures.append(Figure(f"{NAMES[kind]}: of it {part}", "MiB", tuple(row[part] for row in rows)))
    return figures


# ---- one clone -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _clone(guest: Guest, kind: str) -> AsyncIterator[Clone]:
    """A clone up to its sign of life and `RUN_ON_S` further; its processes are gone on the way out."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hvr-")))
        console, console_out = _pair(stack)
        given = {Fd.CONSOLE: console_out, **_disks(guest.plan, folder, stack)}
        listener = socket.socket(socket.AF_UNIX)
        stack.callback(listener.close)
        listener.bind(str(folder / "qmp"))
        listener.listen(1)
        given[Fd.QMP] = listener.fileno()
        began = time.perf_counter()
        pids: dict[str, int] = {}
        environment, argv = {}, _argv(guest, kind, stack, given)
        forking: asyncio.Future[ProcessId] | None = None
        if kind == "ours":
            forking, environment = _with_vmx(guest, folder, stack, given)
        qemu = _spawn(argv, environment, given)
        stack.callback(qemu.wait)
        stack.callback(qemu.kill)
        pids["qemu"] = qemu.pid
        if forking is not None:
            vmx = await forking
            stack.callback(vmx.kill)
            pids["vmx"] = vmx.pid
        qmp = await Qmp.connect(folder / "qmp", name=kind)
        try:
            seconds = await _first_sign(guest, qmp, console, began)
            faults = _faults_of(qemu.pid)
            await asyncio.sleep(RUN_ON_S)
            await qmp.execute("stop")
            yield Clone(pids, seconds, faults)
        finally:
            await qmp.close()


def _pair(stack: contextlib.ExitStack) -> tuple[socket.socket, int]:
    ours, theirs = socket.socketpair()
    stack.callback(ours.close)
    stack.callback(theirs.close)
    ours.setblocking(False)
    return ours, theirs.fileno()


def _open(path: Path, flags: int, stack: contextlib.ExitStack) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _disks(plan: LaunchPlan, folder: Path, stack: contextlib.ExitStack) -> dict[int, int]:
    found = {}
    for disk in plan.disks:
        if disk.path is not None and disk.read_only:
            found[disk.fd] = _open(disk.path, os.O_RDONLY, stack)
        elif disk.path is not None:
            own = folder / "disk"
            own.touch()
            os.truncate(own, disk.path.stat().st_size)
            found[disk.fd] = _open(own, os.O_RDWR, stack)
    return found


def _argv(guest: Guest, kind: str, stack: contextlib.ExitStack, given: dict[int, int]) -> list[str]:
    """The clone's own command line; its end of vsock is connected to nobody on both sides."""
    given[Fd.VSOCK] = _pair(stack)[1]
    argv = list(guest.plan.argv)
    if kind == "rival":
        at = next(i for i, word in enumerate(argv) if word.startswith("memory-backend-memfd,"))
        size = guest.template.manifest.ram_bytes
        argv[at] = f"memory-backend-file,id=ram,size={size},mem-path={guest.template.ram},share=off"
    return argv


def _with_vmx(
    guest: Guest, folder: Path, stack: contextlib.ExitStack, given: dict[int, int]
) -> tuple[asyncio.Future[ProcessId], dict[str, str]]:
    """As `hypervisor.vmm.launch` does it, less vsock and confinement."""
    plan = guest.frames.clone_plan(guest.template)
    library, library_out = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stack.callback(library.close)
    stack.callback(library_out.close)
    device = _open(Path(USERFAULTFD), os.O_RDWR, stack)
    fds = RamFds(
        qemu=library_out.fileno(), database=guest.frames.reader_fd, device=device,
        template=_open(guest.template.ram, os.O_RDONLY, stack),
        working_set=_open(Template.working_set_of(guest.template.path), os.O_RDONLY, stack),
    )  # fmt: skip
    given |= {Fd.RAM: library.fileno(), Fd.USERFAULTFD: device}
    ram = RamConfig(ram_bytes=plan.ram_bytes, mappings=plan.mappings, template=plan.ram_sha256)
    forking = asyncio.ensure_future(
        guest.zygote.fork(VmxConfig(directory=folder, guest_cid=None, ram=ram), VmxFds(ram=fds))
    )
    text = f"{plan.ram_bytes}:{Fd.RAM:d}:serve:{Fd.USERFAULTFD:d}"
    return forking, {"LD_PRELOAD": str(RAM_LIBRARY), "HV_RAM": text}


def _spawn(argv: list[str], environment: dict[str, str], given: dict[int, int]) -> subprocess.Popen[bytes]:
    """QEMU with descriptors at the numbers that its command line names; ours may lie there, so they move up first."""
    high = {number: os.dup2(fd, 300 + number, inheritable=False) for number, fd in given.items()}

    def place() -> None:
        for number, fd in high.items():
            os.dup2(fd, number)

    try:
        return subprocess.Popen(
            argv, env={"PATH": "/usr/bin:/bin"} | environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            preexec_fn=place, close_fds=False,  # all but those placed close by themselves
        )  # fmt: skip
    finally:
        for fd in high.values():
            os.close(fd)


async def _first_sign(guest: Guest, qmp: Qmp, console: socket.socket, began: float) -> float:
    """Loads the device state, lets the guest go on and types a letter; seconds until it is echoed."""
    loop = asyncio.get_running_loop()
    await qmp.execute("migrate-set-capabilities", launch.MIGRATION)
    with guest.template.state.open("rb") as state:
        await qmp.give_fd("state", state.fileno())
    await qmp.execute("migrate-incoming", {"uri": "fd:state"})
    while (status := await qmp.execute("query-migrate")).get("status") != "completed":
        assert status.get("status") != "failed", json.dumps(status)
        await asyncio.sleep(0.002)
    await qmp.execute("cont")
    await loop.sock_sendall(console, b"x")
    async with asyncio.timeout(10):
        assert await loop.sock_recv(console, 64)
    return time.perf_counter() - began


def _faults_of(pid: int) -> int:
    fields: list[Any] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[10 - 3])
