"""Real zygotes and real vmx: what they keep, what they do without, how they end."""

# ruff: noqa: ASYNC240 - /proc does not block
from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hypervisor.errors import InvalidInput, ProtocolError, Unavailable, VmFailed
from hypervisor.vmx import control
from hypervisor.vmx.config import VmxConfig, VmxFds
from hypervisor.vmx.process import ProcessId
from hypervisor.vmx.zygote import Zygote

UID = 64200
PATIENCE = 10.0


def config_in(folder: Path, name: str = "vm", **values: object) -> VmxConfig:
    directory = folder / name
    directory.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(directory, UID, UID)
        values = {"uid": UID, "gid": UID} | values
    return VmxConfig(directory=directory, guest_cid=7, **values)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def ended(process: ProcessId) -> AsyncIterator[ProcessId]:
    try:
        yield process
    finally:
        process.kill()
        await asyncio.wait_for(process.wait_exit(), PATIENCE)


def status(process: ProcessId) -> dict[str, str]:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def test_serves_and_ends_when_told(short_path: Path) -> None:
    config = config_in(short_path)
    async with Zygote.start() as zygote, ended(await zygote.fork(config)) as vmx:
        assert (await control.call(config.control_path, "stats"))["vsock"]["connections"] == 0
        assert await control.call(config.control_path, "ping") == {}
        with pytest.raises(ProtocolError, match="ping, stats, stop"):
            await control.call(config.control_path, "nonsense")
        await control.call(config.control_path, "stop")
        await asyncio.wait_for(vmx.wait_exit(), PATIENCE)
    assert {path.name for path in config.directory.iterdir()} == {"vmx.log"}
    assert "told to stop" in (config.directory / "vmx.log").read_text()
    with pytest.raises(Unavailable):
        await control.call(config.control_path, "ping")


