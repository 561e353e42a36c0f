"""The packed seccomp profile in force: libseccomp takes it, and the kernel refuses vsock and nothing that is needed.

A child process puts itself under the profile as crun puts a container, then tries.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builder import debs, packages, seccomp

from hypervisor.agent.seccomp import resolve

CHILD = """
import ctypes, errno, json, socket, sys, threading

profile = json.load(sys.stdin)
lib = ctypes.CDLL("libseccomp.so.2")
lib.seccomp_init.restype = ctypes.c_void_p
OPS = {"NE": 1, "LT": 2, "LE": 3, "EQ": 4, "GE": 5, "GT": 6, "MASKED_EQ": 7}

class Compare(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]

def action(name, code):
    return {"SCMP_ACT_ALLOW": 0x7FFF0000, "SCMP_ACT_ERRNO": 0x00050000 | (1 if code is None else code)}[name]

context = ctypes.c_void_p(lib.seccomp_init(action(profile["defaultAction"], profile["defaultErrnoRet"])))
for name in profile["architectures"]:
    number = lib.seccomp_arch_resolve_name(name.removeprefix("SCMP_ARCH_").lower().encode())
    assert number and lib.seccomp_arch_add(context, number) in (0, -errno.EEXIST), name
for rule in profile["syscalls"]:
    rows = rule.get("args") or []
    compares = (Compare * len(rows))(
        *(Compare(r["index"], OPS[r["op"].removeprefix("SCMP_CMP_")], r["value"], r["valueTwo"]) for r in rows)
    )
    for name in rule["names"]:
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if number != -1:
            code = action(rule["action"], rule.get("errnoRet"))
            done = lib.seccomp_rule_add_array(context, ctypes.c_uint32(code), number, len(rows), compares)
            assert done == 0, (name, rows, done)
assert lib.seccomp_load(context) == 0

libc = ctypes.CDLL(None, use_errno=True)

def attempt(call):
    try:
        call()
        return 0
    except OSError as e:
        return e.errno

def io_uring_setup():
    if libc.syscall(425, 1, ctypes.create_string_buffer(120)) < 0:
        raise OSError(ctypes.get_errno(), "")

thread = threading.Thread(target=lambda: None)
thread.start()
thread.join()
print(json.dumps({
    "vsock": attempt(lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)),
    "inet": attempt(socket.socket),
    "inet6": attempt(lambda: socket.socket(socket.AF_INET6)),
    "unix": attempt(lambda: socket.socket(socket.AF_UNIX)),
    "netlink": attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)),
    "audit": attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9)),
    "io_uring": attempt(io_uring_setup),
}))
"""


@pytest.fixture(scope="module")
def profile(cache: Path) -> dict[str, Any]:
    """Debian's profile, narrowed as the build does it."""
    name = "golang-github-containers-common"
    deb = debs.resolve(packages.ROOT_PACKAGES, cache)[name]
    debs.fetch([deb], cache)
    folder = debs.unpack(deb, cache)
    return seccomp.narrow(json.loads((folder / "usr/share/containers/seccomp.json").read_text()))


@pytest.mark.parametrize("capabilities", [[], ["CAP_AUDIT_WRITE", "CAP_SYS_CHROOT"], ["CAP_SYS_ADMIN"]])
def test_vsock_is_refused_and_the_rest_works(profile: dict[str, Any], capabilities: list[str]) -> None:
    request = json.dumps(resolve(profile, capabilities))
    done = subprocess.run([sys.executable, "-c", CHILD], input=request, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer.pop("vsock") != 0
    assert answer.pop("io_uring") != 0
    assert (answer.pop("audit") == 0) is ("CAP_AUDIT_WRITE" in capabilities)
    assert set(answer.values()) == {0}, answer
