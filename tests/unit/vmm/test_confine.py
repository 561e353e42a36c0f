"""`hypervisor.vmm.confine`: the argv as a value, and what the real launcher makes of it."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hypervisor.errors import HostUnfit, InvalidInput
from hypervisor.vmm import confine
from hypervisor.vmm.confine import EXIT_NOT_CONFINED, Confinement, confined_argv, host_support, qemu_view

UID = 2_000_201


def identity() -> dict[str, Any]:
    """Root must name a user; anyone else stays who they are."""
    return {"uid": UID, "gid": UID} if os.geteuid() == 0 else {}


def run(confinement: Confinement, *argv: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(confined_argv(confinement, argv), capture_output=True, text=True, timeout=20, **how)


def shell(script: str, **what: Any) -> subprocess.CompletedProcess[str]:
    return run(Confinement(**{"private_root": False, **identity(), **what}), "/bin/sh", "-c", script)


def test_argv_of_everything() -> None:
    confinement = Confinement(
        uid=1001,
        gid=1002,
        cgroups=(Path("/c/cpu"), Path("/c/memory")),
        ro_binds=(Path("/vm/disk"), Path("/usr")),
        rw_binds=(Path("/vm"),),
        devices=("kvm",),
        new_network=True,
        rlimits=(("core", 0), ("nofile", 512)),
        oom_score_adj=100,
        keep_fds=(10, 20),
        stdin=4,
        stdout=5,
        stderr=6,
        directory=Path("/vm"),
        environment=(("A", "b c"),),
    )
    argv = confined_argv(confinement, ["/usr/bin/qemu", "-x"])
    assert argv[0].endswith("/libexec/hv-confine")
    assert " ".join(argv[1:]) == (
        "--uid 1001 --gid 1002 --cgroup /c/cpu --cgroup /c/memory --rlimit core=0 --rlimit nofile=512"
        " --oom-score-adj 100 --private-root --new-network --filter --ro /usr --rw /vm --ro /vm/disk --dev kvm"
        " --stdin 4 --stdout 5 --stderr 6 --keep-fd 10 --keep-fd 20 --chdir /vm --env A=b c -- /usr/bin/qemu -x"
    )


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"uid": 5}, "belong together"),
        ({"uid": 0, "gid": 0}, "never runs as root"),
        ({"uid": 5, "gid": 5, "user_namespace": True}, "user namespace"),
        ({"private_root": False, "ro_binds": (Path("/usr"),)}, "private root"),
        ({"devices": ("sda",)}, "'sda' is none of"),
        ({"rlimits": (("cores", 1),)}, "'cores' is none of"),
        ({"ro_binds": (Path("usr"),)}, "absolute"),
        ({"rw_binds": (Path("/a/../b"),)}, "absolute"),
    ],
)
def test_refuses_nonsense(what: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Confinement(**what)


def test_missing_launcher_says_how_to_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(confine, "LIBEXEC", tmp_path)
    with pytest.raises(HostUnfit, match="make native"):
        confined_argv(Confinement(**identity()), ["/bin/true"])


def test_exit_code_and_streams_pass_through() -> None:
    done = shell("echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_no_privilege_is_left() -> None:
    status = dict(
        line.split(":\t")
        for line in shell("cat /proc/self/status").stdout.splitlines()
        if line.startswith(("Cap", "No", "Se"))
    )
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[name], 16) == 0
    if os.geteuid() == 0:
        assert int(status["CapBnd"], 16) == 0


@pytest.mark.root
def test_becomes_the_user_with_no_other_group() -> None:
    assert shell("id -u; id -g; id -G").stdout.split() == [str(UID)] * 3


@pytest.mark.root
def test_root_must_name_a_user() -> None:
    done = run(Confinement(private_root=False), "/bin/true")
    assert done.returncode == EXIT_NOT_CONFINED
    assert done.stderr == "hv-confine: root must name a user to become: --uid and --gid\n"


def test_environment_limits_session_and_directory() -> None:
    done = shell(
        "env; ulimit -c; ulimit -n; ps -o sid= -p $$; echo $$; pwd; umask",
        rlimits=(("core", 0), ("nofile", 100)),
        environment=(("ONLY", "this"), ("PATH", "/usr/bin:/bin")),
        directory=Path("/usr"),
    )
    lines = done.stdout.split()
    assert "ONLY=this" in lines
    assert not any(line.startswith("HOME=") for line in lines)
    core, files, sid, pid, directory, umask = lines[-6:]
    assert (core, files, directory, umask) == ("0", "100", "/usr", "0077")
    assert sid == pid


def test_only_listed_descriptors_stay_open() -> None:
    kept, other = os.pipe()
    try:
        confinement = Confinement(private_root=False, keep_fds=(kept,), **identity())
        done = run(confinement, "/bin/ls", "/proc/self/fd", pass_fds=(kept, other))
    finally:
        os.close(kept)
        os.close(other)
    # One more is ls's own, on the directory that it reads.
    assert len(done.stdout.split()) == 5
    assert str(kept) in done.stdout.split()
    assert str(other) not in done.stdout.split()


def test_streams_from_given_descriptors(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+") as out, (tmp_path / "err").open("w+") as err:
        confinement = Confinement(private_root=False, stdout=out.fileno(), stderr=err.fileno(), **identity())
        argv = confined_argv(confinement, ["/bin/sh", "-c", "echo o; echo e >&2"])
        subprocess.run(argv, pass_fds=(out.fileno(), err.fileno()), check=True)
    assert (tmp_path / "out").read_text() == "o\n"
    assert (tmp_path / "err").read_text() == "e\n"


@pytest.mark.parametrize(
    ("what", "argv", "complaint"),
    [
        ({}, "/nowhere/program", "executing /nowhere/program: No such file or directory"),
        ({"directory": Path("/nowhere")}, "/bin/true", "entering /nowhere: No such file or directory"),
        ({"cgroups": (Path("/nowhere"),)}, "/bin/true", "writing /nowhere/cgroup.procs: No such file or directory"),
        ({"keep_fds": (999,)}, "/bin/true", "keeping descriptor 999: Bad file descriptor"),
        ({"stdin": 999}, "/bin/true", "using descriptor 999: Bad file descriptor"),
    ],
)
def test_what_fails_is_one_line_and_125(what: dict[str, Any], argv: str, complaint: str) -> None:
    done = run(Confinement(private_root=False, **identity(), **what), argv)
    assert done.returncode == EXIT_NOT_CONFINED
    assert done.stderr == f"hv-confine: {complaint}\n"


def need_private_root() -> None:
    """Skips where no root can be exchanged for another: in a chroot, whose / is no mount point."""
    support = asyncio.run(host_support())
    if not support.private_root:
        pytest.skip(support.reason)


@pytest.mark.root
@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ({"ro_binds": (Path("/nowhere"),)}, "showing /nowhere: No such file or directory"),
        pytest.param(
            {"devices": ("vhost-vsock",)},
            "looking at /dev/vhost-vsock: No such file or directory",
            marks=pytest.mark.tcg,
        ),
    ],
)
def test_what_cannot_be_shown_is_named(what: dict[str, Any], complaint: str) -> None:
    need_private_root()
    done = run(Confinement(**identity(), **what), "/bin/true")
    assert (done.returncode, done.stderr) == (EXIT_NOT_CONFINED, f"hv-confine: {complaint}\n")


@pytest.mark.root
@pytest.mark.net_admin
def test_private_root_holds_only_what_was_named(short_path: Path) -> None:
    need_private_root()
    vm = short_path / "vm"
    vm.mkdir()
    os.chown(vm, UID, UID)
    inner = vm / "disk"
    inner.write_text("read-only in a writable directory")
    os.chown(inner, UID, UID)
    tools = tuple(path for name in ("/usr", "/bin", "/lib", "/lib64") if (path := Path(name)).exists())
    confinement = Confinement(
        **identity(), ro_binds=(*tools, inner), rw_binds=(vm,), devices=("net/tun",), directory=vm
    )
    script = "echo /*; echo /dev/*; touch new; (echo x > disk) || echo refused; cat disk; echo; stat -c %u /dev/net/tun"
    done = run(confinement, "/bin/sh", "-c", script)
    assert done.stdout.splitlines() == [
        " ".join(sorted({f"/{path.parts[1]}" for path in (*tools, vm)} | {"/dev"})),
        "/dev/net /dev/null /dev/urandom /dev/zero",
        "refused",
        "read-only in a writable directory",
        str(UID),
    ]
    assert (vm / "new").stat().st_uid == UID
    assert str(vm) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.root
def test_filter_leaves_own_process_alone() -> None:
    done = shell("kill -0 $$ && echo self; kill -0 $PPID || echo refused; unshare -U true || echo no namespace")
    assert done.stdout.splitlines() == ["self", "refused", "no namespace"]


async def test_host_support_tells_the_truth() -> None:
    support = await host_support()
    assert support.own_user == (os.geteuid() == 0)
    if support.private_root:
        confinement = Confinement(**identity(), user_namespace=support.user_namespace, ro_binds=(confine.launcher(),))
        assert run(confinement, str(confine.launcher()), "--help").returncode == 0
    else:
        assert support.reason


def test_qemu_view_is_small_and_without_doubles() -> None:
    view = qemu_view(Path("/usr/bin/qemu-system-x86_64"))
    assert Path("/usr") not in view and Path("/etc") not in view
    assert Path("/usr/share/qemu") in view
    assert not any(a != b and a.is_relative_to(b) for a in view for b in view)
