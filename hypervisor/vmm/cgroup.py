"""One interface over the cgroup layouts of hosts: a cgroup per VM with limits, statistics, and an end that is certain.

Layouts (``detect``):

* ``v2``: the unified tree, for root below its top, for an ordinary user below the topmost cgroup delegated to them;
* ``v1``: a tree per controller (also the hybrid layout, whose empty v2 tree is used to kill and to wait);
* ``none``: nothing usable. Everything works, without limits and statistics, and ``reason`` says why.

Every VM's cgroup is ``podvisor/<scope>/<name>``; the scope keeps the hosts (state directories) of one machine apart, so
that a sweep touches only its own leftovers.

Life of a cgroup: ``create`` (limits set while it is empty) -> a process joins itself (``hv-confine --cgroup``) ->
``stats``, ``update`` -> ``remove`` (kill all, wait until it is empty, remove the directories).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import signal
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hypervisor.errors import HostUnfit, InvalidInput, NotFound, ResourceExhausted, Timeout
from hypervisor.vmm.watch import readable

PARENT = "podvisor"
CPU_PERIOD_US = 100_000
_CONTROLLERS = ("cpu", "memory", "pids")
_V1_CONTROLLERS = ("cpu", "cpuacct", "memory", "pids")
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
_RETRY_SECONDS = 0.005


@dataclass(frozen=True, kw_only=True)
class Limits:
    """None: no limit.

    :param memory_bytes: RAM, page cache included
    :param cpu_quota_us: CPU time per 100 ms of wall time; 100000 is one CPU
    :param cpu_weight: share when CPUs are short, 1-10000, default 100
    :param pids: processes and threads
    """

    memory_bytes: int | None = None
    cpu_quota_us: int | None = None
    cpu_weight: int | None = None
    pids: int | None = None

    def __post_init__(self) -> None:
        """Raises InvalidInput for values that the kernel would refuse."""
        _check_range("memory_bytes", self.memory_bytes, 1 << 20, 1 << 62)
        _check_range("cpu_quota_us", self.cpu_quota_us, 1000, 1 << 40)
        _check_range("cpu_weight", self.cpu_weight, 1, 10_000)
        _check_range("pids", self.pids, 1, 1 << 22)


@dataclass(frozen=True)
class CgroupPaths:
    """One VM's cgroup: the directories to join, one per tree. Empty where the host has no usable cgroups."""

    name: str
    directories: tuple[Path, ...] = ()


@dataclass(frozen=True)
class CgroupStats:
    """Figures of one cgroup; None where the host does not count it.

    :param cpu_ns: CPU time used
    :param memory_bytes: memory in use now; ``memory_peak`` the most there was
    :param oom_kills: processes that the kernel killed for exceeding the memory limit
    """

    cpu_ns: int | None = None
    memory_bytes: int | None = None
    memory_peak: int | None = None
    pids: int | None = None
    oom_kills: int | None = None


@dataclass(frozen=True)
class Layout:
    """The trees to use: parent directories of this scope's cgroups.

    :param kind: v2, v1 or none
    :param parents: by controller (v1) or under the key ``unified`` (v2, and hybrid beside v1); without parent and scope
    :param controllers: those that can be limited here
    :param reason: for none (or missing controllers): why, and how to mend it
    """

    kind: str
    parents: dict[str, Path] = field(default_factory=dict)
    controllers: tuple[str, ...] = ()
    reason: str = ""


