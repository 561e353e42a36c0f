"""System calls that Python 3.11 does not offer, through ctypes. All raise OSError with the path in question."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_RELATIME = 1 << 21
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWPID = 0x20000000
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_IN_ROOT = 0x10
_X86 = os.uname().machine == "x86_64"
_SYS_OPENAT2 = 437
_SYS_BPF = 321 if _X86 else 280
_SYS_QUOTACTL_FD = 443
_SYS_SIGNALFD4 = 289 if _X86 else 74
_SYS_REBOOT = 169 if _X86 else 142
_MCL_CURRENT = 1
_PR_SET_CHILD_SUBREAPER = 36


def _check(result: int, path: str | None = None) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)
    return result


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def mount(source: str | None, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """mount(2)."""
    _check(
        _libc.mount(_bytes(source), _bytes(target), _bytes(kind), ctypes.c_ulong(flags), _bytes(data)),
        f"{source or kind} on {target}",
    )


def unmount(target: str, flags: int = UMOUNT_NOFOLLOW) -> None:
    """umount2(2)."""
    _check(_libc.umount2(_bytes(target), flags), target)


def setns(fd: int, flags: int) -> None:
    """setns(2)."""
    _check(_libc.setns(fd, flags))


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(flags))


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_in_root(root: int, path: str, flags: int, mode: int = 0) -> int:
    """Opens `path` as if the directory `root` were /: neither `..` nor a symbolic link leads out of it.

    :param root: a directory's descriptor
    :return: a descriptor, close-on-exec
    """
    how = _OpenHow(flags | os.O_CLOEXEC, mode, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    name = os.fsencode(path)
    call = (_SYS_OPENAT2, root, name, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)))
    return _check(int(_libc.syscall(*call)), path)


def signal_descriptor(number: int) -> int:
    """signalfd(2) of one signal, which the caller has blocked: non-blocking, close-on-exec."""
    mask = ctypes.c_uint64(1 << (number - 1))
    flags = os.O_NONBLOCK | os.O_CLOEXEC
    return _check(int(_libc.syscall(_SYS_SIGNALFD4, -1, ctypes.byref(mask), ctypes.c_size_t(8), flags)))


def bpf(command: int, attributes: bytes) -> int:
    """bpf(2) with the bytes of its union; a descriptor, close-on-exec, where the command gives one."""
    return _check(int(_libc.syscall(_SYS_BPF, command, attributes, ctypes.c_size_t(len(attributes)))))


def quotactl(fd: int, command: int, kind: int, number: int, block: bytearray) -> None:
    """quotactl_fd(2) on the file system of `fd`; `block` is a struct if_dqblk, read or written."""
    buffer = (ctypes.c_char * len(block)).from_buffer(block)
    code = ctypes.c_uint32(command << 8 | kind)
    _check(int(_libc.syscall(_SYS_QUOTACTL_FD, fd, code, ctypes.c_uint32(number), buffer)), "quota")


def populate() -> None:
    """Maps every page of this process now, those of files too, so that it does not fault for them later."""
    _check(_libc.mlockall(_MCL_CURRENT))
    _check(_libc.munlockall())


def become_subreaper() -> None:
    """Orphans among the descendants become children of this process (PID 1 is one already)."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def sync_and_power_off() -> None:
    """reboot(RB_POWER_OFF): never returns when it succeeds; data must have been synced before."""
    os.sync()
    _check(int(_libc.syscall(_SYS_REBOOT, 0xFEE1DEAD, 672274793, 0x4321FEDC, None)))
