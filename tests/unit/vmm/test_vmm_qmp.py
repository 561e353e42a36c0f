"""The QMP connection against a real QEMU that has a machine of nothing (``-machine none``: it runs in 50 ms)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hypervisor.errors import Conflict, ProtocolError, Timeout, Unavailable
from hypervisor.vmm.capabilities import QEMU_NAME, find_program
from hypervisor.vmm.directory import VmDirectory
from hypervisor.vmm.qmp import EVENT_BACKLOG, Qmp, QmpEvent


class Machine:
    def __init__(self, process: subprocess.Popen[bytes], socket: Path) -> None:
        self.process = process
        self.socket = socket


@pytest.fixture
def machine(short_path: Path) -> Iterator[Machine]:
    socket = short_path / "qmp.sock"
    listener = VmDirectory(short_path).listen(socket)
    qemu = find_program(QEMU_NAME, package="qemu-system-x86")
    argv = [
        qemu, "-machine", "none", "-nodefaults", "-display", "none", "-chardev",
        f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off", "-mon", "chardev=qmp,mode=control",
    ]  # fmt: skip
    process = subprocess.Popen(argv, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL)
    listener.close()
    yield Machine(process, socket)
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()


@pytest.fixture
async def qmp(machine: Machine) -> AsyncIterator[Qmp]:
    connection = await Qmp.connect(machine.socket, name="test")
    yield connection
    await connection.close()


async def test_status_and_commands(qmp: Qmp) -> None:
    assert await qmp.status() == "running"
    await qmp.execute("stop")
    assert await qmp.status() == "paused"
    commands = await qmp.commands()
    assert {"set-action", "system_reset"} <= commands
    assert "no-such-command" not in commands


async def test_a_refusal_is_qemus_own_words(qmp: Qmp) -> None:
    with pytest.raises(Conflict, match="refused device_del: Device 'x' not found"):
        await qmp.execute("device_del", {"id": "x"})
    with pytest.raises(Conflict, match="not been found"):
        await qmp.execute("no-such-command")


async def test_events_reach_every_subscriber(qmp: Qmp) -> None:
    async def first_two() -> list[str]:
        names = []
        async for event in qmp.events():
            names.append(event.name)
            if len(names) == 2:
                break
        return names

    readers = [asyncio.create_task(first_two()) for _ in range(2)]
    await asyncio.sleep(0)
    await qmp.execute("stop")
    await qmp.execute("cont")
    assert await asyncio.gather(*readers) == [["STOP", "RESUME"]] * 2
    assert [e.name for e in qmp.recent] == ["STOP", "RESUME"]
    assert qmp.recent[0].time_ns > 1_600_000_000 * 10**9


async def test_a_slow_subscriber_loses_the_oldest_and_nothing_grows(qmp: Qmp) -> None:
    events = qmp.events()
    first = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    for _ in range(EVENT_BACKLOG):
        await qmp.execute("stop")
        await qmp.execute("cont")
    await first
    await qmp.execute("quit")
    await qmp.wait_closed()
    rest = [event.name async for event in events]
    assert len(rest) < EVENT_BACKLOG
    assert rest[-1] == "SHUTDOWN"
    assert not qmp._client.events.history


async def test_quit_ends_the_connection_without_noise(
    qmp: Qmp, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    await qmp.execute("quit")
    await qmp.wait_closed()
    assert machine.process.wait(10) == 0
    assert not qmp.connected
    assert qmp.recent[-1] == QmpEvent("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}, qmp.recent[-1].time_ns)
    assert [e async for e in qmp.events()] == []
    with pytest.raises(Unavailable, match="lost"):
        await qmp.execute("query-status")
    assert caplog.records == []


async def test_killed_under_a_command(qmp: Qmp, machine: Machine) -> None:
    os.kill(machine.process.pid, signal.SIGSTOP)
    pending = asyncio.create_task(qmp.execute("query-status"))
    await asyncio.sleep(0.05)
    machine.process.kill()
    with pytest.raises(Unavailable, match="not answered"):
        await pending


async def test_a_stopped_qemu_times_out_and_goes_on(qmp: Qmp, machine: Machine) -> None:
    os.kill(machine.process.pid, signal.SIGSTOP)
    with pytest.raises(Timeout, match=r"query-status within 0\.1 s"):
        await qmp.execute("query-status", timeout=0.1)
    os.kill(machine.process.pid, signal.SIGCONT)
    assert await qmp.status() == "running"


async def test_reconnect_after_close(machine: Machine) -> None:
    """What a restarted daemon does."""
    for _ in range(3):
        connection = await Qmp.connect(machine.socket, name="test")
        assert await connection.status() == "running"
        await connection.close()
        await connection.close()


async def test_nobody_there(short_path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file"):
        await Qmp.connect(short_path / "none.sock", name="test")


async def _serve(path: Path, greeting: bytes) -> asyncio.Server:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    return await asyncio.start_unix_server(answer, path)


@pytest.mark.parametrize(
    ("greeting", "error"), [(b"", Timeout), (b"hello\n", Unavailable), (b'{"QMP":3}\n', Unavailable)]
)
async def test_somebody_else_there(short_path: Path, greeting: bytes, error: type[Exception]) -> None:
    async with await _serve(short_path / "s", greeting):
        with pytest.raises(error):
            await Qmp.connect(short_path / "s", name="test", timeout=0.3)


async def test_an_answer_that_is_no_qmp(short_path: Path) -> None:
    good = b'{"QMP":{"version":{"qemu":{"micro":0,"minor":2,"major":7},"package":""},"capabilities":[]}}\n'
    async with await _serve(short_path / "s", good + b'{"return":{}}\n{"what":1,"id":"__qmp#00000"}\n'):
        connection = await Qmp.connect(short_path / "s", name="test")
        with pytest.raises((ProtocolError, Unavailable)):
            await connection.execute("query-status", timeout=1)
        await connection.close()