class Cgroups:
    """The cgroups of one host (state directory). Calls but ``remove`` and ``sweep`` are short and do not wait."""

    def __init__(self, layout: Layout, scope: str) -> None:
        """:param scope: see ``scope_of``"""
        _check_name(scope)
        self.layout = layout
        self.scope = scope

    def create(self, name: str, limits: Limits) -> CgroupPaths:
        """Makes the cgroup with its limits. On failure nothing is left of it.

        Raises InvalidInput (name), ResourceExhausted (the kernel has no more), HostUnfit (it refuses).
        """
        _check_name(name)
        paths = self.paths(name)
        made: list[Path] = []
        try:
            for tree, directory in self._trees(paths):
                self._make(tree, directory)
                made.append(directory)
            self.update(paths, limits)
        except OSError as error:
            _remove_quietly(made)
            raise _explained(error, f"cgroup {name}") from error
        except BaseException:
            _remove_quietly(made)
            raise
        return paths

    def paths(self, name: str) -> CgroupPaths:
        """Where the cgroup of that name is or would be."""
        return CgroupPaths(name, tuple(self._scope_directory(tree) / name for tree in self.layout.parents))

    def update(self, paths: CgroupPaths, limits: Limits) -> None:
        """Changes the limits. Raises HostUnfit when a limit cannot be set; those written before it stay."""
        write = {"v1": _limits_v1, "v2": _limits_v2}.get(self.layout.kind)
        if write is None:
            return
        for setting in write(limits):
            directory = self._directory(paths, setting.controller)
            if directory is not None:
                _apply(directory / setting.file, setting, paths.name)

    def stats(self, paths: CgroupPaths) -> CgroupStats:
        """Figures now. Raises NotFound when the cgroup is gone."""
        if paths.directories and not any(directory.exists() for directory in paths.directories):
            raise NotFound(f"cgroup {paths.name} does not exist")
        if self.layout.kind == "v2":
            return self._stats_v2(paths)
        return self._stats_v1(paths) if self.layout.kind == "v1" else CgroupStats()

    def processes(self, paths: CgroupPaths) -> list[int]:
        """Process ids in it, sorted; in cgroups below it too."""
        found: set[int] = set()
        for directory in paths.directories:
            for file in [directory / "cgroup.procs", *directory.glob("**/cgroup.procs")]:
                found.update(int(line) for line in _read(file).split())
        return sorted(found)

    def kill(self, paths: CgroupPaths) -> None:
        """SIGKILL to every process in it. Returns at once; ``remove`` waits."""
        for directory in paths.directories:
            with contextlib.suppress(OSError):
                (directory / "cgroup.kill").write_text("1")
        for pid in self.processes(paths):
            self._kill_member(paths, pid)

    async def remove(self, paths: CgroupPaths, *, timeout: float = 10.0) -> None:
        """Kills what is in it and removes it. No error when it is gone already.

        Raises Timeout when a process does not end within ``timeout`` seconds (it hangs in the kernel).
        """
        try:
            async with asyncio.timeout(timeout):
                await self._remove(paths)
        except TimeoutError as error:
            left = self.processes(paths)
            raise Timeout(f"cgroup {paths.name} is not empty after {timeout} s; processes left: {left}") from error

    async def sweep(self, in_use: Collection[str], *, timeout: float = 10.0) -> list[str]:
        """Kills and removes every cgroup of this scope whose name is not in ``in_use``. Returns the names removed."""
        found = {entry.name for tree in self.layout.parents for entry in _subdirectories(self._scope_directory(tree))}
        leftovers = sorted(found - frozenset(in_use))
        for name in leftovers:
            await self.remove(self.paths(name), timeout=timeout)
        if not leftovers:
            self._remove_parents()
        return leftovers

    # ---- inside --------------------------------------------------------------------------------------------------

    def _kill_member(self, paths: CgroupPaths, pid: int) -> None:
        """The number may have passed to another process since it was read: the pidfd pins it, then it is read again."""
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            if pid in self.processes(paths):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        finally:
            os.close(fd)

    def _scope_directory(self, tree: str) -> Path:
        return self.layout.parents[tree] / PARENT / self.scope

    def _trees(self, paths: CgroupPaths) -> Iterator[tuple[str, Path]]:
        return zip(self.layout.parents, paths.directories, strict=True)

    def _directory(self, paths: CgroupPaths, controller: str) -> Path | None:
        if controller not in self.layout.controllers:
            return None
        tree = controller if self.layout.kind == "v1" else "unified"
        return dict(self._trees(paths)).get(tree)

    def _make(self, tree: str, directory: Path) -> None:
        """Another host may be removing the empty parents at this moment: then once more."""
        for attempt in range(5):
            try:
                self._make_parents(tree)
                directory.mkdir(exist_ok=True)
                return
            except FileNotFoundError:
                if attempt == 4:
                    raise

    def _make_parents(self, tree: str) -> None:
        directory = self.layout.parents[tree]
        for part in (PARENT, self.scope):
            self._delegate(directory)
            directory = directory / part
            directory.mkdir(exist_ok=True)
        self._delegate(directory)

    def _delegate(self, directory: Path) -> None:
        """v2 only: a cgroup's children have the controllers that it passes on."""
        if self.layout.kind == "v2":
            _pass_on(directory, self.layout.controllers)

    async def _remove(self, paths: CgroupPaths) -> None:
        while True:
            self.kill(paths)
            for pid in self.processes(paths):
                await _wait_exit(pid)
            gone = [_remove_tree(directory) for directory in paths.directories]
            if all(gone):
                break
            # A process that has ended can still hold its cgroup for a moment; v1 tells nobody when it lets go.
            await asyncio.sleep(_RETRY_SECONDS)
        self._remove_parents()

    def _remove_parents(self) -> None:
        for tree in self.layout.parents:
            scope = self._scope_directory(tree)
            _remove_quietly([scope.parent, scope])

    def _stats_v2(self, paths: CgroupPaths) -> CgroupStats:
        directory = paths.directories[0]
        usage_us = _keyed(directory / "cpu.stat").get("usage_usec")
        return CgroupStats(
            cpu_ns=None if usage_us is None else usage_us * 1000,
            memory_bytes=_number(directory / "memory.current"),
            memory_peak=_number(directory / "memory.peak"),
            pids=_number(directory / "pids.current"),
            oom_kills=_keyed(directory / "memory.events").get("oom_kill"),
        )

    def _stats_v1(self, paths: CgroupPaths) -> CgroupStats:
        by_tree = dict(self._trees(paths))

        def number(tree: str, file: str) -> int | None:
            return _number(by_tree[tree] / file) if tree in by_tree else None

        memory = by_tree.get("memory")
        return CgroupStats(
            cpu_ns=number("cpuacct", "cpuacct.usage"),
            memory_bytes=number("memory", "memory.usage_in_bytes"),
            memory_peak=number("memory", "memory.max_usage_in_bytes"),
            pids=number("pids", "pids.current"),
            oom_kills=_keyed(memory / "memory.oom_control").get("oom_kill") if memory else None,
        )


