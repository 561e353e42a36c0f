"""How a VM's process is confined: a value that can be printed and tested, and the argv that makes it so.

The work is done by ``hv-confine`` (``csrc/confine``), which is put before the program's own argv.
See ``docs/confinement.md``.

Three strengths, by what the host allows (``host_support``):

* root: a user of its own per VM, a private root, no capabilities, seccomp filter, Landlock domain, cgroup;
* an ordinary user with user namespaces: the same but for the user, who is the caller;
* an ordinary user without: no private root; no new privileges, seccomp filter and Landlock domain remain.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypervisor.errors import HostUnfit, InvalidInput

LIBEXEC = Path(__file__).resolve().parent.parent / "libexec"

EXIT_NOT_CONFINED = 125
"""Exit code of ``hv-confine`` when it could not confine; the program has not run then."""

_DEVICES = frozenset({"kvm", "vhost-vsock", "net/tun", "userfaultfd"})
_RLIMITS = frozenset({"as", "core", "cpu", "data", "fsize", "memlock", "nofile", "nproc", "stack"})
_SUPPORT_TIMEOUT = 5.0
_NOBODY = 65534


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """What is left to a VM's process.

    :param uid: user to become, ``gid`` group; both or neither. Root must name one
    :param cgroups: directories to join
    :param private_root: a root that holds only the binds and devices below, and IPC and UTS namespaces of its own
    :param user_namespace: make namespaces as an ordinary user
    :param ro_binds: files and directories to show read-only at the same path; ``rw_binds`` writable
    :param devices: names below ``/dev`` beside null, zero, urandom: kvm, vhost-vsock, net/tun, userfaultfd
    :param new_network: a network namespace with nothing in it
    :param filter: the launcher's seccomp filter
    :param rlimits: (name, soft and hard value); a value above the present hard limit leaves that
    :param keep_fds: descriptors that stay open beside 0-2
    :param stdin: descriptor to use as 0; likewise ``stdout`` and ``stderr``; None: as inherited
    :param directory: working directory as the program sees it
    :param environment: all of the program's environment
    """

    uid: int | None = None
    gid: int | None = None
    cgroups: tuple[Path, ...] = ()
    private_root: bool = True
    user_namespace: bool = False
    ro_binds: tuple[Path, ...] = ()
    rw_binds: tuple[Path, ...] = ()
    devices: tuple[str, ...] = ()
    new_network: bool = False
    filter: bool = True
    rlimits: tuple[tuple[str, int], ...] = (("core", 0),)
    oom_score_adj: int | None = None
    keep_fds: tuple[int, ...] = ()
    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    directory: Path = Path("/")
    environment: tuple[tuple[str, str], ...] = (("PATH", "/usr/bin:/bin"), ("LANG", "C.UTF-8"))

    def __post_init__(self) -> None:
        """Raises InvalidInput for what ``hv-confine`` would refuse."""
        if (self.uid is None) != (self.gid is None):
            raise InvalidInput("uid and gid belong together", where="confinement")
        if self.uid == 0 or self.gid == 0:
            raise InvalidInput("a VM never runs as root", where="confinement.uid")
        if self.user_namespace and self.uid is not None:
            raise InvalidInput("a user namespace keeps the caller's user; leave uid out", where="confinement.uid")
        if not self.private_root and (self.ro_binds or self.rw_binds or self.devices):
            raise InvalidInput("binds and devices need a private root", where="confinement.private_root")
        _check_known("confinement.devices", self.devices, _DEVICES)
        _check_known("confinement.rlimits", [name for name, _ in self.rlimits], _RLIMITS)
        for path in (*self.ro_binds, *self.rw_binds, *self.cgroups, self.directory):
            if not path.is_absolute() or ".." in path.parts:
                raise InvalidInput(f"must be an absolute path without '..': {path}", where="confinement")


@dataclass(frozen=True)
class ConfinementSupport:
    """What this host lets this user confine with.

    :param private_root: a private root can be made
    :param user_namespace: ... but only in a user namespace
    :param own_user: VMs can have users of their own
    :param reason: why not all of it; empty when all
    """

    private_root: bool
    user_namespace: bool
    own_user: bool
    reason: str = ""


def confined_argv(confinement: Confinement, argv: Sequence[str]) -> list[str]:
    """The argv that runs ``argv`` confined. ``argv[0]`` must be an absolute path that the confined process sees."""
    return [str(launcher()), *_options(confinement), "--", *argv]


def launcher() -> Path:
    """Path of ``hv-confine``. Raises HostUnfit when it was not built."""
    path = LIBEXEC / "hv-confine"
    if not os.access(path, os.X_OK):
        raise HostUnfit(f"{path} is missing: build it with 'make native'")
    return path


def qemu_view(qemu: Path) -> tuple[Path, ...]:
    """What a QEMU binary needs to see read-only, of what exists here: itself, its libraries, modules and firmware.

    Its disks, kernel and initrd come on top. ``/etc/resolv.conf`` is for its user-mode network's name service.
    """
    multiarch = f"{os.uname().machine}-linux-gnu"
    wanted = [
        qemu,
        Path("/usr/lib", multiarch),
        Path("/lib", multiarch),
        Path("/usr/lib64"),
        Path("/lib64"),
        Path("/etc/ld.so.cache"),
        Path("/etc/ld.so.conf"),
        Path("/etc/resolv.conf"),
        *(Path("/usr/share", name) for name in ("qemu", "seabios", "qemu-efi-aarch64", "AAVMF")),
        Path("/usr/lib/ipxe/qemu"),
    ]
    return tuple(_outermost(path for path in wanted if path.exists()))


async def host_support() -> ConfinementSupport:
    """Finds out by doing it: runs ``hv-confine`` with a private root around itself. Costs a few milliseconds."""
    own_user = os.geteuid() == 0
    uid = _NOBODY if own_user else None
    trial = Confinement(uid=uid, gid=uid, user_namespace=not own_user, ro_binds=(launcher(),))
    reason = await _try(trial)
    if reason:
        return ConfinementSupport(False, False, own_user, f"no private root: {reason}")
    return ConfinementSupport(True, not own_user, own_user, "" if own_user else _ONE_USER)


_ONE_USER = "not root: all VMs run as the calling user, kept apart by their private roots and by Landlock"


async def _try(confinement: Confinement) -> str:
    """Runs a program that does nothing. Returns what went wrong, else an empty string."""
    argv = confined_argv(confinement, [str(launcher()), "--help"])
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(_SUPPORT_TIMEOUT):
            _, complaint = await process.communicate()
    except TimeoutError:
        return f"no answer within {_SUPPORT_TIMEOUT:.0f} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == 0:
        return ""
    return complaint.decode(errors="replace").strip() or f"exit code {process.returncode}"


def _options(c: Confinement) -> list[str]:
    options: list[str] = []

    def add(name: str, values: Iterable[object]) -> None:
        for value in values:
            options.extend((name, str(value)))

    add("--uid", _present(c.uid))
    add("--gid", _present(c.gid))
    add("--cgroup", c.cgroups)
    add("--rlimit", (f"{name}={value}" for name, value in c.rlimits))
    add("--oom-score-adj", _present(c.oom_score_adj))
    options += [name for name, wanted in _flags(c) if wanted]
    for path in _parents_first((*c.ro_binds, *c.rw_binds)):
        add("--rw" if path in c.rw_binds else "--ro", [path])
    add("--dev", c.devices)
    add("--stdin", _present(c.stdin))
    add("--stdout", _present(c.stdout))
    add("--stderr", _present(c.stderr))
    add("--keep-fd", c.keep_fds)
    add("--chdir", [c.directory])
    add("--env", (f"{name}={value}" for name, value in c.environment))
    return options


def _flags(c: Confinement) -> list[tuple[str, bool]]:
    return [
        ("--private-root", c.private_root),
        ("--user-namespace", c.user_namespace),
        ("--new-network", c.new_network),
        ("--filter", c.filter),
    ]


def _present(value: int | None) -> list[int]:
    return [] if value is None else [value]


def _parents_first(paths: Iterable[Path]) -> list[Path]:
    """A mount at ``/a`` after one at ``/a/b`` would hide it."""
    return sorted(set(paths), key=lambda path: path.parts)


def _outermost(paths: Iterable[Path]) -> list[Path]:
    kept: list[Path] = []
    for path in _parents_first(paths):
        if not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return kept


def _check_known(where: str, names: Iterable[str], known: frozenset[str]) -> None:
    for name in names:
        if name not in known:
            raise InvalidInput(f"'{name}' is none of {', '.join(sorted(known))}", where=where)
