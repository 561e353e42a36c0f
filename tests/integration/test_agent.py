"""The agent in a real guest: containers, exec, logs, archives, limits, hostile containers, shutdown."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_vm import AgentVm, Ended, Refused, boot, make_image, resize_payload

from hypervisor.agent import wire
from hypervisor.agent.wire import FrameType

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

EXEC_MEDIAN_MS = 40  # the bar of the issue; see test_warm_exec


@pytest.fixture(scope="session")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("image") / "busybox.erofs")


@pytest.fixture(scope="module")
def vm(busybox: Path) -> Iterator[AgentVm]:
    """One guest for most tests, with a running container "main"."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="hva-") as folder, boot(Path(folder), busybox) as guest:
        guest.setup()
        guest.start("main", "sleep", "100000")
        yield guest


@pytest.fixture
def fresh(busybox: Path, short_path: Path) -> Iterator[AgentVm]:
    """A guest of one test's own."""
    with boot(short_path, busybox) as guest:
        yield guest


def sh(vm: AgentVm, script: str, container: str = "main", **args: Any) -> Ended:
    return vm.run(container, "sh", "-c", script, **args)


def text(ended: Ended) -> str:
    assert ended.code == 0, (bytes(ended.out), bytes(ended.err), ended.body)
    return ended.out.decode()


# ---- containers ------------------------------------------------------------------------------------------------------


def test_output_and_exit_code(vm: AgentVm) -> None:
    vm.start("one", "sh", "-c", "echo out; echo err >&2; exit 7")
    ended = vm.attach("one")
    assert (bytes(ended.out), bytes(ended.err), ended.code) == (b"out\n", b"err\n", 7)
    state = vm.wait_exited("one")
    assert (state["exit_code"], state["signal"], state["oom_killed"], state["attempt"]) == (7, None, False, 0)
    assert vm.logs("one") in (b"out\nerr\n", b"err\nout\n")


def test_restart_keeps_the_previous_log_and_a_fresh_root(vm: AgentVm) -> None:
    for i in range(3):
        vm.start("again", "sh", "-c", f"ls /mark 2>&1; touch /mark; echo {i}")
        assert b"/mark\n" not in vm.attach("again").out
        assert vm.wait_exited("again")["attempt"] == i
    assert vm.logs("again").endswith(b"2\n")
    assert vm.logs("again", previous=True).endswith(b"1\n")


def test_start_of_a_running_one_is_a_conflict(vm: AgentVm) -> None:
    with pytest.raises(Refused, match="Conflict: container main: is running already"):
        vm.start("main", "true")


@pytest.mark.parametrize(("program", "code"), [("nosuch", 127), ("/etc/passwd", 126), ("/etc", 126)])
def test_programs_that_cannot_be_started(vm: AgentVm, program: str, code: int) -> None:
    with pytest.raises(Refused) as caught:
        vm.start("bad", program)
    assert caught.value.error["exit_code"] == code
    assert program in caught.value.message
    assert vm.state("bad")["state"] == "exited" and vm.state("bad")["exit_code"] == code


def test_bad_references(vm: AgentVm) -> None:
    with pytest.raises(Refused, match="the pod has no volume 'nope'"):
        vm.start("bad", "true", mounts=[{"volume": "nope", "path": "/v"}])
    with pytest.raises(Refused, match="disk img-000000000000: no virtio disk"):
        vm.start("bad", "true", image_disk="img-000000000000")
    with pytest.raises(Refused, match="has no such user"):
        vm.start("bad", "true", user="nope")
    with pytest.raises(Refused, match="a pod has one host name, 'pod-1'"):
        vm.start("bad", "true", hostname="other")
    with pytest.raises(Refused, match="Conflict: setup: was called before"):
        vm.setup()


def test_stop_signal_grace_and_kill(vm: AgentVm) -> None:
    vm.start(
        "polite", "sh", "-c", "trap 'echo bye; exit 3' USR1; echo up; while :; do sleep 0.1; done", stop_signal="USR1"
    )
    wait_logged(vm, "polite", b"up\n")
    assert vm.call("container.stop", name="polite", grace_s=20) == {"exit_code": 3, "signal": None}
    assert vm.logs("polite") == b"up\nbye\n"
    vm.start("stubborn", "sleep", "1000")
    assert vm.call("container.stop", name="stubborn", grace_s=0.2) == {"exit_code": 137, "signal": 9}
    assert vm.call("container.stop", name="stubborn", grace_s=0.2) == {"exit_code": 137, "signal": 9}


