"""The request that hv-exec reads (csrc/exec/request.c): NUL-terminated ``key=value`` records."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .bundle import NOFILE, environment
from .caps import effective, mask
from .spec import SECCOMP_DEFAULT, User
from .syscalls import CLONE_NEWCGROUP, CLONE_NEWNS, CLONE_NEWPID

if TYPE_CHECKING:
    from .container import Container

NAMESPACES = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWCGROUP
CRUN_STATE = "/run/podvisor/crun"
_RLIMIT_NOFILE = 7


class ExecRequest(NamedTuple):
    """What is to run, and how.

    :ivar terminal: (columns, rows), (0, 0) for a terminal of unknown size; None for pipes
    """

    argv: list[str]
    env: list[str]
    cwd: str
    user: User
    terminal: tuple[int, int] | None


def container_prefix(container: Container) -> bytes:
    """The records that every exec into the running `container` has in common."""
    spec = container.spec
    caps = mask(effective(spec.cap_add, spec.cap_drop, spec.privileged))
    records = [
        f"pidfd={container.pidfd}" if container.pidfd >= 0 else "",
        f"ns={NAMESPACES}",
        f"cgroup={container.cgroup.directory}",
        f"caps={caps:x},{caps:x},{caps:x},0,0",
        f"rlimit={_RLIMIT_NOFILE},{NOFILE[0]},{NOFILE[1]}",
        f"oom={spec.oom_score_adj}",
    ]
    if spec.seccomp == SECCOMP_DEFAULT and not spec.privileged:
        records.append(f"seccomp={CRUN_STATE}/{container.name}/seccomp.bpf")
    if spec.no_new_privileges:
        records.append("nnp=1")
    return "".join(f"{r}\0" for r in records if r).encode()


def encode(prefix: bytes, request: ExecRequest) -> bytes:
    """The whole request."""
    records = [f"uid={request.user.uid}", f"gid={request.user.gid}", f"cwd={request.cwd}"]
    if request.user.groups:
        records.append("groups=" + ",".join(map(str, request.user.groups)))
    if request.terminal is not None:
        records.append("tty={}x{}".format(*request.terminal))
    records += [f"env={v}" for v in environment(request.env, request.user, request.terminal is not None)]
    records += [f"arg={a}" for a in request.argv]
    records.append("")
    return prefix + "\0".join(records).encode("utf-8", "surrogateescape")
