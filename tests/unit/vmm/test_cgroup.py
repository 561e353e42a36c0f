"""`hypervisor.vmm.cgroup` on this machine's real cgroups; on texts and a fake tree for other layouts."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from hypervisor.errors import HostUnfit, InvalidInput, NotFound
from hypervisor.vmm import cgroup
from hypervisor.vmm.cgroup import CgroupPaths, Cgroups, Layout, Limits, detect, scope_of

MIB = 1 << 20
JOIN = 'for d in "$@"; do echo 0 > "$d/cgroup.procs"; done; '


@pytest.fixture
async def cgroups(tmp_path: Path) -> AsyncIterator[Cgroups]:
    """This host's, in a scope of this test; all gone at the end."""
    layout = detect()
    if layout.kind == "none":
        pytest.skip(f"needs usable cgroups: {layout.reason}")
    it = Cgroups(layout, scope_of(tmp_path))
    yield it
    await it.sweep([])
    await it.sweep([])
    assert not any(it._scope_directory(tree).exists() for tree in layout.parents)


def joined(paths: CgroupPaths, script: str) -> subprocess.Popen[str]:
    """A shell that joins the cgroup, says so, and goes on with the script."""
    return subprocess.Popen(
        ["/bin/sh", "-c", JOIN + "echo in; " + script, "sh", *map(str, paths.directories)],
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_joined(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"


@pytest.mark.root
async def test_life_of_a_cgroup(cgroups: Cgroups) -> None:
    paths = cgroups.create("vm-1", Limits(memory_bytes=64 * MIB, cpu_quota_us=50_000, cpu_weight=200, pids=50))
    with joined(paths, "sleep 1000 & sleep 1000") as process:
        wait_joined(process)
        assert process.pid in cgroups.processes(paths)
        stats = cgroups.stats(paths)
        assert stats.cpu_ns and stats.memory_bytes and stats.pids
        await cgroups.remove(paths)
        assert process.wait(1) == -9
    assert not any(directory.exists() for directory in paths.directories)
    with pytest.raises(NotFound):
        cgroups.stats(paths)
    await cgroups.remove(paths)


@pytest.mark.root
async def test_memory_limit_kills_only_what_is_inside(cgroups: Cgroups) -> None:
    paths = cgroups.create("vm-oom", Limits(memory_bytes=32 * MIB))
    eat = f"exec {sys.executable} -c 'x = bytearray(200 << 20); print(len(x))'"
    with joined(paths, eat) as process:
        assert process.wait(20) == -9
    assert (cgroups.stats(paths).oom_kills or 0) >= 1
    assert (cgroups.stats(paths).memory_peak or 0) <= 33 * MIB


@pytest.mark.root
async def test_pids_limit(cgroups: Cgroups) -> None:
    paths = cgroups.create("vm-pids", Limits(pids=3))
    with joined(paths, "sleep 1000 & sleep 1000 & sleep 1000 & wait") as process:
        wait_joined(process)
        assert process.wait(20) != 0  # the third fork was refused
    assert (cgroups.stats(paths).pids or 0) <= 3


@pytest.mark.root
async def test_limits_can_be_changed(cgroups: Cgroups) -> None:
    paths = cgroups.create("vm-2", Limits(pids=10))
    cgroups.update(paths, Limits(pids=20))
    assert {(d / "pids.max").read_text() for d in paths.directories if (d / "pids.max").exists()} == {"20\n"}
    cgroups.update(paths, Limits())
    assert {(d / "pids.max").read_text() for d in paths.directories if (d / "pids.max").exists()} == {"max\n"}


@pytest.mark.root
async def test_sweep_takes_only_leftovers_of_its_scope(cgroups: Cgroups, tmp_path: Path) -> None:
    other = Cgroups(cgroups.layout, scope_of(tmp_path / "other"))
    kept, left, foreign = (
        cgroups.create("kept", Limits()),
        cgroups.create("left", Limits()),
        other.create("left", Limits()),
    )
    with joined(left, "sleep 1000") as process:
        wait_joined(process)
        assert await cgroups.sweep(["kept"]) == ["left"]
        assert process.wait(1) == -9
    assert all(directory.exists() for directory in (*kept.directories, *foreign.directories))
    assert await other.sweep([]) == ["left"]


@pytest.mark.root
async def test_cgroups_made_inside_are_removed_too(cgroups: Cgroups) -> None:
    paths = cgroups.create("vm-3", Limits())
    for directory in paths.directories:
        (directory / "inner/most").mkdir(parents=True)
    await cgroups.remove(paths)
    assert not any(directory.exists() for directory in paths.directories)


@pytest.mark.root
async def test_failed_create_leaves_nothing(cgroups: Cgroups, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise HostUnfit("refused")

    monkeypatch.setattr(cgroups, "update", refuse)
    with pytest.raises(HostUnfit):
        cgroups.create("vm-4", Limits())
    assert not any(directory.exists() for directory in cgroups.paths("vm-4").directories)


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "-x", "x" * 64])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        Cgroups(Layout("none"), "scope").create(name, Limits())


@pytest.mark.parametrize("limits", [{"memory_bytes": 5}, {"cpu_quota_us": 0}, {"cpu_weight": 10_001}, {"pids": 0}])
def test_bad_limits_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(limits))):
        Limits(**limits)


