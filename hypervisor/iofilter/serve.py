"""Serving a disk by NBD from this process, for as long as a command runs or until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from hypervisor.errors import HostUnfit, Unavailable
from hypervisor.iofilter.chain import open_disk
from hypervisor.iofilter.control import Holder, ask
from hypervisor.iofilter.loop import DiskLoop
from hypervisor.iofilter.store import DiskStore


def serve(
    store: DiskStore,
    name: str,
    *,
    at: str | None = None,
    socket: Path | None = None,
    read_only: bool = False,
    command: tuple[str, ...] = (),
) -> int:
    """Serves until `command` ends (its exit code is returned), or without one until SIGINT or SIGTERM.

    A process that has the disk open already is asked to serve it; else it is opened here.

    :param at: a filter: only what lies downstream of it is served
    :param socket: where; None: in the disk's folder
    :param command: an argument ``{}`` becomes the address
    """
    path = socket or store.folder(name) / f"nbd-{os.getpid()}.sock"
    return asyncio.run(_serve(store, name, {"at": at, "socket": str(path), "read_only": read_only}, command))


async def _serve(store: DiskStore, name: str, wish: dict[str, object], command: tuple[str, ...]) -> int:
    store.load(name)
    async with _export(store, name, wish):
        return await _run(command, str(wish["socket"]))


@contextlib.asynccontextmanager
async def _export(store: DiskStore, name: str, wish: dict[str, object]) -> AsyncIterator[None]:
    folder = store.folder(name)
    try:
        await asyncio.to_thread(ask, folder, {"op": "export", **wish})
    except Unavailable:
        async with _own(store, name, wish):
            yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(Unavailable):  # the holder went: so did the export
            await asyncio.to_thread(ask, folder, {"op": "unexport", "socket": wish["socket"]})


@contextlib.asynccontextmanager
async def _own(store: DiskStore, name: str, wish: dict[str, object]) -> AsyncIterator[None]:
    with DiskLoop() as loop:
        opened = await asyncio.to_thread(open_disk, loop, store, name, read_only=bool(wish["read_only"]))
        try:
            async with Holder(store, opened).serving() as holder:
                await asyncio.to_thread(holder.do, {"op": "export", **wish})
                yield
        finally:
            await asyncio.to_thread(opened.close)


async def _run(command: tuple[str, ...], socket: str) -> int:
    address = f"nbd+unix:///?socket={socket}"
    stop = asyncio.Event()
    running = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        running.add_signal_handler(number, stop.set)
    if not command:
        sys.stdout.write(address + "\n")
        sys.stdout.flush()
        await stop.wait()
        return 0
    try:
        process = await asyncio.create_subprocess_exec(*(word.replace("{}", address) for word in command))
    except FileNotFoundError as error:
        raise HostUnfit(f"there is no program {command[0]} here: install it, or use another") from error
    ended = asyncio.ensure_future(process.wait())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not ended.done():
        process.terminate()
    code = await ended
    return code if code >= 0 else 128 - code