def wait_logged(vm: AgentVm, name: str, wanted: bytes) -> None:
    with vm.stream("logs", container=name, follow=True) as stream:
        have = b""
        while wanted not in have:
            have += stream.receive().payload


def test_orphans_are_reaped_and_the_whole_container_dies(vm: AgentVm) -> None:
    vm.start("forker", "sh", "-c", "(sleep 1000 & sleep 1000 &) ; sleep 0.2; exit 0")
    assert vm.wait_exited("forker")["exit_code"] == 0
    assert vm.call("container.stats")["containers"]["forker"]["pids"] == 0


def test_out_of_memory(vm: AgentVm) -> None:
    vm.start("hungry", "sh", "-c", "head -c 100m /dev/zero | tail", resources={"memory_bytes": 16 << 20})
    state = vm.wait_exited("hungry")
    assert (state["exit_code"], state["signal"], state["oom_killed"]) == (137, 9, True)


def test_limits(vm: AgentVm) -> None:
    limits = {"memory_bytes": 64 << 20, "cpu_quota_us_per_100ms": 50_000, "cpu_shares": 1024, "pids": 20}
    vm.start("limited", "sleep", "1000", resources=limits)
    files = "memory.max memory.swap.max cpu.max cpu.weight pids.max"
    assert text(sh(vm, f"cd /sys/fs/cgroup; cat {files}", "limited")).split("\n")[:-1] == [
        "67108864", "0", "50000 100000", "39", "20",
    ]  # fmt: skip
    vm.call("container.update", name="limited", resources={"memory_bytes": 32 << 20})
    assert text(sh(vm, "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max", "limited")) == "33554432\nmax\n"
    bomb = sh(vm, "for i in $(seq 30); do sleep 5 & done", "limited")
    vm.call("container.update", name="limited", resources={"pids": 3})
    with pytest.raises(Refused, match="ResourceExhausted: cannot start a process in the container"):
        vm.run("limited", "true")
    assert bomb.code == 0
    vm.call("container.stop", name="limited", grace_s=0)


def test_pause(vm: AgentVm) -> None:
    vm.start("frozen", "sh", "-c", "while :; do echo tick; sleep 0.05; done")
    wait_logged(vm, "frozen", b"tick\n")
    vm.call("container.pause", name="frozen")
    assert vm.state("frozen")["state"] == "paused"
    with pytest.raises(Refused, match="is paused, not running"):
        vm.run("frozen", "true")
    before = vm.logs("frozen")
    time.sleep(0.5)
    assert vm.logs("frozen") == before
    vm.call("container.resume", name="frozen")
    assert vm.run("frozen", "true").code == 0
    vm.call("container.pause", name="frozen")
    assert vm.call("container.stop", name="frozen", grace_s=0)["exit_code"] == 137


def test_terminal_of_a_container(vm: AgentVm) -> None:
    vm.start("tty", "sh", "-c", "echo on $(tty); read x; stty size; exit 5", tty=True, stdin=True)
    with vm.stream("attach", container="tty", stdin=True, stdout=True, stderr=False, replay=True) as stream:
        stream.send(FrameType.RESIZE, resize_payload(91, 41))
        stream.send(FrameType.STDIN, b"go\n")
        ended = stream.finish()
    # The echo of what was typed may come before the line end.
    assert b"on /dev/pts/0" in ended.out and b"41 91\r\n" in ended.out
    assert ended.code == 5


def test_stdin_once(vm: AgentVm) -> None:
    vm.start("cat", "sh", "-c", "cat; echo end", stdin=True, stdin_once=True)
    with vm.stream("attach", container="cat", stdin=True, stdout=True, stderr=True, replay=True) as stream:
        stream.send(FrameType.STDIN, b"hello ")
        stream.send(FrameType.STDIN)
        ended = stream.finish()
    assert (bytes(ended.out), ended.code) == (b"hello end\n", 0)