async def test_without_cgroups_everything_goes_on() -> None:
    cgroups = Cgroups(Layout("none", reason="why"), "scope")
    paths = cgroups.create("vm", Limits(memory_bytes=64 * MIB))
    assert paths.directories == ()
    assert cgroups.stats(paths) == cgroup.CgroupStats()
    assert cgroups.processes(paths) == []
    await cgroups.remove(paths)
    assert await cgroups.sweep([]) == []


# ---- layouts that this machine does not have: their texts, and files in a temporary directory for the kernel's -----


def mountinfo(*rows: tuple[str, Path, str]) -> str:
    return "".join(f"30 20 0:1 / {point} rw - {kind} none rw,{options}\n" for kind, point, options in rows)


def fake_v2(directory: Path, controllers: str = "cpuset cpu io memory pids") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in {
        "cgroup.controllers": controllers,
        "cgroup.subtree_control": "cpu memory pids",
        "cgroup.procs": "",
    }.items():
        (directory / name).write_text(content)
    return directory


def test_v2_alone_is_used_from_the_top_by_root(tmp_path: Path) -> None:
    top = fake_v2(tmp_path)
    layout = detect(mountinfo=mountinfo(("cgroup2", top, "nsdelegate")), own="0::/system.slice/x.service\n")
    assert (layout.kind, layout.parents, layout.controllers) == ("v2", {"unified": top}, ("cpu", "memory", "pids"))
    assert not layout.reason


