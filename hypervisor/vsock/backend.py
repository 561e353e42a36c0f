"""The vhost-user-vsock back end (csrc/vsock) as a Python object: one device in one thread."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hypervisor.errors import HvError, InvalidInput, ProtocolError, ResourceExhausted, Unavailable
from hypervisor.vsock.address import check_path

_BACKLOG = 4096


@dataclass(frozen=True)
class VsockLimits:
    """Bounds of one device; 0 means the default that csrc/vsock/vsock.h names."""

    max_connections: int = 0
    window_bytes: int = 0
    buffer_budget_bytes: int = 0
    request_timeout_ms: int = 0
    linger_timeout_ms: int = 0


def bind_listener(path: Path, *, mode: int = 0o600) -> socket.socket:
    """A listening Unix socket at ``path``. Raises `Unavailable` when it cannot be made; then there is no file."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(check_path(path))
        path.chmod(mode)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise Unavailable(f"cannot listen on {path}: {error.strerror}") from error
    return sock


class VhostUserVsock:
    """One device. A context manager: entered, it runs in a thread; left, it is stopped and everything of it is closed.

    :param frontend: Unix socket for QEMU's vhost-user-vsock-pci: a listening one, or one already connected to it
    :param host: listening Unix socket for programs of this host (``CONNECT <port>``)
    :param uds_path: the guest's connections to port N of CID 2 go to the Unix socket ``<uds_path>_N``
    :param map_hook: function and context, as addresses, told of each mapping of guest memory (see csrc/vsock/vsock.h)
    :param exit_on_disconnect: the device ends when its front end has gone, instead of waiting for the next one

    Takes both sockets over. Raises `InvalidInput` or `ResourceExhausted`; then the sockets are closed.
    """

    def __init__(
        self,
        *,
        frontend: socket.socket,
        host: socket.socket,
        uds_path: str,
        guest_cid: int,
        limits: VsockLimits = VsockLimits(),
        exit_on_disconnect: bool = False,
        map_hook: tuple[int, int] | None = None,
    ) -> None:
        # Imported late and untyped: only a device process needs the extension, which lint and types do without.
        extension: Any = importlib.import_module("hypervisor.vsock._vsock")
        self._ffi: Any = extension.ffi
        self._lib: Any = extension.lib
        self._path = self._ffi.new("char[]", uds_path.encode())
        self._map_hook = map_hook
        self._handle: Any = self._create(frontend, host, guest_cid, limits, exit_on_disconnect)
        self._thread: threading.Thread | None = None
        self._error = 0

    def _create(self, frontend: socket.socket, host: socket.socket, cid: int, limits: VsockLimits, once: bool) -> Any:
        config = self._ffi.new("struct pv_vsock_config *")
        listening = frontend.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        config.listen_fd = frontend.fileno() if listening else -1
        config.frontend_fd = -1 if listening else frontend.fileno()
        config.host_listener_fd = host.fileno()
        config.uds_path, config.guest_cid, config.exit_on_disconnect = self._path, cid, once
        for name in VsockLimits.__dataclass_fields__:
            setattr(config, name, getattr(limits, name))
        if self._map_hook is not None:
            function, context = self._map_hook
            config.map_hook = self._ffi.cast("int (*)(void *, int, void *, uint64_t, uint64_t)", function)
            config.map_context = self._ffi.cast("void *", context)
        out, err = self._ffi.new("struct pv_vsock **"), self._ffi.new("int *")
        frontend.setblocking(False)
        host.setblocking(False)
        if self._lib.pv_vsock_create(config, out, err) < 0:
            frontend.close()
            host.close()
            raise _as_error(err[0], cid)
        frontend.detach()
        host.detach()
        return out[0]

    def run(self) -> None:
        """Runs the device in this thread until `stop`, or until the front end has gone if that was asked for.

        :raises ProtocolError: the front end was thrown out because it broke the protocol
        """
        err = self._ffi.new("int *")
        if self._lib.pv_vsock_run(self._handle, err) < 0:
            self._error = err[0]
            if err[0] == errno.EPROTO:
                raise ProtocolError(f"the vhost-user front end broke the protocol: {self.fault}")
            raise Unavailable(f"the vsock device failed: {os.strerror(err[0])}")

    def stop(self) -> None:
        """Makes `run` return soon. From any thread, also before `run` and more than once."""
        if self._handle is not None:
            self._lib.pv_vsock_stop(self._handle)

    @property
    def fault(self) -> str:
        """The latest rule that guest or front end broke, or ``""``."""
        return str(self._ffi.string(self._lib.pv_vsock_fault(self._alive())).decode())

    def stats(self) -> dict[str, int]:
        """The counters of ``struct pv_vsock_stats`` by name. Does not block."""
        out = self._ffi.new("struct pv_vsock_stats *")
        self._lib.pv_vsock_get_stats(self._alive(), out)
        return {name: int(getattr(out, name)) for name, _ in self._ffi.typeof("struct pv_vsock_stats").fields}

    def trace(self, hook: int) -> None:
        """Where trace points of vsock devices go, of this process's all: `PerCpuTrace.hook`, or 0 for nowhere."""
        self._lib.pv_vsock_trace(self._ffi.cast("void *", hook))

    def close(self) -> None:
        """Closes everything. The device must not be running. Harmless when repeated."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._lib.pv_vsock_destroy(handle)

    def _alive(self) -> Any:
        if self._handle is None:
            raise Unavailable("the vsock device is closed")
        return self._handle

    def _run_quietly(self) -> None:
        with contextlib.suppress(HvError):  # kept in fault and stats
            self.run()

    @property
    def running(self) -> bool:
        """Whether the thread that ``with`` started still runs the device."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the thread has ended; false when ``timeout`` seconds were not enough."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.running

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run_quietly, name="vsock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.wait()
        self.close()


def _as_error(code: int, cid: int) -> HvError:
    if code == errno.EINVAL:
        return InvalidInput(f"guest CID {cid} is not between 3 and 4294967294", where="guest_cid")
    if code in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        return ResourceExhausted(f"no vsock device can be made: {os.strerror(code)}")
    return Unavailable(f"no vsock device can be made: {os.strerror(code)}")
