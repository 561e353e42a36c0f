"""The system calls that a running vmx may make: an allow list, everything else fails with EPERM.

A small assembler for classic BPF, so that no library beside the C library is needed. EPERM and not a kill: a call
that a newer C library or Python makes and can do without must not take a VM down; what is denied is denied either way.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass

from hypervisor.errors import HostUnfit

_BPF_LD_W_ABS = 0x20
_BPF_JEQ_K = 0x15
_BPF_JSET_K = 0x45
_BPF_RET_K = 0x06
_RET_ALLOW = 0x7FFF0000
_RET_EPERM = 0x00050000 | errno.EPERM
_RET_ENOSYS = 0x00050000 | errno.ENOSYS
_RET_KILL = 0x80000000
_OFFSET_NR, _OFFSET_ARCH, _OFFSET_ARG0 = 0, 4, 16
_AF_UNIX = 1
_CLONE_THREAD = 0x00010000
_X32_BIT = 0x40000000
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1
_PR_SET_NO_NEW_PRIVS = 38

# name: number on (x86_64, aarch64); -1: that architecture has no such call.
CALLS: dict[str, tuple[int, int]] = {
    # descriptors and data
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "lseek": (8, 62),
    "close": (3, 57),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "dup": (32, 23),
    "fstat": (5, 80),
    "fstatfs": (138, 44),
    "newfstatat": (262, 79),
    "ftruncate": (77, 46),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "fallocate": (285, 47),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    # the ring itself is made before the filter is installed
    "io_uring_enter": (426, 426),
    "flock": (73, 32),
    "eventfd2": (290, 19),
    # sockets (socket itself only AF_UNIX, see below)
    "socketpair": (53, 199),
    "connect": (42, 203),
    "accept": (43, 202),
    "accept4": (288, 242),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "shutdown": (48, 210),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    "setsockopt": (54, 208),
    "getsockopt": (55, 209),
    # waiting
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, -1),
    "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441),
    "poll": (7, -1),
    "ppoll": (271, 73),
    "select": (23, -1),
    "pselect6": (270, 72),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "gettimeofday": (96, 169),
    # memory
    "mmap": (9, 222),
    "munmap": (11, 215),
    "memfd_create": (319, 279),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    # threads and the process itself
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "gettid": (186, 178),
    "getpid": (39, 172),
    "getrandom": (318, 278),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "tgkill": (234, 131),
    "exit": (60, 93),
    "exit_group": (231, 94),
    # its own socket files and log, at the end
    "unlink": (87, -1),
    "unlinkat": (263, 35),
    "openat": (257, 56),
    "getdents64": (217, 61),
}
_SOCKET = (41, 198)
_SETAFFINITY = (203, 122)
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_ARCHES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


@dataclass(frozen=True)
class _Op:
    """One BPF instruction; jumps are counted from the next one."""

    code: int
    k: int
    jt: int = 0
    jf: int = 0

    def pack(self) -> bytes:
        return struct.pack("=HBBI", self.code, self.jt, self.jf, self.k)


def _if_call(number: int, then: list[_Op]) -> list[_Op]:
    """``then`` if the number just loaded is this one. ``then`` must not fall through, but for its last load."""
    return [_Op(_BPF_JEQ_K, number, 0, len(then)), *then]


def program(machine: str) -> bytes:
    """The filter for an architecture as ``uname -m`` names it. Raises `HostUnfit` for one that has no table here."""
    if machine not in _ARCHES:
        raise HostUnfit(f"there is no seccomp filter for {machine}; known: {', '.join(_ARCHES)}")
    column, audit_arch = _ARCHES[machine]
    allow, deny = _Op(_BPF_RET_K, _RET_ALLOW), _Op(_BPF_RET_K, _RET_EPERM)
    ops = [
        _Op(_BPF_LD_W_ABS, _OFFSET_ARCH),
        _Op(_BPF_JEQ_K, audit_arch, 1, 0),
        _Op(_BPF_RET_K, _RET_KILL),
        _Op(_BPF_LD_W_ABS, _OFFSET_NR),
        _Op(_BPF_JSET_K, _X32_BIT, 0, 1),
        _Op(_BPF_RET_K, _RET_KILL),
    ]
    arg0 = _Op(_BPF_LD_W_ABS, _OFFSET_ARG0)
    ops += _if_call(_SOCKET[column], [arg0, _Op(_BPF_JEQ_K, _AF_UNIX, 0, 1), allow, deny])
    ops += _if_call(_CLONE[column], [arg0, _Op(_BPF_JSET_K, _CLONE_THREAD, 0, 1), allow, deny])
    # only the calling thread's own: the one that serves faults moves to the CPU that faults
    ops += _if_call(_SETAFFINITY[column], [arg0, _Op(_BPF_JEQ_K, 0, 0, 1), allow, deny])
    # clone3 hides its flags behind a pointer: with ENOSYS the C library takes clone.
    ops += _if_call(_CLONE3[column], [_Op(_BPF_RET_K, _RET_ENOSYS)])
    for numbers in CALLS.values():
        if numbers[column] >= 0:
            ops += _if_call(numbers[column], [allow])
    return b"".join(op.pack() for op in [*ops, deny])


def install(machine: str | None = None) -> None:
    """Puts every thread of this process under the filter, for ever. Raises `HostUnfit` if the kernel will not."""
    code = program(machine or platform.machine())
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    number = {"x86_64": 317, "aarch64": 277}[machine or platform.machine()]
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise HostUnfit(f"no_new_privs cannot be set: {os.strerror(ctypes.get_errno())}")
    if libc.syscall(number, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, fprog):
        raise HostUnfit(f"the seccomp filter cannot be installed: {os.strerror(ctypes.get_errno())}")
