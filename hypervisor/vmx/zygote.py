"""The zygote: a process that has everything of a vmx loaded, and is forked for each VM.

Theory of operation
-------------------
hostd executes ``python -m hypervisor.vmx.zygote FD``; FD is a SOCK_SEQPACKET socket. A request is one packet: the
`VmxConfig` as JSON with, as descriptors, a `ready` socket and those of `VmxFds`. The zygote forks and forgets: the
child itself tells `ready` when it serves, or why it cannot; if it dies first, `ready` is at its end. So neither side
waits for the other, and many forks may be under way at once.

    hostd                        zygote                    child (vmx)
      | -- config, fds, ready -->  | -- fork ------------------> |
      | <----------------------- ready: {"pid","start_time"} --- |   ... serves, with or without the others

The zygote has one thread, ends when hostd's end of the socket closes, and leaves its children alone then. Children
are reaped by the kernel (SIGCHLD ignored); who wants to know about one's end watches its pidfd.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from hypervisor.errors import ProtocolError, Timeout, Unavailable, VmFailed
from hypervisor.vmx.config import NO_FDS, RamFds, VmxConfig, VmxFds
from hypervisor.vmx.process import ProcessId

#: the extents of a template that is much fragmented are the most of it
_MAX_REQUEST = 128 * 1024
_MAX_FDS = 128
_FORK_SECONDS = 15.0


class Zygote:
    """hostd's end. Made by `start`; its owner ends it by leaving the ``async with``."""

    def __init__(self, process: asyncio.subprocess.Process, sock: socket.socket) -> None:
        self._process = process
        self._sock = sock

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls) -> AsyncIterator[Zygote]:
        """Starts the process; at the end it is ended and awaited. The vmx that it forked live on.

        :raises Unavailable: it cannot be executed
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            ours.setblocking(False)
            with theirs:
                process = await _execute(theirs)
            try:
                yield cls(process, ours)
            finally:
                ours.close()
                await _end(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def wait_exit(self) -> int:
        """Returns its exit code (negative: signal) when it has ended. Then a new one has to be started to fork
        again.
        """
        return await self._process.wait()

    async def fork(self, config: VmxConfig, fds: VmxFds = NO_FDS, *, timeout: float = _FORK_SECONDS) -> ProcessId:
        """A new vmx that serves already: its sockets accept connections.

        :param fds: stay the caller's
        :param timeout: seconds until it must serve
        :raises InvalidInput: the config says why
        :raises VmFailed: it could not confine or set itself up; nothing of it is left
        :raises Unavailable: the zygote is gone (`Timeout`: it did not serve in time)
        """
        config.validate()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            ours.setblocking(False)
            with theirs:
                self._request(config, [theirs.fileno(), *fds.flat()], fds)
            try:
                async with asyncio.timeout(timeout):
                    answer = await asyncio.get_running_loop().sock_recv(ours, _MAX_REQUEST)
            except TimeoutError as error:
                raise Timeout(f"vmx for {config.directory} does not serve after {timeout:g} s") from error
            except OSError as error:
                raise Unavailable(f"the zygote is gone: {error.strerror}") from error
        return _parse_answer(config, answer)

    def _request(self, config: VmxConfig, descriptors: list[int], fds: VmxFds) -> None:
        packet = json.dumps(
            {
                "config": config.to_json().decode(),
                "frontend": fds.frontend is not None,
                "streams": len(fds.streams),
                "ram": fds.ram is not None,
                "layers": 0 if fds.ram is None else len(fds.ram.layers),
                "working_set": fds.ram is not None and fds.ram.working_set is not None,
                "blocks": [disk is not None for _, disk in fds.blocks],
                "bases": len(fds.bases),
            }
        ).encode()
        try:
            socket.send_fds(self._sock, [packet], descriptors)
        except BlockingIOError as error:
            raise Unavailable("the zygote does not take requests") from error
        except OSError as error:
            raise Unavailable(f"the zygote is gone: {error.strerror}") from error


def _environment() -> dict[str, str]:
    """Nothing of hostd's: a taken-over vmx must not find secrets there. The package is found where this one was."""
    measured = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    package = str(Path(__file__).resolve().parents[2])
    return {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONPATH": package} | measured


async def _execute(sock: socket.socket) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", "hypervisor.vmx.zygote", str(sock.fileno())),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=[sock.fileno()],
            env=_environment(),
            start_new_session=True,
        )
    except OSError as error:
        raise Unavailable(f"the zygote cannot be started: {error.strerror}") from error


async def _end(process: asyncio.subprocess.Process) -> None:
    """Its socket is closed already, which ends it; a stopped or hanging one is killed."""
    try:
        async with asyncio.timeout(2):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _parse_answer(config: VmxConfig, answer: bytes) -> ProcessId:
    if not answer:
        raise VmFailed(f"vmx for {config.directory} died before it served; see {config.directory}/vmx.log")
    value: dict[str, Any] = json.loads(answer)
    if "error" in value:
        raise VmFailed(f"vmx for {config.directory} cannot serve: {value['error']}")
    return ProcessId(int(value["pid"]), int(value["start_time"]))


# ---- the process ---------------------------------------------------------------------------------------


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One request. Empty at the end. Descriptors are closed on exec."""
    control = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
    data, ancillary, flags, _ = sock.recvmsg(_MAX_REQUEST, control, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in fds:
            os.close(fd)
        raise ProtocolError("a request is too long")
    return data, list(fds)


def _parse_request(data: bytes, descriptors: list[int]) -> tuple[VmxConfig, VmxFds]:
    value = json.loads(data)
    rest = iter(descriptors[1:])
    frontend = next(rest) if value["frontend"] else None
    streams = tuple((next(rest), next(rest)) for _ in range(value["streams"]))
    ram = None
    if value["ram"]:
        ram = RamFds(
            qemu=next(rest), database=next(rest), template=next(rest), device=next(rest),
            layers=tuple(next(rest) for _ in range(value["layers"])),
            working_set=next(rest) if value["working_set"] else None,
        )  # fmt: skip
    blocks = tuple((next(rest), next(rest) if has_disk else None) for has_disk in value["blocks"])
    bases = tuple(next(rest) for _ in range(value["bases"]))
    fds = VmxFds(frontend=frontend, streams=streams, ram=ram, blocks=blocks, bases=bases)
    return VmxConfig.from_json(value["config"].encode()), fds


def _fork_one(data: bytes, descriptors: list[int]) -> None:
    from hypervisor.vmx import device

    if os.fork() == 0:
        try:
            ready = socket.socket(fileno=descriptors[0])
            config, fds = _parse_request(data, descriptors)
            device.main(config, fds, ready)
        finally:
            os._exit(1)


def serve(sock: socket.socket) -> None:
    """Forks as asked until the other end is closed."""
    while True:
        try:
            data, descriptors = _receive(sock)
        except ProtocolError as error:
            sys.stderr.write(f"zygote: {error}\n")
            continue
        except ConnectionResetError:
            return
        if not data:
            return
        try:
            if descriptors:
                _fork_one(data, descriptors)
        except OSError as error:  # no more processes: the client sees the end of `ready`
            sys.stderr.write(f"zygote: fork: {error}\n")
        finally:
            for fd in descriptors:
                os.close(fd)


def main() -> None:
    """``python -m hypervisor.vmx.zygote FD``"""
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for module in ("hypervisor.vmx.device", "hypervisor.vmx.ram", "hypervisor.vmx.block", "hypervisor.vsock._vsock"):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # so that children share these pages
    serve(sock)


if __name__ == "__main__":
    main()
