"""A vmx from its fork to its end: the device process of one VM.

Theory of operation
-------------------
::

    forked -> FREED (own session, log, only its own descriptors) -> CONFINED (cgroup, chroot, user, no capabilities)
           -> SERVING (sockets made, device thread runs, seccomp filter on; only now the zygote's client is told)
           -> DRAINING (QEMU has hung up: the last console bytes go to their logs) -> ended, socket files removed

The device's thread is C and holds no lock of Python; the main thread serves the control socket and waits. The process
ends when QEMU has hung up, when it is told to stop (control socket or SIGTERM), or when the device fails; it does not
matter to it whether hostd or the zygote live.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypervisor.errors import HvError
from hypervisor.vmx import confine, seccomp
from hypervisor.vmx.block import BlockDevices
from hypervisor.vmx.chains import filters_from_json
from hypervisor.vmx.config import CONTROL_SOCKET, FRONTEND_SOCKET, HOST_SOCKET, LOG, VmxConfig, VmxFds
from hypervisor.vmx.console import StreamLog, StreamLogs
from hypervisor.vmx.control import ControlServer
from hypervisor.vmx.process import ProcessId
from hypervisor.vmx.ram import LazyRam
from hypervisor.vmx.trace import DeviceTrace
from hypervisor.vsock.backend import VhostUserVsock, bind_listener

_DRAIN_SECONDS = 2.0


class Log:
    """vmx.log: lines with a time; emptied when it would grow beyond its limit."""

    def __init__(self, fd: int, max_bytes: int) -> None:
        self._fd = fd
        self._max_bytes = max_bytes

    def write(self, text: str) -> None:
        """Never raises: a full disk must not end a VM."""
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} vmx[{os.getpid()}] {text}\n".encode()
        with contextlib.suppress(OSError):
            if os.fstat(self._fd).st_size + len(line) > self._max_bytes:
                os.ftruncate(self._fd, 0)
            os.write(self._fd, line)


class Device:
    """The serving part, confined already. `serve` blocks until the end."""

    def __init__(self, config: VmxConfig, fds: VmxFds, folder: Path, log: Log) -> None:
        self._log = log
        self._folder = folder
        self._stop_reason = "QEMU has hung up"
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._made: list[Path] = []
        self._ram = self._make_ram(config, fds)
        self._vsock = None if config.guest_cid is None else self._make_vsock(config, config.guest_cid, fds)
        self._blocks = self._make_blocks(config, fds)
        self._has_streams = bool(fds.streams)
        pairs = zip(fds.streams, config.stream_limits, strict=True)
        self._logs = StreamLogs([StreamLog(source, sink, size) for (source, sink), size in pairs])
        self._trace = DeviceTrace([part.trace for part in (self._ram, self._vsock, self._blocks) if part is not None])
        calls = {"stats": self.stats, "ping": dict, "stop": lambda: self.stop("told to stop")}
        calls |= {"trace-start": self._trace.start, "trace-stop": self._trace.stop}
        if self._ram is not None:
            calls["working-set"] = self._ram.working_set
        taking: dict[str, Callable[[str, int], None]] = {"trace": self._take_trace}
        asking: dict[str, Callable[[dict[str, Any]], Any]] = {}
        if self._blocks is not None:
            taking["insert"] = self._blocks.insert
            asking["chain"] = self._change_chain
        self._control = ControlServer(self._bind(CONTROL_SOCKET), calls, taking, asking)

    def _bind(self, name: str) -> socket.socket:
        path = self._folder / name
        path.unlink(missing_ok=True)
        listener = bind_listener(path)
        self._made.append(path)
        return listener

    def _make_vsock(self, config: VmxConfig, cid: int, fds: VmxFds) -> VhostUserVsock:
        frontend = socket.socket(fileno=fds.frontend) if fds.frontend is not None else self._bind(FRONTEND_SOCKET)
        return VhostUserVsock(
            frontend=frontend,
            host=self._bind(HOST_SOCKET),
            uds_path=str(self._folder / HOST_SOCKET),
            guest_cid=cid,
            limits=config.vsock,
            exit_on_disconnect=True,
            map_hook=self._ram.map_hook if self._ram is not None else None,
        )

    def _make_ram(self, config: VmxConfig, fds: VmxFds) -> LazyRam | None:
        if config.ram is None or fds.ram is None:
            return None
        return LazyRam(config.ram, fds.ram, failed=lambda reason: self.stop(f"guest RAM: {reason}"))

    def _make_blocks(self, config: VmxConfig, fds: VmxFds) -> BlockDevices | None:
        if not config.blocks:
            return None
        hook = self._ram.map_hook if self._ram is not None else None
        return BlockDevices(config.blocks, fds.blocks, fds.bases, folder=self._folder, map_hook=hook)

    def _change_chain(self, argument: dict[str, Any]) -> dict[str, float]:
        assert self._blocks is not None
        filters = filters_from_json(argument.get("filters"), "filters")
        return {"pause_s": self._blocks.change(str(argument.get("disk")), filters)}

    def _take_trace(self, _name: str, fd: int) -> None:
        try:
            self._trace.take(fd)
        finally:
            os.close(fd)

    def stats(self) -> dict[str, Any]:
        """Counters for the control socket."""
        rest = {
            "ram": None if self._ram is None else self._ram.stats(),
            "disks": None if self._blocks is None else self._blocks.stats(),
            "percpu": self._trace.stats(),
        }
        if self._vsock is None:
            return {"vsock": None, "fault": ""} | rest
        return {"vsock": self._vsock.stats(), "fault": self._vsock.fault} | rest

    def stop(self, reason: str) -> None:
        """Makes `serve` return soon. Safe in a signal handler."""
        self._stop_reason = reason
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def start(self) -> None:
        """Starts the threads. QEMU is gone when it leaves the vsock device, or when every stream from it has ended."""
        self._logs.start()
        if self._ram is not None:
            self._ram.start()
        waits = [*([self._run_vsock] if self._vsock else []), *([self._logs.join] if self._has_streams else [])]
        for wait in waits:
            threading.Thread(target=self._then_wake, args=(wait,), name="device", daemon=True).start()

    def _run_vsock(self) -> None:
        assert self._vsock is not None
        try:
            self._vsock.run()
        except HvError as error:
            self._stop_reason = str(error)

    def _then_wake(self, wait: Callable[[], object]) -> None:
        wait()
        self.stop(self._stop_reason)

    def serve(self) -> None:
        """Answers the control socket until the device has ended or is told to stop; then drains, and removes its
        sockets.
        """
        with selectors.DefaultSelector() as selector:
            running = True
            selector.register(self._wake_read, selectors.EVENT_READ, None)
            self._control.register(selector)
            while running:
                for key, _ in selector.select():
                    if key.data is None:
                        running = False
                    else:
                        key.data()
            self._control.close()
        self._end()

    def _end(self) -> None:
        if self._vsock is not None:
            self._vsock.stop()
        self._logs.join(_DRAIN_SECONDS)
        fault = f"; latest fault: {self._vsock.fault}" if self._vsock is not None and self._vsock.fault else ""
        self._log.write(f"end: {self._stop_reason}{fault}")
        for path in self._made:
            path.unlink(missing_ok=True)


def _free(config: VmxConfig, fds: VmxFds, ready: int) -> tuple[int, ProcessId]:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    confine.name_process("vmx")
    confine.join_cgroups(config.cgroups)
    log = confine.open_log(config, config.directory / LOG)
    null = os.open(os.devnull, os.O_RDWR)
    for number, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, number)
    confine.close_all_but([ready, log, *fds.flat()])
    return log, ProcessId.of(os.getpid())


def _serve(config: VmxConfig, fds: VmxFds, ready: socket.socket) -> None:
    log_fd, me = _free(config, fds, ready.fileno())
    log = Log(log_fd, config.log_max_bytes)
    confine.limit_resources(config)
    folder = confine.enter(config)
    device = Device(config, fds, folder, log)
    signal.signal(signal.SIGTERM, lambda *_: device.stop("SIGTERM"))
    device.start()
    seccomp.install()
    log.write(f"serving, CID {config.guest_cid}")
    ready.send(json.dumps({"pid": me.pid, "start_time": me.start_time}).encode())
    ready.close()
    device.serve()


def main(config: VmxConfig, fds: VmxFds, ready: socket.socket) -> None:
    """The whole life of a forked child. Does not return. What goes wrong before it serves is told to ``ready``."""
    try:
        _serve(config, fds, ready)
        os._exit(0)
    except BaseException as error:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
            sys.stderr.flush()
            ready.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        os._exit(1)