def as_user(uid: int, call: Callable[[], Layout]) -> Layout:
    """What `call` answers in a child process that has become `uid`."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.write(write, pickle.dumps(call()))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        data = answer.read()
    os.waitpid(child, 0)
    layout = pickle.loads(data)
    assert isinstance(layout, Layout)
    return layout


@pytest.mark.root
def test_v2_below_what_is_delegated_to_an_ordinary_user(tmp_path: Path) -> None:
    top = fake_v2(tmp_path)
    user = fake_v2(top / "user.slice/user@1000.service", "memory pids")
    scope = fake_v2(user / "app.slice/run.scope", "memory pids")
    fake_v2(user / "app.slice", "memory pids")
    for directory in (user, user / "app.slice", scope):
        os.chown(directory, 1000, 1000)
        for file in directory.iterdir():
            os.chown(file, 1000, 1000)
    for directory in (*reversed(tmp_path.parents), tmp_path, top / "user.slice"):
        if directory.stat().st_uid == os.geteuid() and str(directory).startswith("/tmp/"):
            directory.chmod(directory.stat().st_mode | 0o111)

    def ask(own: str) -> str:
        layout = as_user(1000, lambda: detect(mountinfo=mountinfo(("cgroup2", top, "rw")), own=own))
        return f"{layout.kind}|{layout.parents.get('unified')}|{'|'.join(layout.controllers)}|{layout.reason}"

    assert ask("0::/user.slice/user@1000.service/app.slice/run.scope\n") == (
        f"v2|{user}|memory|pids|not limited, as not delegated: cpu"
    )
    assert "is not delegated to this user; start the host with 'systemd-run" in ask("0::/user.slice/session-1.scope\n")


def test_empty_v2_tree_beside_v1_is_hybrid(tmp_path: Path) -> None:
    names = ("cpu,cpuacct", "memory", "pids")
    for name in (*names, "unified"):
        (tmp_path / name).mkdir()
    rows = [("cgroup", tmp_path / name, name) for name in names]
    layout = detect(mountinfo=mountinfo(*rows, ("cgroup2", tmp_path / "unified", "rw")), own="0::/\n")
    assert layout.kind == "v1"
    assert layout.parents["cpu"] == layout.parents["cpuacct"] == tmp_path / "cpu,cpuacct"
    assert layout.parents["unified"] == tmp_path / "unified"


def test_no_cgroups_says_so() -> None:
    layout = detect(mountinfo="", own="")
    assert layout.kind == "none"
    assert "mounted" in layout.reason


def test_v2_files(tmp_path: Path) -> None:
    """What is written and read in a v2 tree; plain files stand in for the kernel's: this machine's v2 tree is empty."""
    cgroups = Cgroups(Layout("v2", {"unified": fake_v2(tmp_path)}, ("cpu", "memory", "pids")), "s")
    for directory in (tmp_path / "podvisor", tmp_path / "podvisor/s", tmp_path / "podvisor/s/vm"):
        fake_v2(directory)
    (directory,) = cgroups.create("vm", Limits(memory_bytes=64 * MIB, cpu_quota_us=150_000, pids=9)).directories
    written = {name: (directory / name).read_text() for name in ("memory.max", "cpu.max", "pids.max")}
    assert written == {"memory.max": str(64 * MIB), "cpu.max": "150000 100000", "pids.max": "9"}
    (directory / "cpu.stat").write_text("usage_usec 12\nuser_usec 5\n")
    (directory / "memory.current").write_text("4096\n")
    (directory / "memory.peak").write_text("8192\n")
    (directory / "pids.current").write_text("2\n")
    (directory / "memory.events").write_text("low 0\noom_kill 3\n")
    assert cgroups.stats(cgroups.paths("vm")) == cgroup.CgroupStats(12_000, 4096, 8192, 2, 3)


@pytest.fixture
def cgroup2_mount(tmp_path: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "cgroup2", "none", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.root
async def test_v2_for_real_as_far_as_this_kernel_has_it(cgroup2_mount: Path) -> None:
    """Membership, kill and removal in a real cgroup2 mount, which may have no controllers."""
    cgroups = Cgroups(Layout("v2", {"unified": cgroup2_mount}, ()), scope_of(cgroup2_mount))
    paths = cgroups.create("vm", Limits())
    with joined(paths, "sleep 1000 & sleep 1000") as process:
        wait_joined(process)
        assert process.pid in cgroups.processes(paths)
        await cgroups.remove(paths)
        assert process.wait(1) == -9
    assert not cgroups._scope_directory("unified").exists()


def test_scope_is_stable_and_short() -> None:
    assert scope_of(Path("/var/lib/podvisor")) == scope_of(Path("/var/lib/podvisor"))
    assert scope_of(Path("/a")) != scope_of(Path("/b"))
    assert len(scope_of(Path("/a"))) == 12


def test_weights_become_shares() -> None:
    assert [cgroup._shares(weight) for weight in (None, 1, 10_000)] == [1024, 2, 262_144]
