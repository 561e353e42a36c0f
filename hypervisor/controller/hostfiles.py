"""The files by which a host's daemon is found and kept alone: lock, token, address."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from hypervisor.controller.paths import HostPaths
from hypervisor.controller.store import write_durably
from hypervisor.errors import Conflict, HvError, ResourceExhausted, Unavailable


def prepare(paths: HostPaths) -> None:
    """Makes the state directory and its folders; VMs' own users may pass through, but not look around.

    :raises HvError: it cannot be made
    """
    try:
        paths.root.mkdir(mode=0o755, parents=True, exist_ok=True)
        paths.pods.mkdir(mode=0o711, exist_ok=True)
        paths.warm.mkdir(mode=0o711, exist_ok=True)
        paths.manifests.mkdir(mode=0o700, exist_ok=True)
    except OSError as e:
        raise HvError(f"cannot make the state directory {paths.root}: {e.strerror}; choose another: --state-dir") from e


@contextmanager
def only_daemon(paths: HostPaths) -> Iterator[None]:
    """While it is open no other daemon can have this state directory. A killed daemon's lock is gone with it.

    :raises Conflict: another daemon has it; the message names its process
    """
    fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise Conflict(
                f"hostd (process {_holder(fd)}) has the state directory {paths.root} already; stop it with "
                "`hv host stop`, or give another directory: --state-dir"
            ) from e
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(fd)


def _holder(fd: int) -> str:
    text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
    return text or "unknown"


def token(paths: HostPaths) -> str:
    """The bearer token, made at the first start; a file that others could read is replaced.

    :raises HvError: it cannot be written
    """
    try:
        with os.fdopen(os.open(paths.token, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)) as file:
            info = os.fstat(file.fileno())
            text = file.read(256).strip()
        if info.st_uid == os.geteuid() and not stat.S_IMODE(info.st_mode) & 0o077 and len(text) >= 32:
            return text
    except OSError:
        pass
    return _new_token(paths)


def _new_token(paths: HostPaths) -> str:
    text = secrets.token_urlsafe(32)
    temporary = paths.token.with_name(f".token.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(text + "\n")
        temporary.replace(paths.token)
    except OSError as e:
        raise ResourceExhausted(f"cannot write {paths.token}: {e.strerror}") from e
    return text


def announce(paths: HostPaths, address: str, port: int) -> None:
    """Tells clients where the daemon listens, all or nothing."""
    start_time = int(open_stat().rpartition(")")[2].split()[19])
    body = {"pid": os.getpid(), "start_time": start_time, "address": address, "port": port}
    try:
        write_durably(paths.host, body, mode=0o644)
    except OSError as e:
        raise Unavailable(f"cannot write {paths.host}: {e.strerror}") from e


def open_stat() -> str:
    """This process's line in proc(5)."""
    with open("/proc/self/stat") as file:  # noqa: PTH123 -- no path to build
        return file.read()


def withdraw(paths: HostPaths) -> None:
    """The daemon does not listen any more. Leaves another's announcement alone."""
    try:
        if json.loads(paths.host.read_bytes())["pid"] == os.getpid():
            paths.host.unlink()
    except (OSError, ValueError, KeyError, TypeError):
        pass