def test_volumes_files_and_name_files(vm: AgentVm) -> None:
    mounts = [
        {"volume": "disk", "path": "/d"},
        {"volume": "disk", "path": "/d/inner", "sub_path": "a/b", "read_only": True},
        {"volume": "memory", "path": "/m"},
    ]
    files = [{"path": "/etc/app.conf", "mode": 0o640, "content_b64": "Y29uZg=="}]
    vm.start("vols", "sleep", "1000", mounts=mounts, files=files, cwd="/new/dir", read_only_root=True)
    assert text(sh(vm, "pwd; cat /etc/app.conf; stat -c %a /etc/app.conf", "vols")) == "/new/dir\nconf640\n"
    assert text(sh(vm, "echo x > /d/a/b/f; cat /d/inner/f; cat /etc/hostname", "vols")) == "x\npod-1\n"
    assert "10.9.9.9\telsewhere\n" in text(sh(vm, "cat /etc/hosts", "vols"))
    assert text(sh(vm, "cat /etc/resolv.conf", "vols")) == "nameserver 10.0.2.3\n"
    for command in ("touch /d/inner/x", "touch /x", "echo > /etc/app.conf"):
        assert b"Read-only" in sh(vm, command, "vols").err
    assert b"No space left" in sh(vm, "dd if=/dev/zero of=/m/big bs=1M count=2", "vols").err
    vm.call("container.stop", name="vols", grace_s=0)
    vm.start("vols", "cat", "/d/a/b/f", mounts=mounts)
    assert vm.attach("vols").out == b"x\n"


def test_remove(vm: AgentVm) -> None:
    vm.start("gone", "true")
    vm.wait_exited("gone")
    vm.call("container.remove", name="gone")
    assert "gone" not in [c["name"] for c in vm.call("container.list")["containers"]]
    with pytest.raises(Refused, match="Conflict: container main: is running; stop it first"):
        vm.call("container.remove", name="main")
    vm.start("gone", "true")
    assert vm.wait_exited("gone")["attempt"] == 0


# ---- confinement -----------------------------------------------------------------------------------------------------


def test_exec_is_confined_as_the_container_is(vm: AgentVm) -> None:
    keys = "Cap|Seccomp|NoNew|Uid|Gid|Groups"
    one, own = (text(sh(vm, f"grep -E '^({keys})' /proc/{pid}/status")) for pid in ("1", "self"))
    assert one == own
    assert "Seccomp:\t2" in own and "CapEff:\t00000000a80425fb" in own
    assert text(sh(vm, "cat /proc/self/cgroup")) == "0::/\n"
    dropped = {"capabilities": {"drop": ["ALL"], "add": ["NET_RAW"]}, "no_new_privileges": True, "user": "nobody"}
    vm.start("dropped", "sleep", "1000", **dropped)
    one, own = (text(sh(vm, f"grep -E '^({keys})' /proc/{pid}/status", "dropped")) for pid in ("1", "self"))
    assert one == own
    assert "NoNewPrivs:\t1" in own and "CapBnd:\t0000000000002000" in own and "Uid:\t65534" in own
    vm.call("container.stop", name="dropped", grace_s=0)


PROBE = "int main(void) { extern int personality(unsigned long); return personality(0x40000) != -1; }"


def test_a_filter_that_is_used_again_filters_as_before(vm: AgentVm, tmp_path: Path) -> None:
    """The probe asks for a personality that the default filter refuses: 0 refused, 1 allowed."""
    subprocess.run(["cc", "-static", "-x", "c", "-", "-o", tmp_path / "probe"], input=PROBE.encode(), check=True)
    for name, seccomp, allowed in (
        ("twin", "runtime/default", 0),
        ("twin", "runtime/default", 0),
        ("open", "unconfined", 1),
    ):
        vm.start(name, "sh", "-c", "until [ -x /probe ]; do sleep 0.05; done; sleep 1; exec /probe", seccomp=seccomp)
        send_file(vm, name, tmp_path / "probe")
        assert vm.run(name, "/probe").code == allowed
        assert vm.wait_exited(name)["exit_code"] == allowed


