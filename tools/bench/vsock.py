"""The vsock path by itself: a raw echo guest under TCG behind a vmx, no agent. Run alone, ``vsock.py`` prints JSON."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/integration"))

from measure import Figure
from vsock_guest import (
    BLOCK_BYTES,
    ECHO,
    GIVE_BLOCKS,
    TAKE_BLOCKS,
    UID,
    VsockGuest,
    make_block,
    number_block,
    vsock_guest,
)

from hypervisor.vmx.config import VmxConfig
from hypervisor.vmx.zygote import Zygote
from hypervisor.vsock.connect import connect, connect_blocking

ASKS, BLOCKS, CONNECTIONS, FORKS, IDLE_SECONDS, PATIENCE = 500, 1024, 1000, 20, 5.0, 20.0


def run(rounds: int) -> list[Figure]:
    """Each case `rounds` times in one guest; the asks are `ASKS` times as many."""
    return asyncio.run(_run(rounds))


async def _run(rounds: int) -> list[Figure]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    async with vsock_guest() as guest:
        asks = await asyncio.to_thread(_asks, guest)
        into = [await asyncio.to_thread(_to_guest, guest) for _ in range(rounds)]
        out = [await asyncio.to_thread(_from_guest, guest) for _ in range(rounds)]
        many = [await _many(guest) for _ in range(rounds)]
        idle = [await _idle(guest)]
    return [
        Figure("connect, ask, answer over vsock", "ms", tuple(asks), bar=1.5),
        Figure("1 GiB to the guest, every byte checked", "MB/s", tuple(into)),
        Figure("1 GiB from the guest, every byte checked", "MB/s", tuple(out)),
        Figure(f"{CONNECTIONS} connections opened and each echoing", "s", tuple(many)),
        Figure("vmx's CPU while 100 connections idle", "%", tuple(idle), bar=0.2),
        Figure("a vmx forked, confined and serving", "ms", tuple(await _forks())),
    ]


def _asks(guest: VsockGuest) -> list[float]:
    samples = []
    for _ in range(ASKS):
        start = time.perf_counter()
        with connect_blocking(guest.address, ECHO, PATIENCE) as sock:
            sock.sendall(b"?")
            assert sock.recv(1) == b"?"
            samples.append((time.perf_counter() - start) * 1000)
    return samples


def _to_guest(guest: VsockGuest) -> float:
    block, start = make_block(), time.perf_counter()
    with connect_blocking(guest.address, TAKE_BLOCKS, PATIENCE) as sock:
        for number in range(BLOCKS):
            sock.sendall(number_block(block, number))
        sock.shutdown(socket.SHUT_WR)
        assert sock.makefile().readline() == f"{BLOCKS * BLOCK_BYTES} 0\n"
    return BLOCKS * BLOCK_BYTES / 1e6 / (time.perf_counter() - start)


def _from_guest(guest: VsockGuest) -> float:
    block, start = make_block(), time.perf_counter()
    with connect_blocking(guest.address, GIVE_BLOCKS, PATIENCE) as sock:
        sock.sendall(f"{BLOCKS}\n".encode())
        with sock.makefile("rb", buffering=BLOCK_BYTES) as stream:
            for number in range(BLOCKS):
                assert stream.read(BLOCK_BYTES) == number_block(block, number)
    return BLOCKS * BLOCK_BYTES / 1e6 / (time.perf_counter() - start)


async def _many(guest: VsockGuest) -> float:
    start = time.perf_counter()
    streams = [await connect(guest.address, ECHO, timeout=PATIENCE) for _ in range(CONNECTIONS)]
    for number, (_, writer) in enumerate(streams):
        writer.write(f"{number}\n".encode())
    for number, (reader, _) in enumerate(streams):
        assert await reader.readline() == f"{number}\n".encode()
    seconds = time.perf_counter() - start
    for _, writer in streams:
        writer.close()
    return seconds


async def _idle(guest: VsockGuest) -> float:
    streams = [await connect(guest.address, ECHO, timeout=PATIENCE) for _ in range(100)]
    before = guest.vmx_cpu_seconds()
    await asyncio.sleep(IDLE_SECONDS)
    used = guest.vmx_cpu_seconds() - before
    for _, writer in streams:
        writer.close()
    return 100 * used / IDLE_SECONDS


async def _forks() -> list[float]:
    samples = []
    with tempfile.TemporaryDirectory(prefix="hvt-") as folder:
        Path(folder).chmod(0o711)  # noqa: ASYNC240 - a bench has one task
        async with Zygote.start() as zygote:
            for number in range(FORKS + 1):
                config = _config(Path(folder) / str(number))
                start = time.perf_counter()
                vmx = await zygote.fork(config)
                samples.append((time.perf_counter() - start) * 1000)
                vmx.kill()
                await vmx.wait_exit()
    return samples[1:]  # the first one waits for the zygote itself


def _config(directory: Path) -> VmxConfig:
    directory.mkdir(mode=0o700)
    if os.geteuid():
        return VmxConfig(directory=directory, guest_cid=3)
    os.chown(directory, UID, UID)
    return VmxConfig(directory=directory, guest_cid=3, uid=UID, gid=UID)


if __name__ == "__main__":
    figures = run(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    print(json.dumps([figure.to_json() for figure in figures], indent=1))
