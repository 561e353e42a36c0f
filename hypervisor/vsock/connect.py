"""Connecting to a guest's virtual sockets and listening for guests, the same over either transport.

Over `UnixVsock` a connect has a second step: the Unix socket is there as soon as the device process is, whether or not
the guest listens, so the guest's own answer is the line ``OK <host port>`` (or the end of the stream, if it refused).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from hypervisor.errors import Conflict, HvError, ProtocolError, Timeout, Unavailable
from hypervisor.vsock.address import HOST_CID, KernelVsock, UnixVsock, VsockAddress, check_path, check_port

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

STREAM_LIMIT = 256 * 1024
"""What an asyncio stream holds before it stops reading, in bytes."""
_MAX_ANSWER = 32
_OPEN_BACKLOG = 4096
_BACKLOG_RETRY_S = 0.005


def _connect_request(port: int) -> bytes:
    return f"CONNECT {port}\n".encode()


def _refused(address: VsockAddress, port: int) -> Unavailable:
    return Unavailable(f"nothing listens on port {port} of the guest at {address}, or the guest is not up yet")


def _unreachable(address: VsockAddress, port: int, error: OSError) -> HvError:
    if isinstance(error, TimeoutError):
        return Timeout(f"the guest at {address} did not answer on port {port} in time")
    if error.errno in (errno.ECONNRESET, errno.ENODEV):
        return _refused(address, port)
    return Unavailable(f"the guest at {address} cannot be reached on port {port}: {error.strerror or error}")


def _check_answer(address: VsockAddress, port: int, line: bytes) -> None:
    if not line:
        raise _refused(address, port)
    words = line.split()
    if not line.endswith(b"\n") or len(words) != 2 or words[0] != b"OK" or not words[1].isdigit():
        raise ProtocolError(f"{address} answered {line!r} to CONNECT, not OK: is it the socket of a vsock device?")


# ---- connecting


def _target(address: VsockAddress, port: int) -> tuple[socket.socket, str | tuple[int, int]]:
    check_port(port)
    if isinstance(address, KernelVsock):
        return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM), (address.cid, port)
    path = check_path(address.path)
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), path


async def _read_answer(sock: socket.socket) -> bytes:
    """The line, and no byte of what follows it: peeks, then takes. It comes in one piece, so this ends at once."""
    loop = asyncio.get_running_loop()
    line = b""
    while not line.endswith(b"\n") and len(line) < _MAX_ANSWER:
        byte = await loop.sock_recv(sock, _take_size(sock, _MAX_ANSWER - len(line)))
        if not byte:
            break
        line += byte
    return line


def _take_size(sock: socket.socket, room: int) -> int:
    """How many bytes belong to the line, as far as can be seen now; 1 when nothing is there yet."""
    try:
        seen = sock.recv(room, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return 1
    end = seen.find(b"\n")
    return end + 1 if end >= 0 else max(1, len(seen))


async def _open(address: VsockAddress, port: int) -> socket.socket:
    """A connected socket that does not block. The socket is closed on every failure, cancellation included."""
    sock, target = _target(address, port)
    with contextlib.ExitStack() as undo:
        undo.callback(sock.close)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        if isinstance(address, UnixVsock):
            await _connect_unix(sock, address)
            await loop.sock_sendall(sock, _connect_request(port))
            _check_answer(address, port, await _read_answer(sock))
        else:
            await loop.sock_connect(sock, target)
        undo.pop_all()
    return sock


async def _connect_unix(sock: socket.socket, address: UnixVsock) -> None:
    """Waits while the listener's backlog is full. asyncio takes that for a connection under way, and then for one that
    stands: the first write would fail."""
    while True:
        try:
            return sock.connect(check_path(address.path))
        except BlockingIOError:
            await asyncio.sleep(_BACKLOG_RETRY_S)


async def connect(
    address: VsockAddress, port: int, *, timeout: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connects to a port of a guest.

    :param timeout: seconds until the guest must have accepted
    :raises Unavailable: nothing listens there, the guest is not up, or its device process is gone
    :raises Timeout: no answer in time
    :raises ProtocolError: the Unix socket is not that of a vsock device
    On failure nothing is left open.
    """
    try:
        async with asyncio.timeout(timeout):
            sock = await _open(address, port)
    except OSError as error:
        raise _unreachable(address, port, error) from error
    try:
        return await asyncio.open_connection(sock=sock, limit=STREAM_LIMIT)
    except BaseException:
        sock.close()
        raise


def connect_blocking(address: VsockAddress, port: int, timeout: float) -> socket.socket:
    """As `connect`, for code without an event loop. The socket that it returns blocks, with no time-out of its own."""
    sock, target = _target(address, port)
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as undo:
        undo.callback(sock.close)
        try:
            sock.settimeout(timeout)
            sock.connect(target)
            if isinstance(address, UnixVsock):
                sock.sendall(_connect_request(port))
                _check_answer(address, port, _read_answer_blocking(sock, deadline))
        except OSError as error:
            raise _unreachable(address, port, error) from error
        sock.settimeout(None)
        undo.pop_all()
    return sock


def _read_answer_blocking(sock: socket.socket, deadline: float) -> bytes:
    """As `_read_answer`; byte by byte it would cost as much as all the rest of a connect in a slow guest."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _MAX_ANSWER:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        seen = sock.recv(_MAX_ANSWER - len(line), socket.MSG_PEEK)
        if not seen:
            break
        line += sock.recv(seen.find(b"\n") + 1 or len(seen))
    return line


# ---- listening


def _give_to_directory_owner(path: Path) -> None:
    """The device process runs as the owner of the VM's directory and must be able to connect; nobody else."""
    path.chmod(0o600)
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


def _bind_unix(path: Path) -> socket.socket:
    name = check_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(name)
        _give_to_directory_owner(path)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(f"{path} exists already: somebody listens there, or died and left it") from error
        raise Unavailable(f"cannot listen on {path}: {error.strerror}") from error
    return sock


def _bind_kernel(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        sock.bind((socket.VMADDR_CID_ANY, port))
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(f"port {port} of this host's AF_VSOCK is in use") from error
        raise Unavailable(f"cannot listen on port {port} of this host's AF_VSOCK: {error.strerror}") from error
    return sock


def _only_from(cid: int, handler: Handler) -> Handler:
    """The kernel's listener takes connections of every guest: others than the one meant are closed."""

    async def filtered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("socket").getpeername()
        if peer[0] != cid:
            writer.close()
            return
        await handler(reader, writer)

    return filtered


@contextlib.asynccontextmanager
async def listen(address: VsockAddress, port: int, handler: Handler) -> AsyncIterator[asyncio.Server]:
    """Listens, within the ``async with``, for connections that the guest makes to ``port`` of this host (CID 2).

    Each connection runs ``handler`` in a task of its own. At the end the listener is closed and its Unix socket
    removed; connections that were accepted are the handlers' to end.

    :raises Conflict: the port is taken
    """
    check_port(port)
    path: Path | None = None
    if isinstance(address, UnixVsock):
        path = address.listen_path(port)
        sock = _bind_unix(path)
    else:
        sock, handler = _bind_kernel(port), _only_from(address.cid, handler)
    try:
        sock.setblocking(False)
        server = await asyncio.start_server(handler, sock=sock, limit=STREAM_LIMIT, backlog=_OPEN_BACKLOG)
        try:
            yield server
        finally:
            server.close()
    finally:
        sock.close()
        if path is not None:
            path.unlink(missing_ok=True)


__all__ = ["HOST_CID", "STREAM_LIMIT", "Handler", "connect", "connect_blocking", "listen"]
