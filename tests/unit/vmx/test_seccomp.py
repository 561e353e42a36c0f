"""The filter, tried in processes of their own: what a vmx does works, the rest is EPERM."""

from __future__ import annotations

import platform
import struct
import subprocess
import sys
import textwrap

import pytest

from hypervisor.errors import HostUnfit
from hypervisor.vmx import seccomp


def confined(code: str) -> str:
    """Runs the code under the filter and returns what it prints."""
    program = "import os, socket, threading, time, ctypes\nfrom hypervisor.vmx import seccomp\nseccomp.install()\n"
    done = subprocess.run(
        [sys.executable, "-c", program + textwrap.dedent(code)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "os.execv('/bin/true', ['true'])",
        "os.fork()",
        "socket.socket(socket.AF_INET)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "os.chroot('/')",
        "os.mkdir('/tmp/hvt-seccomp')",
        "os.rename('/nothing', '/nowhere')",
        "os.kill(os.getppid(), 0)",
        "os.symlink('a', '/tmp/hvt-seccomp')",
        "os.setuid(0)",
        "os.pidfd_open(os.getpid())",
    ],
)
def test_what_a_vmx_never_does_is_denied(code: str) -> None:
    attempt = f"""
        try:
            {code}
            print("done")
        except PermissionError:
            print("denied")
    """
    assert confined(attempt) == "denied"


def test_ptrace_and_mount_are_denied() -> None:
    ptrace, mount = {"x86_64": (101, 165), "aarch64": (117, 40)}[platform.machine()]
    code = f"""
        libc = ctypes.CDLL(None, use_errno=True)
        for number in ({ptrace}, {mount}):
            print(libc.syscall(number, 0, 0, 0, 0, 0), ctypes.get_errno(), end=" ")
    """
    assert confined(code) == "-1 1 -1 1"


def test_no_ring_of_io_uring_can_be_made_later() -> None:
    code = """
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.syscall(425, 8, bytes(120)), ctypes.get_errno())
    """
    assert confined(code) == "-1 1"


def test_what_a_vmx_does_works() -> None:
    code = """
        a, b = socket.socketpair()
        a.send(b"x"); b.recv(1)
        socket.socket(socket.AF_UNIX).close()
        thread = threading.Thread(target=lambda: time.sleep(0.01)); thread.start(); thread.join()
        with open("/dev/null", "wb") as f: f.write(b"x")
        print(len(bytearray(32 << 20)))
    """
    assert confined(code) == str(32 << 20)


def test_every_thread_is_under_it() -> None:
    program = """
import threading, os
from hypervisor.vmx import seccomp
go, result = threading.Event(), []
def work():
    go.wait()
    try:
        os.fork()
    except PermissionError:
        result.append("denied")
thread = threading.Thread(target=work); thread.start()
seccomp.install(); go.set(); thread.join(); print(*result)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "denied", done.stderr


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_programs_are_well_formed(machine: str) -> None:
    """Whole instructions, jumps within the program, and every path ends in a return."""
    code = seccomp.program(machine)
    assert len(code) % 8 == 0
    ops = list(struct.iter_unpack("=HBBI", code))
    assert len(ops) < 4096
    for at, (kind, if_true, if_false, _) in enumerate(ops):
        if kind & 7 == 5:
            assert at + 1 + max(if_true, if_false) < len(ops)
    assert ops[-1][0] == 6


def test_an_architecture_without_table_is_refused() -> None:
    with pytest.raises(HostUnfit, match="m68k"):
        seccomp.program("m68k")
