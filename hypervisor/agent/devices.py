"""Which devices containers may open: an eBPF program on the control group that all of them but privileged ones are in.

crun would compile, load and attach the same program for each container, which is 30 ms of a container's start in a
clone under TCG: loading goes through verifier and compiler, and the first and last program of a system patch the
kernel's code. On the group above it is loaded once, in a template before that is taken, and holds for every container
from its first moment.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

from . import syscalls
from .cgroup import PARENT, ROOT

_PROG_LOAD, _PROG_ATTACH = 5, 8
_CGROUP_DEVICE_PROGRAM, _CGROUP_DEVICE_HOOK = 15, 6
_ALLOW_MULTI = 2
_MKNOD, _CHAR = 1, 2  # BPF_DEVCG_ACC_MKNOD, BPF_DEVCG_DEV_CHAR
_LOAD, _MOVE, _AND, _SHIFT, _JEQ, _JNE, _SET, _EXIT = 0x61, 0xBF, 0x57, 0x77, 0x15, 0x55, 0xB7, 0x95

#: major and minor (None: all) of the character devices that may be read, written and made: null, zero, full, random,
#: urandom, tty, ptmx, and terminals; as docker has it
HARMLESS = ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (136, None))


def program(allowed: tuple[tuple[int, int | None], ...] = HARMLESS) -> bytes:
    """A program of the kernel's cgroup device hook: making any node is allowed, opening only what is in the list.

    r1 points to struct bpf_cgroup_dev_ctx: access << 16 | type, major, minor. The result is 1 for allowed.
    """
    checks: list[tuple[int, int, int, int | None, int]] = [(_JEQ, 2, 0, 0, _MKNOD)]  # nothing but mknod is asked for
    checks += [(_JNE, 5, 0, None, _CHAR)]
    for major, minor in allowed:
        if minor is None:
            checks += [(_JEQ, 3, 0, 0, major)]
        else:
            checks += [(_JNE, 3, 0, 1, major), (_JEQ, 4, 0, 0, minor)]
    head = [(_LOAD, 2, 1, 0, 0), (_LOAD, 3, 1, 4, 0), (_LOAD, 4, 1, 8, 0)]
    head += [(_MOVE, 5, 2, 0, 0), (_AND, 5, 0, 0, 0xFFFF), (_SHIFT, 2, 0, 0, 16)]
    tail = [(_SET, 0, 0, 0, 0), (_EXIT, 0, 0, 0, 0), (_SET, 0, 0, 0, 1), (_EXIT, 0, 0, 0, 0)]
    code = []
    for i, (operation, register, source, skip, value) in enumerate(checks):
        deny = len(checks) - i - 1
        allow = deny + 2
        jump = deny if skip is None else allow if operation == _JEQ else skip
        code.append((operation, register, source, jump, value))
    return b"".join(struct.pack("<BBhi", op, dst | src << 4, off, imm) for op, dst, src, off, imm in head + code + tail)


def confine() -> bool:
    """Makes the group of all containers and attaches the program; False, and a line on the console, when it cannot."""
    try:
        os.makedirs(ROOT + PARENT, exist_ok=True)
        group = os.open(ROOT + PARENT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            loaded = _load(program())
            try:
                syscalls.bpf(_PROG_ATTACH, struct.pack("IIII", group, loaded, _CGROUP_DEVICE_HOOK, _ALLOW_MULTI))
            finally:
                os.close(loaded)
        finally:
            os.close(group)
    except OSError as e:
        sys.stderr.write(f"agent: devices of containers: crun confines each by itself: {e}\n")
        return False
    return True


def _load(code: bytes) -> int:
    instructions = ctypes.create_string_buffer(code, len(code))
    terms = ctypes.create_string_buffer(b"none")  # it calls no helper of the kernel
    addresses = ctypes.addressof(instructions), ctypes.addressof(terms)
    return syscalls.bpf(_PROG_LOAD, struct.pack("IIQQ24x", _CGROUP_DEVICE_PROGRAM, len(code) // 8, *addresses))
