"""connect and listen against a small speaker of the CONNECT protocol: every answer it may give, cut anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hypervisor.errors import Conflict, InvalidInput, ProtocolError, Timeout, Unavailable
from hypervisor.vsock.address import KernelVsock, UnixVsock
from hypervisor.vsock.connect import connect, connect_blocking, listen

PATIENCE = 5.0


@contextlib.asynccontextmanager
async def device(path: Path, *answers: bytes, hold: bool = False) -> AsyncIterator[UnixVsock]:
    """Answers the first line with the pieces given, then echoes; with `hold` it answers nothing."""
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"CONNECT 1024\n"
        if hold:
            await done.wait()
        for piece in answers:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if answers and answers[-1].endswith(b"\n"):
            while data := await reader.read(100):
                writer.write(data)
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield UnixVsock(path)
    finally:
        done.set()
        server.close()


@pytest.mark.parametrize("answers", [[b"OK 5\n"], [b"O", b"K ", b"1073741824", b"\n"], [b"OK 5\nfirst"]])
async def test_a_guest_that_accepts(short_path: Path, answers: list[bytes]) -> None:
    async with device(short_path / "v", *answers) as address:
        reader, writer = await connect(address, 1024, timeout=PATIENCE)
        if answers[-1].endswith(b"first"):
            assert await reader.read() == b"first"  # not a byte of the stream is lost with the line
        else:
            writer.write(b"ping")
            assert await reader.readexactly(4) == b"ping"
        writer.close()
        sock = await asyncio.to_thread(connect_blocking, address, 1024, PATIENCE)
        with sock:
            assert sock.gettimeout() is None


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize(
    ("answers", "error"),
    [([], Unavailable), ([b"NO\n"], ProtocolError), ([b"OK x\n"], ProtocolError), ([b"x" * 100], ProtocolError)],
)
async def test_other_answers(short_path: Path, answers: list[bytes], error: type[Exception], blocking: bool) -> None:
    async with device(short_path / "v", *answers) as address:
        with pytest.raises(error):
            if blocking:
                await asyncio.to_thread(connect_blocking, address, 1024, PATIENCE)
            else:
                await connect(address, 1024, timeout=PATIENCE)


async def test_no_answer_is_a_timeout(short_path: Path) -> None:
    async with device(short_path / "v", hold=True) as address:
        with pytest.raises(Timeout, match="1024"):
            await connect(address, 1024, timeout=0.05)
        with pytest.raises(Timeout):
            await asyncio.to_thread(connect_blocking, address, 1024, 0.05)


async def test_cancelling_leaves_nothing_open(short_path: Path) -> None:
    async with device(short_path / "v", hold=True) as address:
        before = len(list(Path("/proc/self/fd").iterdir()))  # noqa: ASYNC240
        task = asyncio.create_task(connect(address, 1024, timeout=PATIENCE))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The device's own end of the connection is still there.
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1  # noqa: ASYNC240


async def test_no_device(short_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot be reached"):
        await connect(UnixVsock(short_path / "nothing"), 1024, timeout=PATIENCE)
    with pytest.raises(Unavailable):
        connect_blocking(UnixVsock(short_path / "nothing"), 1024, PATIENCE)
    with pytest.raises(InvalidInput):
        await connect(UnixVsock(short_path / "nothing"), -1, timeout=PATIENCE)


async def test_a_cid_that_nobody_has() -> None:
    with pytest.raises((Unavailable, Timeout)):
        await connect(KernelVsock(424242), 1024, timeout=PATIENCE)
    with pytest.raises((Unavailable, Timeout)):
        connect_blocking(KernelVsock(424242), 1024, PATIENCE)


async def test_listening_for_a_guest(short_path: Path) -> None:
    address = UnixVsock(short_path / "v")

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read(3)).upper())
        writer.close()

    async with listen(address, 77, handler):
        assert (short_path / "v_77").stat().st_mode & 0o777 == 0o600
        with pytest.raises(Conflict):
            async with listen(address, 77, handler):
                pass
        reader, writer = await asyncio.open_unix_connection(short_path / "v_77")
        writer.write(b"abc")
        assert await reader.read() == b"ABC"
        writer.close()
    assert not (short_path / "v_77").exists()


async def test_listening_where_no_folder_is(short_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise AssertionError

    with pytest.raises(Unavailable):
        async with listen(UnixVsock(short_path / "no/v"), 77, handler):
            pass


async def test_listening_on_the_kernels_transport() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise AssertionError

    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError:
        pytest.skip("this kernel has no AF_VSOCK")
    async with listen(KernelVsock(3), 45677, handler):
        with pytest.raises(Conflict):
            async with listen(KernelVsock(3), 45677, handler):
                pass


async def test_a_full_backlog_is_waited_for(short_path: Path) -> None:
    """Hundreds at once: none is told that it is connected before it is."""
    path = short_path / "vsock.sock"
    waiting: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        while len(waiting) < 5:  # until no more fit
            other = socket.socket(socket.AF_UNIX)
            other.setblocking(False)
            waiting.append(other)
            try:
                other.connect(str(path))
            except BlockingIOError:
                break
        connecting = asyncio.create_task(connect(UnixVsock(path), 1024, timeout=20))
        await asyncio.sleep(0.05)
        assert not connecting.done()
        for _ in range(len(waiting)):
            peer = await asyncio.to_thread(listener.accept)
            peer[0].settimeout(0.5)
            with contextlib.suppress(OSError):
                if await asyncio.to_thread(peer[0].recv, 100) == b"CONNECT 1024\n":
                    peer[0].sendall(b"OK 5000\n")
                    break
        _, writer = await connecting
        writer.close()
        peer[0].close()
    for other in waiting:
        other.close()
