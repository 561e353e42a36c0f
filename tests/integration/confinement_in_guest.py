"""Runs as PID 1 of a guest with Debian 12's kernel (test_confinement_in_guest.py): what other kernels lack.

Real cgroup v2 with its controllers, and the drill on a kernel whose Landlock is old. Prints ``RESULT {json}`` lines.
"""

import asyncio
import ctypes
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOM = "/usr/lib/podvisor"
libc = ctypes.CDLL(None, use_errno=True)


def say(name, value):
    print("RESULT", json.dumps({name: value}), flush=True)


def mount(kind, where):
    """What init has mounted already may stay."""
    libc.mount(b"none", where.encode(), kind.encode(), 0, b"")


def child_in(paths, work):
    pid = os.fork()
    if pid == 0:
        try:
            for directory in paths.directories:
                (directory / "cgroup.procs").write_text("0")
            work()
        finally:
            os._exit(1)
    return pid


def spin():
    while True:
        pass


def try_cgroups():
    from hypervisor.vmm.cgroup import Cgroups, Limits, detect

    layout = detect()
    say("layout", [layout.kind, *layout.controllers])
    cgroups = Cgroups(layout, "test")
    paths = cgroups.create("oom", Limits(memory_bytes=32 << 20))
    pid = child_in(paths, lambda: bytearray(100 << 20))
    say("oom-status", os.waitpid(pid, 0)[1])
    stats = cgroups.stats(paths)
    say("oom-kills", stats.oom_kills)
    say("peak", stats.memory_peak)
    asyncio.run(cgroups.remove(paths))
    paths = cgroups.create("cpu", Limits(cpu_quota_us=20_000, cpu_weight=50, pids=5))
    pid = child_in(paths, spin)
    time.sleep(2)
    say("cpu-share", cgroups.stats(paths).cpu_ns / 2e9)
    say("members", cgroups.processes(paths) == [pid])
    asyncio.run(cgroups.remove(paths))
    say("kill-status", os.waitpid(pid, 0)[1])
    cgroups.create("left", Limits())
    say("swept", asyncio.run(cgroups.sweep([])))
    asyncio.run(cgroups.sweep([]))
    say("nothing-left", not Path("/sys/fs/cgroup/podvisor").exists())


def lay_state(state, uids):
    for name, uid in zip("ab", uids, strict=True):
        directory = state / "pods" / name / "vm"
        directory.mkdir(parents=True)
        os.chown(directory, uid, uid)
        directory.chmod(0o700)
    (state / "images").mkdir()
    (state / "token").write_text("secret")
    (state / "token").chmod(0o600)


def drill(mode):
    """Both VMs, as test_confinement.py has them; returns the attacker's successes."""
    one_user = mode == "one-user"
    state = Path("/tmp", mode)
    uids = (2001, 2001) if one_user else (2001, 2002)
    lay_state(state, uids)
    os.chown(state / "token", uids[0] if one_user else 0, 0)
    who = {"user": 2001, "group": 2001, "extra_groups": []} if one_user else {}

    def argv(name, uid, filtered, *arguments):
        vm = f"{state}/pods/{name}/vm"
        identity = ["--user-namespace"] if one_user else ["--uid", str(uid), "--gid", str(uid)]
        view = ["--private-root", "--ro", f"{ROOM}/hostile", "--rw", vm, "--chdir", vm, "--rlimit", "core=0"]
        filters = ["--filter"] if filtered else []
        return [f"{ROOM}/hv-confine", *identity, *view, *filters, "--", f"{ROOM}/hostile", *arguments]

    b = f"{state}/pods/b/vm"
    with subprocess.Popen(argv("b", uids[1], False, "victim", b), stdout=subprocess.PIPE, text=True, **who) as victim:
        address = victim.stdout.readline().split()[1]
        arguments = ["attack", str(victim.pid), address, b, str(state), f"{ROOM}/hostile"]
        attack = argv("a", uids[0], mode != "no-filter", *arguments)
        done = subprocess.run(attack, capture_output=True, text=True, **who)
        alive = victim.poll() is None
        victim.kill()
    lines = done.stdout.splitlines()
    return {
        "complete": lines[-1:] == ["done"],
        "attempts": len(lines),
        "alive": alive,
        "reached": [line.split()[0] for line in lines if line.endswith("SUCCESS")],
        "complaint": done.stderr,
    }


def main():
    mount("tmpfs", "/tmp")
    mount("cgroup2", "/sys/fs/cgroup")
    try_cgroups()
    say("landlock", libc.syscall(444, None, 0, 1))
    for mode in ("filter", "no-filter", "one-user"):
        say(f"drill-{mode}", drill(mode))


try:
    sys.path.insert(0, ROOM)
    main()
except BaseException:
    traceback.print_exc()
os.sync()
libc.reboot(0x1234567)
