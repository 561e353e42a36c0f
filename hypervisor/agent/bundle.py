"""crun's config.json for a container: a pure function, so that it can be tested without a guest.

The VM is the pod's sandbox. Containers therefore share its network, IPC and UTS namespaces; each has mount and cgroup
namespaces of its own, and a PID namespace of its own unless the pod shares one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .caps import effective
from .devices import HARMLESS
from .seccomp import Filter
from .spec import ContainerSpec, User

NOFILE = (1024, 524288)

MASKED_PATHS = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
]
READONLY_PATHS = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]

# Docker's device rules: nothing but the harmless ones, and mknod(2) of any without opening it.
_DEVICES = [
    {"allow": False, "access": "rwm"},
    {"allow": True, "type": "c", "access": "m"},
    {"allow": True, "type": "b", "access": "m"},
    *(
        {"allow": True, "type": "c", "major": major, "minor": minor, "access": "rwm"}
        for major, minor in HARMLESS
        if minor is not None
    ),
    *({"allow": True, "type": "c", "major": major, "access": "rwm"} for major, minor in HARMLESS if minor is None),
]


class Bind(NamedTuple):
    """A file or directory of the guest at `target` in the container."""

    source: str
    target: str
    read_only: bool


class Context(NamedTuple):
    """What the guest adds to a spec.

    :ivar pid_namespace: path of the shared PID namespace; None for one of the container's own
    :ivar devices_confined: what a container without privileges may open is seen to already (devices.py)
    """

    rootfs: str
    cgroup: str
    user: User
    binds: list[Bind]
    seccomp: Filter | None
    pid_namespace: str | None = None
    devices_confined: bool = False


def environment(env: list[str], user: User, tty: bool) -> list[str]:
    """`env` with HOME, PATH and, for a terminal, TERM where they are missing; of doubled names the last one counts."""
    last = {variable.partition("=")[0]: variable for variable in env}
    last.setdefault("PATH", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    last.setdefault("HOME", f"HOME={user.home or '/'}")
    if tty:
        last.setdefault("TERM", "TERM=xterm")
    return list(last.values())


def config(spec: ContainerSpec, context: Context) -> dict[str, Any]:
    """The whole config.json."""
    found = {
        "ociVersion": "1.0.2",
        "root": {"path": context.rootfs, "readonly": spec.read_only_root},
        "process": _process(spec, context),
        "mounts": _mounts(spec, context),
        "linux": _linux(spec, context),
    }
    if context.seccomp is not None and context.seccomp.compiled is not None:
        found["annotations"] = {"run.oci.seccomp_bpf_data": context.seccomp.compiled}
    return found


def _process(spec: ContainerSpec, context: Context) -> dict[str, Any]:
    capabilities = effective(spec.cap_add, spec.cap_drop, spec.privileged)
    user = context.user
    process: dict[str, Any] = {
        "terminal": spec.tty,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        "args": spec.argv,
        "env": environment(spec.env, user, spec.tty),
        "cwd": spec.cwd,
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        "noNewPrivileges": spec.no_new_privileges,
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": NOFILE[0], "hard": NOFILE[1]}],
    }
    if spec.oom_score_adj:
        process["oomScoreAdj"] = spec.oom_score_adj
    return process


def _mounts(spec: ContainerSpec, context: Context) -> list[dict[str, Any]]:
    system = "rw" if spec.privileged else "ro"
    quiet = ["nosuid", "noexec", "nodev"]
    mounts = [
        _mount("proc", "proc", "/proc", quiet),
        _mount("tmpfs", "tmpfs", "/dev", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount(
            "devpts", "devpts", "/dev/pts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
        ),
        _mount("mqueue", "mqueue", "/dev/mqueue", quiet),
        _mount("sysfs", "sysfs", "/sys", [*quiet, system]),
        _mount("cgroup", "cgroup", "/sys/fs/cgroup", [*quiet, "relatime", system]),
    ]
    return mounts + [_bind(b) for b in sorted(context.binds, key=lambda b: b.target.rstrip("/").count("/"))]


def _mount(kind: str, source: str, target: str, options: list[str]) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": options}


def _bind(bind: Bind) -> dict[str, Any]:
    options = ["rbind", "rprivate", "nosuid", "nodev", "ro" if bind.read_only else "rw"]
    return _mount("bind", bind.source, bind.target, options)


def _linux(spec: ContainerSpec, context: Context) -> dict[str, Any]:
    pid: dict[str, Any] = {"type": "pid"}
    if context.pid_namespace:
        pid["path"] = context.pid_namespace
    linux: dict[str, Any] = {
        "namespaces": [pid, {"type": "mount"}, {"type": "cgroup"}],
        "cgroupsPath": context.cgroup,
        "resources": resources(spec),
    }
    if context.devices_confined and not spec.privileged:
        del linux["resources"]["devices"]
    if context.seccomp is not None:
        linux["seccomp"] = context.seccomp.profile
    if not spec.privileged:
        linux["maskedPaths"] = MASKED_PATHS
        linux["readonlyPaths"] = READONLY_PATHS
    return linux


def resources(spec: ContainerSpec) -> dict[str, Any]:
    """OCI resources: a container that runs out of memory dies as a whole (memory.oom.group), as Kubernetes has it."""
    wanted = spec.resources
    found: dict[str, Any] = {
        "devices": [{"allow": True, "access": "rwm"}] if spec.privileged else _DEVICES,
        "unified": {"memory.oom.group": "1"},
    }
    if wanted.memory_bytes is not None:
        found["memory"] = {"limit": wanted.memory_bytes, "swap": wanted.memory_bytes}
    cpu: dict[str, int] = {}
    if wanted.cpu_quota_us is not None:
        cpu = {"quota": wanted.cpu_quota_us, "period": 100_000}
    if wanted.cpu_shares is not None:
        cpu["shares"] = wanted.cpu_shares
    if cpu:
        found["cpu"] = cpu
    if wanted.pids is not None:
        found["pids"] = {"limit": wanted.pids}
    return found
