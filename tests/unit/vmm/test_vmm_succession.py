"""What a successor of vmx is made from: found in a live process, by descriptor and mapping."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hypervisor.errors import Conflict, NotFound
from hypervisor.vmm.death import explain
from hypervisor.vmm.succession import Budget, Heir, borrow, ram_mapping, reconnect
from hypervisor.vmx.process import ProcessId

RAM = 64 * 4096


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[bytes]]:
    """A process that maps guest RAM as QEMU does, and has a pipe."""
    code = (
        "import mmap, os, sys; fd = os.memfd_create('memory-backend-memfd'); "
        f"os.ftruncate(fd, {RAM}); m = mmap.mmap(fd, {RAM}); m[0] = 7; print('there', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_where_ram_is_mapped(holder: subprocess.Popen[bytes]) -> None:
    address, length, offset = ram_mapping(holder.pid, RAM)
    assert (length, offset) == (RAM, 0)
    assert address % mmap.PAGESIZE == 0
    with pytest.raises(NotFound, match="in one piece"):
        ram_mapping(holder.pid, 2 * RAM)
    with pytest.raises(NotFound):
        ram_mapping(os.getpid(), RAM)


@pytest.mark.root
def test_a_descriptor_is_borrowed(holder: subprocess.Popen[bytes]) -> None:
    assert holder.stdin is not None
    fd = borrow(ProcessId.of(holder.pid), 0)
    try:
        assert os.fstat(fd).st_ino == os.fstat(holder.stdin.fileno()).st_ino
    finally:
        os.close(fd)
    with pytest.raises(Exception, match="borrow descriptor 999"):
        borrow(ProcessId.of(holder.pid), 999)
    with pytest.raises(NotFound):
        borrow(ProcessId(holder.pid, 1), 0)  # another process by now


def test_a_budget_is_spent_and_comes_back() -> None:
    budget = Budget(3, 10.0)
    assert [budget.spend(t) for t in (0.0, 1.0, 2.0, 3.0)] == [True, True, True, False]
    assert budget.spend(30.0)


def test_why_there_is_no_successor_is_said() -> None:
    said = explain(
        wanted=False, vmx_died_first=True, vmx_status=9, qemu_status=9, events=(), qemu_log="",
        not_replaced="it could not be replaced: no template",
    )  # fmt: skip
    assert said[0] == "vmx"
    assert "was killed (signal 9); it could not be replaced: no template" in said[1]


class Qemu:
    """QMP as far as `reconnect` needs it: a guest that lets go of its device at the second time of asking."""

    def __init__(self) -> None:
        self.devices = {"vsock0", "net0"}
        self.chardevs = {"qmp", "console", "vsock", "vsock-0"}
        self.fds: set[str] = set()
        self.asked = 0

    async def give_fd(self, name: str, fd: int) -> None:
        os.fstat(fd)
        self.fds.add(name)

    async def execute(self, command: str, arguments: object = None) -> object:
        given = dict(arguments) if isinstance(arguments, dict) else {}
        if command == "device_del":
            self.asked += 1
            if self.asked == 2:
                self.devices.discard(given["id"])
            raise Conflict("already in the process of unplug")
        if command == "qom-list":
            return [{"name": name} for name in self.devices]
        if command == "query-chardev":
            return [{"label": name} for name in self.chardevs]
        return self._change(command, given)

    def _change(self, command: str, given: dict[str, object]) -> None:
        if command == "chardev-remove":
            if given["id"] == "vsock-0":
                raise Conflict("busy")
            self.chardevs.discard(str(given["id"]))
        elif command == "chardev-add":
            assert given["id"] not in self.chardevs
            self.chardevs.add(str(given["id"]))
        elif command == "device_add":
            assert given["chardev"] in self.chardevs
            self.devices.add(str(given["id"]))


async def test_a_device_is_plugged_in_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypervisor.vmm.succession._ASK_AGAIN_S", 0.01)
    qemu = Qemu()
    read, write = os.pipe()
    heir = Heir(vmx=None, console=read, vsock=write)  # type: ignore[arg-type]
    await reconnect(qemu, heir)
    heir.close_ends()
    assert qemu.asked == 2
    assert qemu.devices == {"vsock0", "net0"}
    assert qemu.chardevs == {"qmp", "console", "vsock-0", "vsock-1"}
    assert qemu.fds == {"console-end", "vsock-end"}