def send_file(vm: AgentVm, name: str, path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(path, path.name)
    with vm.stream("archive.put", container=name, path="/") as stream:
        feed(stream, buffer.getvalue())
        assert stream.finish().body == {"error": None}


@pytest.mark.parametrize(
    "script",
    [
        "mount -t tmpfs x /mnt",
        "echo 1 > /proc/sys/kernel/panic",
        "echo c > /proc/sysrq-trigger",
        "mknod /tmp/d b 254 0 && dd if=/tmp/d of=/dev/null count=1",
        "mknod /dev/d b 254 0 && dd if=/dev/d of=/dev/null count=1",
        "echo 1 > /sys/fs/cgroup/cgroup.procs",
        "hostname other",
        "chroot /proc/1/root true && ls /proc/1/root/usr/lib/podvisor",
    ],
)
def test_what_a_container_may_not(vm: AgentVm, script: str) -> None:
    assert sh(vm, script).code != 0
    assert vm.call("hello")["wire"] == 1


def test_hostile_root(vm: AgentVm) -> None:
    """Links in the image or made by the container lead nowhere in the guest's own root."""
    script = "rm -rf /etc/passwd; ln -s /../../../../etc/passwd /etc/passwd; ln -s / /d; echo up; exec sleep 1000"
    vm.start("hostile", "sh", "-c", script)
    wait_logged(vm, "hostile", b"up\n")
    with pytest.raises(Refused, match="has no such user"):
        vm.run("hostile", "true", user="nobody")
    assert "podvisor" not in text(sh(vm, "ls /usr/lib /d/usr/lib 2>&1; true", "hostile"))
    sh(vm, "rm -f /dev/pts/ptmx /dev/ptmx; mkfifo /dev/ptmx; true", "hostile")
    assert vm.run("hostile", "tty", tty=True).code == 0
    vm.call("container.stop", name="hostile", grace_s=0)


# ---- exec ------------------------------------------------------------------------------------------------------------


def test_much_data_both_ways(vm: AgentVm) -> None:
    data = os.urandom(20 << 20)
    with vm.stream("exec", container="main", argv=["cat"], stdin=True) as stream:
        feeder = threading.Thread(target=feed, args=(stream, data))
        feeder.start()
        ended = stream.finish()
        feeder.join()
    assert hashlib.sha256(ended.out).digest() == hashlib.sha256(data).digest() and ended.code == 0


def feed(stream: Any, data: bytes) -> None:
    for i in range(0, len(data), wire.MAX_DATA):
        stream.send(FrameType.STDIN, data[i : i + wire.MAX_DATA])
    stream.send(FrameType.STDIN)


def test_exec_in_a_terminal(vm: AgentVm) -> None:
    ended = vm.run("main", "sh", "-c", "tty; stty size; exit 4", tty=True, columns=100, rows=30)
    assert (bytes(ended.out), ended.code) == (b"/dev/pts/0\r\n30 100\r\n", 4)


def test_users_in_exec(vm: AgentVm) -> None:
    assert text(vm.run("main", "id", user="nobody")).startswith("uid=65534(nobody)")
    assert text(vm.run("main", "id", user={"uid": 5, "gid": 6, "groups": [7]})) == "uid=5 gid=6 groups=7\n"


def test_clients_that_go_leave_nothing(vm: AgentVm) -> None:
    for tty in (True, False):
        with vm.stream("exec", container="main", argv=["cat"], stdin=True, tty=tty):
            pass
    deadline = time.monotonic() + 20
    while text(sh(vm, "ps -o comm | grep -c '^cat$' || true")) != "0\n":
        assert time.monotonic() < deadline
    assert vm.call("container.stats")["containers"]["main"]["pids"] == 1


def test_warm_exec(vm: AgentVm, record_property: Any) -> None:
    """The bar is for two idle cores; a busy machine gets four times as long before this fails."""
    times = []
    for _ in range(60):
        start = time.perf_counter()
        assert vm.run("main", "true").code == 0
        times.append(time.perf_counter() - start)
    median = sorted(times)[len(times) // 2] * 1000
    record_property("exec_median_ms", median)
    print(f"exec true: p50 {median:.1f} ms, best {min(times) * 1000:.1f} ms")
    assert median < EXEC_MEDIAN_MS * 4


# ---- logs ------------------------------------------------------------------------------------------------------------


def test_a_flood_rotates_and_loses_nothing_but_the_oldest(vm: AgentVm) -> None:
    vm.start("flood", "sh", "-c", "seq 1 60000", log_max_bytes=300_000, log_files=3)
    vm.wait_exited("flood")
    numbers = [int(line) for line in vm.logs("flood").split()]
    assert numbers == list(range(numbers[0], 60001)) and len(numbers) > 5000
    assert vm.logs("flood", tail=2) == b"59999\n60000\n"
    assert vm.logs("flood", tail=2, limit_bytes=8) == b"59999\n60"


def test_a_full_disk_is_the_containers_alone(vm: AgentVm) -> None:
    vm.start("filler", "sh", "-c", "head -c 1g /dev/zero > /big; echo rc $?; exec sleep 1000")
    deadline = time.monotonic() + 60
    while b"rc" not in vm.logs("filler") and not vm.state("filler")["log_dropped_bytes"]:
        assert time.monotonic() < deadline
    assert vm.run("main", "true").code == 0
    assert vm.call("hello")["wire"] == 1
    vm.call("container.stop", name="filler", grace_s=0)
    vm.call("container.remove", name="filler")
    vm.start("after", "sh", "-c", "echo works > /f; cat /f")
    assert vm.attach("after").out == b"works\n"


# ---- archives --------------------------------------------------------------------------------------------------------


def test_archives(vm: AgentVm) -> None:
    content = os.urandom(3 << 20)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("t/file")
        info.size, info.mode, info.uid = len(content), 0o4750, 12
        tar.addfile(info, io.BytesIO(content))
    with vm.stream("archive.put", container="main", path="/tmp") as stream:
        feed(stream, buffer.getvalue())
        assert stream.finish().body == {"error": None}
    assert text(sh(vm, "stat -c '%a %u' /tmp/t/file")) == "4750 12\n"
    with vm.stream("archive.get", container="main", path="/tmp/t") as stream:
        ended = stream.finish()
    assert ended.body == {"error": None}
    with tarfile.open(fileobj=io.BytesIO(ended.out)) as tar:
        assert tar.getnames() == ["t", "t/file"]
        assert tar.extractfile("t/file").read() == content  # type: ignore[union-attr]


def test_archive_errors_and_ended_containers(vm: AgentVm) -> None:
    with vm.stream("archive.get", container="main", path="/none") as stream:
        assert stream.finish().body["error"]["reason"] == "NotFound"
    vm.start("wrote", "sh", "-c", "echo kept > /file")
    vm.wait_exited("wrote")
    with vm.stream("archive.get", container="wrote", path="/file") as stream:
        ended = stream.finish()
    with tarfile.open(fileobj=io.BytesIO(ended.out)) as tar:
        assert tar.extractfile("file").read() == b"kept\n"  # type: ignore[union-attr]


def test_archive_of_all_logs(vm: AgentVm) -> None:
    vm.start("logged", "echo", "hello")
    vm.wait_exited("logged")
    with vm.stream("logs.archive") as stream:
        ended = stream.finish()
    with tarfile.open(fileobj=io.BytesIO(ended.out)) as tar:
        assert tar.extractfile("./logged/0.log").read().endswith(b" stdout F hello\n")  # type: ignore[union-attr]


# ---- the guest -------------------------------------------------------------------------------------------------------


def test_a_shared_pid_namespace_and_shutdown(fresh: AgentVm) -> None:
    wrong = time.time_ns() - 10**9 * 86400 * 365
    fresh.setup(share_process_namespace=True, clock_ns=wrong)
    assert abs(fresh.call("hello")["clock_ns"] - wrong) < 60 * 10**9
    fresh.start("a", "sleep", "1234")
    fresh.start("b", "sh", "-c", "ps; exec sleep 1000")
    wait_logged(fresh, "b", b"sleep 1234")
    fresh.call("container.signal", name="a", signal=15)
    assert fresh.wait_exited("a")["signal"] == 15
    fresh.start("c", "sh", "-c", "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.1; done")
    wait_logged(fresh, "c", b"up\n")
    with fresh.stream("attach", container="c", stdin=False, stdout=True, stderr=True, replay=False) as stream:
        assert fresh.call("shutdown", grace_s=5) == {}
        assert stream.finish().out == b"bye\n"
    assert fresh.process.wait(30) == 0
    assert "Power down" in fresh.console()


def test_calls_before_setup(fresh: AgentVm) -> None:
    with pytest.raises(Refused, match="Conflict: the guest is not set up yet"):
        fresh.start("a", "true")
    with pytest.raises(Refused, match=r"setup\.hostname"):
        fresh.setup(hostname="no spaces")
    with pytest.raises(Refused, match="no virtio disk with that serial"):
        fresh.setup(data_disk="other")
    fresh.setup()
    fresh.start("a", "true")
