"""The agent's life as PID 1: listen, serve, power off.

``PODVISOR_AGENT_SOCKET`` makes it listen on a Unix socket instead and never power anything off (tests).
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys

from . import syscalls, template, wire
from .calls import Agent, table
from .launch import CRUN_STATE
from .reaper import Reaper
from .server import Server, complain
from .storage import make_directories

_FLUSH_S = 2.0
_FILES = (65536, 524288)


def main() -> int:
    """Never returns as PID 1: a guest without its agent powers off."""
    unix_path = os.environ.get("PODVISOR_AGENT_SOCKET")
    if unix_path is None:
        _prepare_process()
    try:
        asyncio.run(serve(_listener(unix_path)))
    except BaseException as e:
        complain(f"fatal: {e!r}")
        if unix_path is not None:
            raise
    if unix_path is None:
        _power_off()
    return 0


def _listener(unix_path: str | None) -> socket.socket:
    if unix_path is not None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(unix_path)
    else:
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((socket.VMADDR_CID_ANY, wire.AGENT_PORT))
    listener.listen(512)
    return listener


def _prepare_process() -> None:
    """What PID 1 needs: directories, limits that containers may have, no signal that ends it."""
    os.chdir("/")
    os.umask(0o022)
    os.environ.clear()
    make_directories()
    os.makedirs(CRUN_STATE, mode=0o700, exist_ok=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, _FILES)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


async def serve(listener: socket.socket) -> None:
    """Answers calls on `listener` until one of them is ``shutdown``."""
    loop = asyncio.get_running_loop()
    reaper = Reaper(loop)
    ended = asyncio.Event()
    agent = Agent(reaper)
    server = Server(table(agent, ended.set))
    try:
        server.serve(listener)
        if template.wanted():
            await template.prepare(agent)
        await ended.wait()
        await asyncio.gather(*(c.flushed(_FLUSH_S) for c in list(server.connections)))
    finally:
        await server.close()
        reaper.close()


def _power_off() -> None:
    """Unmounts what can be unmounted and powers off; only an error returns."""
    from .storage import CONTAINERS, DATA, IMAGES

    for parent in (CONTAINERS, IMAGES):
        for name in _names(parent):
            _unmount(f"{parent}/{name}/rootfs" if parent == CONTAINERS else f"{parent}/{name}")
    os.sync()
    _unmount(DATA)
    sys.stderr.flush()
    syscalls.sync_and_power_off()


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _unmount(target: str) -> None:
    try:
        syscalls.unmount(target)
    except OSError as e:
        complain(f"unmount: {e}") if e.errno != 22 else None
