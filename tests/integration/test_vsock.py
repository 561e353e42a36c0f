"""The vsock path with a real guest under QEMU: speed, volume, many connections, both directions, pause, quiet."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import statistics
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from vsock_guest import (
    BLOCK_BYTES,
    DIAL,
    ECHO,
    GIVE_BLOCKS,
    NEVER_READ,
    TAKE_BLOCKS,
    VsockGuest,
    make_block,
    number_block,
    vsock_guest,
)

from hypervisor.errors import Unavailable
from hypervisor.vmx import control
from hypervisor.vsock.connect import connect, connect_blocking, listen

pytestmark = [pytest.mark.qemu, pytest.mark.asyncio(loop_scope="module")]

BLOCKS = 1024  # 1 GiB each way
CONNECTIONS = 1000
P50_BAR_MS = 1.5
PATIENCE = 10.0
# The pace is checked with room for a machine that runs other tests too; the figure itself is tools/bench/vsock.py's.
SLACK = 4


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest() -> AsyncIterator[VsockGuest]:
    async with vsock_guest() as running:
        yield running


async def stats(guest: VsockGuest) -> dict[str, int]:
    answer = await control.call(guest.folder / "vmx.sock", "stats")
    assert answer["fault"] == ""
    return dict(answer["vsock"])


async def wait_no_connections(guest: VsockGuest) -> None:
    async with asyncio.timeout(PATIENCE):
        while (await stats(guest))["connections"]:  # noqa: ASYNC110 - of another process: nothing to wait on
            await asyncio.sleep(0.01)


def ask(guest: VsockGuest) -> float:
    start = time.perf_counter()
    with connect_blocking(guest.address, ECHO, PATIENCE) as sock:
        sock.sendall(b"?")
        assert sock.recv(1) == b"?"
        return (time.perf_counter() - start) * 1000


async def test_connect_ask_answer_is_quick(guest: VsockGuest) -> None:
    samples = [await asyncio.to_thread(ask, guest) for _ in range(300)]
    assert statistics.median(samples) <= P50_BAR_MS * SLACK


async def test_nobody_listens(guest: VsockGuest) -> None:
    with pytest.raises(Unavailable, match="port 12345"):
        await connect(guest.address, 12345, timeout=PATIENCE)


def send_blocks(guest: VsockGuest) -> str:
    block = make_block()
    with connect_blocking(guest.address, TAKE_BLOCKS, PATIENCE) as sock:
        for number in range(BLOCKS):
            sock.sendall(number_block(block, number))
        sock.shutdown(socket.SHUT_WR)  # half-close: the answer comes back afterwards
        return sock.makefile().readline()


@pytest.mark.slow
async def test_a_gibibyte_to_the_guest(guest: VsockGuest) -> None:
    assert await asyncio.to_thread(send_blocks, guest) == f"{BLOCKS * BLOCK_BYTES} 0\n"


def take_blocks(guest: VsockGuest) -> int:
    block, number = make_block(), 0
    with connect_blocking(guest.address, GIVE_BLOCKS, PATIENCE) as sock:
        sock.sendall(f"{BLOCKS}\n".encode())
        with sock.makefile("rb", buffering=BLOCK_BYTES) as stream:
            while data := stream.read(BLOCK_BYTES):
                assert data == number_block(block, number)
                number += 1
    return number


@pytest.mark.slow
async def test_a_gibibyte_from_the_guest(guest: VsockGuest) -> None:
    assert await asyncio.to_thread(take_blocks, guest) == BLOCKS


async def test_a_thousand_connections_at_once(guest: VsockGuest) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    streams = [await connect(guest.address, ECHO, timeout=PATIENCE) for _ in range(CONNECTIONS)]
    assert (await stats(guest))["connections"] == CONNECTIONS
    for number, (_, writer) in enumerate(streams):
        writer.write(f"{number}\n".encode())
    for number, (reader, _) in enumerate(streams):
        assert await asyncio.wait_for(reader.readline(), PATIENCE) == f"{number}\n".encode()
    for _, writer in streams:
        writer.close()
    await wait_no_connections(guest)


async def test_the_guest_connects_to_the_host(guest: VsockGuest) -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"to the guest and back")
        heard.put_nowait(await reader.readexactly(21))
        writer.close()

    async with listen(guest.address, 6000, on_connection):
        reader, writer = await connect(guest.address, DIAL, timeout=PATIENCE)
        writer.write(b"6000\n")
        assert await reader.readline() == b"connected\n"
        assert await asyncio.wait_for(heard.get(), PATIENCE) == b"to the guest and back"
        assert await reader.read() == b""
        writer.close()


async def test_the_guest_connects_where_nobody_listens(guest: VsockGuest) -> None:
    reader, writer = await connect(guest.address, DIAL, timeout=PATIENCE)
    writer.write(b"6001\n")
    assert await reader.readline() == b"failed 104\n"  # ECONNRESET
    writer.close()


async def test_a_guest_that_does_not_read_stops_the_writer(guest: VsockGuest) -> None:
    with connect_blocking(guest.address, NEVER_READ, PATIENCE) as sock:
        sock.setblocking(False)
        sent = 0
        with pytest.raises(BlockingIOError):
            for _ in range(64):
                sent += sock.send(bytes(1 << 20))
                await asyncio.sleep(0.05)  # time for the device to take more, if it wrongly did
        assert sent < 4 << 20
        assert await asyncio.to_thread(ask, guest) > 0  # others go on
    # What was written still waits for the guest, which never reads: this one connection stays.


async def qmp(guest: VsockGuest, *commands: str) -> None:
    reader, writer = await asyncio.open_unix_connection(guest.folder / "qmp.sock")
    await reader.readline()
    for command in ("qmp_capabilities", *commands):
        writer.write(json.dumps({"execute": command}).encode())
        while "return" not in json.loads(await asyncio.wait_for(reader.readline(), PATIENCE)):
            pass
    writer.close()


async def test_connections_live_through_a_pause(guest: VsockGuest) -> None:
    reader, writer = await connect(guest.address, ECHO, timeout=PATIENCE)
    await qmp(guest, "stop")
    writer.write(b"while paused\n")
    await qmp(guest, "cont")
    assert await asyncio.wait_for(reader.readline(), PATIENCE) == b"while paused\n"
    assert (await stats(guest))["guest_resets"] == 0
    writer.close()


async def test_a_reset_ends_connections_and_the_new_guest_is_served(guest: VsockGuest) -> None:
    reader, _ = await connect(guest.address, ECHO, timeout=PATIENCE)
    await qmp(guest, "system_reset")
    assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
    await guest.wait_up()
    assert await asyncio.to_thread(ask, guest) > 0
    assert (await stats(guest))["guest_resets"] == 1


async def test_idle_costs_nothing(guest: VsockGuest) -> None:
    streams = [await connect(guest.address, ECHO, timeout=PATIENCE) for _ in range(100)]
    wakeups, cpu = (await stats(guest))["wakeups"], guest.vmx_cpu_seconds()
    await asyncio.sleep(2)  # the measurement itself
    assert (await stats(guest))["wakeups"] == wakeups
    assert guest.vmx_cpu_seconds() - cpu <= 0.02
    for _, writer in streams:
        writer.close()


async def test_vmx_ends_with_qemu() -> None:
    """What `vsock_guest` does at its end is the test: QEMU is killed, vmx goes by itself and leaves only its log."""
    async with vsock_guest() as running:
        reader, _ = await connect(running.address, ECHO, timeout=PATIENCE)
        running.qemu.kill()
        assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
        await asyncio.wait_for(running.vmx.wait_exit(), PATIENCE)
        assert {path.name for path in running.folder.iterdir()} <= {"vmx.log", "qmp.sock"}
        assert "QEMU has hung up" in (running.folder / "vmx.log").read_text()
