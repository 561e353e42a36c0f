"""Where a guest's virtual sockets can be reached from this host, and whether the kernel's own transport is there."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from hypervisor.errors import InvalidInput

HOST_CID = 2
FIRST_GUEST_CID = 3
LAST_GUEST_CID = 2**32 - 2
MAX_PORT = 2**32 - 2
"""2**32 - 1 means "any port" to AF_VSOCK."""

SUN_PATH_MAX = 107
"""Longest path of a Unix socket, in bytes, without the final NUL."""

VHOST_VSOCK = Path("/dev/vhost-vsock")


@dataclass(frozen=True)
class UnixVsock:
    """A guest behind a vhost-user back end: its host side is a Unix socket that speaks ``CONNECT <port>``."""

    path: Path

    def listen_path(self, port: int) -> Path:
        """The Unix socket that a guest reaches when it connects to this host's ``port``."""
        return self.path.with_name(f"{self.path.name}_{port}")

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class KernelVsock:
    """A guest behind the kernel's vhost-vsock: reached over the host's own AF_VSOCK."""

    cid: int

    def __str__(self) -> str:
        return f"vsock:{self.cid}"


VsockAddress = UnixVsock | KernelVsock


def check_port(port: int) -> int:
    """The port itself. Raises `InvalidInput` when AF_VSOCK has no such port."""
    if not 0 <= port <= MAX_PORT:
        raise InvalidInput(f"virtual socket port {port} is not between 0 and {MAX_PORT}")
    return port


def check_path(path: Path) -> str:
    """The path as ``connect`` and ``bind`` want it. Raises `InvalidInput` when a Unix socket cannot have that name."""
    name = os.fspath(path)
    if len(os.fsencode(name)) > SUN_PATH_MAX:
        raise InvalidInput(
            f"the socket path {name} is longer than the {SUN_PATH_MAX} bytes that a Unix socket may have; "
            "use a shorter state directory"
        )
    return name


@dataclass(frozen=True)
class Finding:
    """One thing looked for on this machine: whether it is usable, what was found, and how to mend it if not."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    needed: bool = False


def kernel_vsock_available(device: Path = VHOST_VSOCK) -> Finding:
    """Whether QEMU can be given the kernel's vhost-vsock and this host talk over AF_VSOCK. Opens and closes both."""
    fix = "modprobe vhost_vsock (or go without: the vhost-user back end does the same in user space)"
    if not hasattr(socket, "AF_VSOCK"):
        return Finding("vhost-vsock", False, "this Python has no AF_VSOCK", fix)
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            return Finding("vhost-vsock", False, f"{device} may not be opened by this user", "join the group kvm")
        return Finding("vhost-vsock", False, f"{device}: {os.strerror(error.errno or 0)}", fix)
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError as error:
        return Finding("vhost-vsock", False, f"AF_VSOCK: {error.strerror}", fix)
    return Finding("vhost-vsock", True, f"{device} can be used")
