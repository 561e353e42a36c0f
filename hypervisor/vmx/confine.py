"""Takes from a freshly forked vmx everything that it does not need. Each step is for ever.

Order matters: cgroups and the log want root's rights and the host's file system; then descriptors, limits, chroot,
user, capabilities; the seccomp filter comes last, when everything is set up (`hypervisor.vmx.device`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from collections.abc import Collection
from pathlib import Path

from hypervisor.errors import HostUnfit
from hypervisor.vmx.config import DEFAULT_CONNECTIONS, VmxConfig

_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CLONE_NEWIPC = 0x08000000
_CLONE_NEWNET = 0x40000000
_LAST_POSSIBLE_CAPABILITY = 63
_DESCRIPTORS_BESIDE_CONNECTIONS = 512

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, *arguments: int) -> bool:
    result: int = _libc.prctl(option, *(ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]))
    return result == 0


def _must(ok: bool, what: str) -> None:
    if not ok:
        raise HostUnfit(f"vmx cannot be confined: {what}: {os.strerror(ctypes.get_errno())}")


def name_process(name: str) -> None:
    """The name that ``ps`` and ``top`` show, at most 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _prctl(_PR_SET_NAME, ctypes.addressof(buffer))


def join_cgroups(folders: Collection[Path]) -> None:
    """Raises `HostUnfit` naming the folder that refuses."""
    for folder in folders:
        try:
            (folder / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as error:
            raise HostUnfit(f"vmx cannot join cgroup {folder}: {error.strerror}") from error


def open_log(config: VmxConfig, path: Path) -> int:
    """The log, appended to, not followed if it is a symbolic link, owned by the VM's user."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    if config.uid is not None:
        os.fchown(fd, config.uid, config.gid if config.gid is not None else -1)
    return fd


def close_all_but(keep: Collection[int]) -> None:
    """Closes every descriptor above 2 that is not listed: the zygote's and whatever it had inherited."""
    start = 3
    for fd in sorted({*keep, os.sysconf("SC_OPEN_MAX")}):
        if fd > start:
            os.closerange(start, fd)
        start = max(start, fd + 1)


def limit_resources(config: VmxConfig) -> None:
    """Descriptors as many as connections need, no core file. Memory and CPU are the cgroup's."""
    wanted = (config.vsock.max_connections or DEFAULT_CONNECTIONS) + _DESCRIPTORS_BESIDE_CONNECTIONS
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))


def _become(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _drop_bounding_set() -> None:
    for capability in range(_LAST_POSSIBLE_CAPABILITY + 1):
        if not _prctl(_PR_CAPBSET_DROP, capability):
            return  # EINVAL: beyond the kernel's last one


def enter(config: VmxConfig) -> Path:
    """Root file system, user and capabilities. Returns the VM's folder as this process sees it from now on.

    Without root: only what an unprivileged process can do about itself.
    """
    _must(_prctl(_PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")
    folder = config.directory
    if config.uid is not None and config.gid is not None:
        # No network at all, not even abstract Unix sockets. A kernel without such namespaces leaves seccomp's
        # AF_UNIX-only rule.
        with contextlib.suppress(OSError):
            _libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC)
        os.chroot(folder)
        os.chdir("/")
        folder = Path("/")
        _drop_bounding_set()
        _must(_prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL), "ambient capabilities")
        _become(config.uid, config.gid)
    # QEMU may run as the same user: it must not trace this process or read its memory.
    _must(_prctl(_PR_SET_DUMPABLE, 0), "dumpable")
    return folder