@pytest.mark.root
async def test_confined(short_path: Path) -> None:
    async with Zygote.start() as zygote, ended(await zygote.fork(config_in(short_path))) as vmx:
        seen = status(vmx)
        assert seen["Name"] == "vmx"
        assert seen["Uid"].split() == [str(UID)] * 4
        assert seen["Gid"].split() == [str(UID)] * 4
        assert seen["Groups"] == ""
        assert {int(seen[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert seen["NoNewPrivs"] == "1"
        assert seen["Seccomp"] == "2"
        assert (Path(f"/proc/{vmx.pid}/root")).readlink() == short_path / "vm"
        assert os.getsid(vmx.pid) == vmx.pid
        assert Path(f"/proc/{vmx.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()


def sockets_of(pid: int) -> list[str]:
    return [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir() if "socket:" in str(path.readlink())]


async def test_keeps_no_descriptor_of_others(short_path: Path) -> None:
    """Its own sockets, pipe, epoll and log only: neither the zygote's socket nor anything that hostd had open."""
    secret_read, secret_write = os.pipe()
    os.set_inheritable(secret_read, True)
    try:
        async with Zygote.start() as zygote, ended(await zygote.fork(config_in(short_path))) as vmx:
            # It tells us that it serves, and closes the socket that it told us through just after.
            async with asyncio.timeout(5):
                while len(sockets_of(vmx.pid)) > 3:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            descriptors = [path.readlink() for path in Path(f"/proc/{vmx.pid}/fd").iterdir()]
            assert Path(f"/proc/self/fd/{secret_read}").readlink() not in descriptors
            assert len(sockets_of(vmx.pid)) == 3  # vhost-user, host side, control
            assert len(descriptors) <= 12
    finally:
        os.close(secret_read)
        os.close(secret_write)


async def test_zygote_keeps_no_descriptor_of_its_children(short_path: Path) -> None:
    async with Zygote.start() as zygote:
        first = await zygote.fork(config_in(short_path, "0"))
        before = len(list(Path(f"/proc/{zygote.pid}/fd").iterdir()))
        others = [await zygote.fork(config_in(short_path, str(n))) for n in range(1, 6)]
        assert len(list(Path(f"/proc/{zygote.pid}/fd").iterdir())) == before
        for vmx in (first, *others):
            vmx.kill()
            await asyncio.wait_for(vmx.wait_exit(), PATIENCE)
            assert not Path(f"/proc/{vmx.pid}").exists()  # reaped


async def test_many_at_once(short_path: Path) -> None:
    async with Zygote.start() as zygote:
        started = await asyncio.gather(*(zygote.fork(config_in(short_path, str(n))) for n in range(10)))
        assert len({vmx.pid for vmx in started}) == 10
        for vmx in started:
            vmx.kill()
        await asyncio.gather(*(vmx.wait_exit() for vmx in started))


async def test_vmx_survives_the_zygote_and_a_new_one_takes_over(short_path: Path) -> None:
    async with Zygote.start() as zygote, ended(await zygote.fork(config_in(short_path))) as vmx:
        os.kill(zygote.pid, signal.SIGKILL)
        assert await asyncio.wait_for(zygote.wait_exit(), PATIENCE) == -signal.SIGKILL
        assert not zygote.alive
        with pytest.raises(Unavailable, match="zygote is gone"):
            await zygote.fork(config_in(short_path, "second"))
        assert vmx.alive()
        assert await control.call(short_path / "vm/vmx.sock", "ping") == {}
        async with Zygote.start() as successor, ended(await successor.fork(config_in(short_path, "third"))):
            pass


async def test_ends_when_its_front_end_goes(short_path: Path) -> None:
    config = config_in(short_path)
    ours, theirs = socket.socketpair()
    async with Zygote.start() as zygote:
        with ours, theirs:
            vmx = await zygote.fork(config, VmxFds(frontend=theirs.fileno()))
            theirs.close()
            ours.sendall(struct.pack("=III", 17, 1, 0))
            assert await asyncio.get_running_loop().run_in_executor(None, ours.recv, 100)
        await asyncio.wait_for(vmx.wait_exit(), PATIENCE)
    assert "QEMU has hung up" in (config.directory / "vmx.log").read_text()


async def test_names_why_it_threw_the_front_end_out(short_path: Path) -> None:
    config = config_in(short_path)
    ours, theirs = socket.socketpair()
    async with Zygote.start() as zygote:
        with ours, theirs:
            vmx = await zygote.fork(config, VmxFds(frontend=theirs.fileno()))
            ours.sendall(struct.pack("=III", 63, 1, 0))
            await asyncio.wait_for(vmx.wait_exit(), PATIENCE)
    assert "request that is not supported" in (config.directory / "vmx.log").read_text()


async def test_streams_are_logged_and_their_end_is_vmx_end(short_path: Path) -> None:
    config = config_in(short_path, stream_limits=(4096,))
    read, write = os.pipe()
    log = os.open(short_path / "console.log", os.O_RDWR | os.O_CREAT, 0o600)
    async with Zygote.start() as zygote:
        vmx = await zygote.fork(config, VmxFds(streams=((read, log),)))
        os.close(read)
        os.close(log)
        os.write(write, b"last words\n")
        os.close(write)
        await asyncio.wait_for(vmx.wait_exit(), PATIENCE)
    assert (short_path / "console.log").read_bytes() == b"last words\n"


async def test_without_a_vsock_device(short_path: Path) -> None:
    """The kernel's vhost-vsock serves the guest: vmx only keeps the logs."""
    config = config_in(short_path)
    config = VmxConfig(
        directory=config.directory, guest_cid=None, uid=config.uid, gid=config.gid, stream_limits=(4096,)
    )
    read, write = os.pipe()
    log = os.open(short_path / "console.log", os.O_RDWR | os.O_CREAT, 0o600)
    async with Zygote.start() as zygote:
        vmx = await zygote.fork(config, VmxFds(streams=((read, log),)))
        assert (await control.call(config.control_path, "stats"))["vsock"] is None
        for fd in (read, log, write):
            os.close(fd)
        await asyncio.wait_for(vmx.wait_exit(), PATIENCE)


async def test_bad_config_changes_nothing(short_path: Path) -> None:
    async with Zygote.start() as zygote:
        with pytest.raises(InvalidInput):
            await zygote.fork(VmxConfig(directory=short_path / "nowhere", guest_cid=7))


async def test_what_it_cannot_do_is_said(short_path: Path) -> None:
    config = config_in(short_path, cgroups=(short_path / "no-cgroup",))
    async with Zygote.start() as zygote:
        with pytest.raises(VmFailed, match="no-cgroup"):
            await zygote.fork(config)
        async with ended(await zygote.fork(config_in(short_path, "good"))):
            pass  # the zygote is none the worse for it


async def test_control_socket_takes_nonsense(short_path: Path) -> None:
    config = config_in(short_path)
    async with Zygote.start() as zygote, ended(await zygote.fork(config)):
        for line in (b"\n", b"[]\n", b'"x"\n', b'{"call":1}\n', b"\xff\n", b"[" * 5000 + b"\n"):
            reader, writer = await asyncio.open_unix_connection(config.control_path)
            writer.write(line)
            assert b'"ok": false' in await reader.readline()
            writer.close()
        reader, writer = await asyncio.open_unix_connection(config.control_path)
        writer.write(b"x" * (1 << 20))  # no end of line in sight
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        crowd = [await asyncio.open_unix_connection(config.control_path) for _ in range(20)]
        assert await crowd[0][0].read() == b""  # too many: the one silent for longest made room
        for _, writer in crowd:
            writer.close()
        assert await control.call(config.control_path, "ping") == {}


async def test_log_is_bounded(short_path: Path) -> None:
    from hypervisor.vmx.device import Log

    path = short_path / "log"
    log = Log(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), 1000)
    for number in range(100):
        log.write(f"line {number}")
    assert path.stat().st_size <= 1000
    assert re.search(r"line 99\n$", path.read_text())