def scope_of(state_directory: Path) -> str:
    """A short stable name of a host's state directory, for ``Cgroups``."""
    return hashlib.sha256(os.fsencode(state_directory.absolute())).hexdigest()[:12]


# ---- which layout this machine has -----------------------------------------------------------------------------------


def detect(*, mountinfo: str | None = None, own: str | None = None) -> Layout:
    """What this process can use.

    :param mountinfo: text of ``/proc/self/mountinfo``, and ``own`` of ``/proc/self/cgroup``; for tests
    """
    mounts = _cgroup_mounts(mountinfo if mountinfo is not None else Path("/proc/self/mountinfo").read_text())
    memberships = _memberships(own if own is not None else Path("/proc/self/cgroup").read_text())
    unified = mounts.get("unified")
    if unified is not None and _available(unified) & set(_CONTROLLERS):
        return _detect_v2(unified, memberships.get("", "/"))
    trees = {name: mounts[name] for name in _V1_CONTROLLERS if name in mounts}
    if trees:
        return _detect_v1(trees, unified)
    return Layout("none", reason="no cgroup file system with cpu, memory or pids controllers is mounted")


def _detect_v1(trees: dict[str, Path], unified: Path | None) -> Layout:
    locked = [str(path) for path in trees.values() if not os.access(path, os.W_OK)]
    if locked:
        return Layout("none", reason=f"cgroup v1 cannot be delegated to ordinary users ({locked[0]}); run as root")
    missing = [name for name in _CONTROLLERS if name not in trees]
    if unified is not None and os.access(unified, os.W_OK):
        trees = {**trees, "unified": unified}
    reason = f"not limited, as this kernel mounts no such controller: {', '.join(missing)}" if missing else ""
    return Layout("v1", trees, tuple(name for name in _CONTROLLERS if name in trees), reason)


def _detect_v2(top: Path, membership: str) -> Layout:
    parent = top if os.access(top / "cgroup.procs", os.W_OK) else _topmost_delegated(top, membership)
    if parent is None:
        return Layout(
            "none",
            reason=f"the cgroup {membership} is not delegated to this user;"
            " start the host with 'systemd-run --user --scope -p Delegate=yes', or as root",
        )
    wanted = tuple(name for name in _CONTROLLERS if name in _available(parent))
    missing = [name for name in _CONTROLLERS if name not in wanted]
    refused = _pass_on(parent, wanted)
    if refused:
        return Layout("none", reason=f"cgroup {parent} does not pass controllers on: {refused}")
    reason = f"not limited, as not delegated: {', '.join(missing)}" if missing else ""
    return Layout("v2", {"unified": parent}, wanted, reason)


def _topmost_delegated(top: Path, membership: str) -> Path | None:
    """Delegation is a run of directories from our own cgroup upwards that we may write: the highest of them."""
    found = None
    directory = top / membership.strip("/")
    while directory.is_relative_to(top) and os.access(directory / "cgroup.procs", os.W_OK):
        if not os.access(directory, os.W_OK):
            break
        found = directory
        directory = directory.parent
    return found


def _cgroup_mounts(mountinfo: str) -> dict[str, Path]:
    """Controller (or ``unified``) -> mount point."""
    mounts: dict[str, Path] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        point = Path(fields[4].replace("\\040", " "))
        if kind[0] == "cgroup2":
            mounts.setdefault("unified", point)
        elif kind[0] == "cgroup":
            for option in kind[2].split(","):
                if option in _V1_CONTROLLERS:
                    mounts.setdefault(option, point)
    return mounts


def _memberships(text: str) -> dict[str, str]:
    """Controllers (empty: v2) -> path of our own cgroup."""
    rows = (line.split(":", 2) for line in text.splitlines())
    return {row[1]: row[2] for row in rows if len(row) == 3}


def _available(directory: Path) -> set[str]:
    return set(_read(directory / "cgroup.controllers").split())


def _pass_on(directory: Path, controllers: Collection[str]) -> str:
    """Returns why the kernel refused, else an empty string."""
    file = directory / "cgroup.subtree_control"
    missing = [name for name in controllers if name not in _read(file).split()]
    if not missing:
        return ""
    try:
        file.write_text(" ".join(f"+{name}" for name in missing))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return "processes live in it directly; move them to a child cgroup first"
        return error.strerror or str(error)
    return ""


# ---- the files -------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One file of a cgroup. ``wanted``: a limit, not the absence of one, which kernels without the file also have."""

    controller: str
    file: str
    value: str
    wanted: bool


def _limits_v2(limits: Limits) -> list[Setting]:
    quota = f"{_or(limits.cpu_quota_us, 'max')} {CPU_PERIOD_US}"
    return [
        Setting("memory", "memory.max", _or(limits.memory_bytes, "max"), limits.memory_bytes is not None),
        Setting("cpu", "cpu.max", quota, limits.cpu_quota_us is not None),
        Setting("cpu", "cpu.weight", _or(limits.cpu_weight, "100"), limits.cpu_weight is not None),
        Setting("pids", "pids.max", _or(limits.pids, "max"), limits.pids is not None),
    ]


def _limits_v1(limits: Limits) -> list[Setting]:
    quota_wanted = limits.cpu_quota_us is not None
    return [
        Setting("memory", "memory.limit_in_bytes", _or(limits.memory_bytes, "-1"), limits.memory_bytes is not None),
        Setting("cpu", "cpu.cfs_period_us", str(CPU_PERIOD_US), quota_wanted),
        Setting("cpu", "cpu.cfs_quota_us", _or(limits.cpu_quota_us, "-1"), quota_wanted),
        Setting("cpu", "cpu.shares", str(_shares(limits.cpu_weight)), limits.cpu_weight is not None),
        Setting("pids", "pids.max", _or(limits.pids, "max"), limits.pids is not None),
    ]


def _apply(path: Path, setting: Setting, name: str) -> None:
    if not setting.wanted and not path.exists():
        return
    try:
        path.write_text(setting.value)
    except OSError as error:
        raise HostUnfit(f"cannot set {setting.file} of cgroup {name} to {setting.value}: {error.strerror}") from error


def _shares(weight: int | None) -> int:
    """v1 counts shares, default 1024 (Kubernetes maps 2..262144 to 1..10000; this is the same line backwards)."""
    return 1024 if weight is None else 2 + (weight - 1) * 262142 // 9999


def _or(value: int | None, default: str) -> str:
    return default if value is None else str(value)


def _read(file: Path) -> str:
    """A cgroup may vanish at any time: then it has nothing to say."""
    try:
        return file.read_text()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    text = _read(file).strip()
    return int(text) if text.isdigit() else None


def _keyed(file: Path) -> dict[str, int]:
    rows = (line.split() for line in _read(file).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def _subdirectories(directory: Path) -> list[Path]:
    try:
        return [entry for entry in directory.iterdir() if entry.is_dir()]
    except OSError:
        return []


def _remove_tree(directory: Path) -> bool:
    """Removes a cgroup and those below it, deepest first. Returns whether it is gone."""
    for child in _subdirectories(directory):
        _remove_tree(child)
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise
    return True


def _remove_quietly(directories: list[Path]) -> None:
    for directory in reversed(directories):
        with contextlib.suppress(OSError):
            directory.rmdir()


async def _wait_exit(pid: int) -> None:
    """Returns when the process has ended, at once when there is none."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await _wait_readable(fd)
    finally:
        os.close(fd)


async def _wait_readable(fd: int) -> None:
    if readable(fd):
        return
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _resolve(ended))
    try:
        await ended
    finally:
        loop.remove_reader(fd)


def _resolve(future: asyncio.Future[None]) -> Callable[[], None]:
    def resolve() -> None:
        if not future.done():
            future.set_result(None)

    return resolve


def _explained(error: OSError, what: str) -> HostUnfit | ResourceExhausted:
    if error.errno in (errno.ENOSPC, errno.EAGAIN, errno.ENOMEM):
        return ResourceExhausted(f"{what}: the kernel has no room for another ({error.strerror})")
    return HostUnfit(f"{what}: {error.strerror} ({error.filename})")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"'{name}' is no cgroup name: lower case letters, digits, '-' and '.', at most 63")


def _check_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise InvalidInput(f"must be from {low} to {high}, not {value}", where=name)
