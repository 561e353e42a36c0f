"""Suspended pods with real guests: they go on where they were, and damage and killed daemons cost nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import HV, Host, processes_naming, wait_for
from test_hostd import Daemon, daemon

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.uffd]

__all__ = ["daemon"]

#: counts in memory, into a file that stays open: whatever is lost or happens twice shows in it
COUNT = "exec 3>/log; i=0; while :; do i=$((i+1)); echo $i >&3; sleep 0.2; done"


@contextmanager
def counting(host: Host, name: str) -> Iterator[Path]:
    before = set((host.state / "pods").iterdir())
    host.hv("run", "-d", "--name", name, "busybox", "--", "sh", "-c", COUNT)
    try:
        (folder,) = set((host.state / "pods").iterdir()) - before
        wait_for(lambda: count(host, name) > 0, "it counts")
        yield folder
    finally:
        host.hv("rm", "-f", name)


def count(host: Host, name: str) -> int:
    """How far it is; fails when it did not count one by one."""
    numbers = list(map(int, host.hv("exec", name, "--", "cat", "/log").stdout.split()))
    assert numbers == list(range(1, len(numbers) + 1))
    return len(numbers)


def status(host: Host, name: str) -> str:
    lines = host.hv("ps").stdout.decode().splitlines()
    return next(line.split()[1] for line in lines if line.split()[0] == name)


def test_pod_goes_on_where_it_was(host: Host) -> None:
    with counting(host, "goes-on") as folder:
        pid = host.hv("exec", "goes-on", "--", "sh", "-c", "readlink /proc/1/fd/3; cat /proc/1/stat | cut -d' ' -f22")
        for _ in range(2):  # each time from the files of the time before
            before = count(host, "goes-on")
            host.hv("suspend", "goes-on")
            assert status(host, "goes-on") == "Suspended"
            assert not processes_naming(str(folder))
            assert not (folder / "vm").exists()
            refused = host.hv("exec", "goes-on", "--", "true", check=False)
            assert b"hv resume" in refused.stderr
            host.hv("resume", "goes-on")
            assert not (folder / "suspended").exists()
            wait_for(lambda least=before: count(host, "goes-on") > least, "it counts on")  # type: ignore[misc]
        now = host.hv("exec", "goes-on", "--", "sh", "-c", "readlink /proc/1/fd/3; cat /proc/1/stat | cut -d' ' -f22")
        assert now.stdout == pid.stdout  # the same process, its file still open
        asked = time.time()
        clock = int(host.hv("exec", "goes-on", "--", "date", "+%s").stdout)
        assert asked - 2 < clock < time.time() + 2, "the clock was left behind"
        assert status(host, "goes-on") == "Running"


def test_snapshots_are_restored_and_go(host: Host) -> None:
    with counting(host, "shot") as folder:
        host.hv("snapshot", "create", "shot", "one")
        at_one = count(host, "shot")
        wait_for(lambda: count(host, "shot") > at_one + 5, "it counts")
        host.hv("snapshot", "create", "shot", "two")
        assert [s["name"] for s in host.json("snapshot", "ls", "shot")["items"]] == ["one", "two"]
        taken = host.hv("snapshot", "create", "shot", "two", check=False)
        assert b"there is a snapshot two already" in taken.stderr
        host.hv("snapshot", "restore", "shot", "one")
        assert count(host, "shot") >= at_one  # disk and memory are of one moment
        host.hv("snapshot", "rm", "shot", "one")
        host.hv("snapshot", "restore", "shot", "two")  # it was made upon the other
        assert count(host, "shot") > at_one + 5
        missing = host.hv("snapshot", "restore", "shot", "one", check=False)
        assert b"there is no snapshot one; there are: two" in missing.stderr
        assert {p.name for p in folder.iterdir()} == {"pod.json", "status.json", "snapshots", "vm"}


TELL = "hostname; cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1; readlink /proc/1/fd/3"


def test_children_go_on_beside_their_parent(host: Host) -> None:
    with counting(host, "forked"):
        before = count(host, "forked")
        made = host.json("fork", "forked", "--count", "2")
        try:
            assert made["children"] == ["forked-1", "forked-2"]
            told: list[list[str]] = []
            for k, child in enumerate(made["children"], 1):
                wait_for(lambda name=child: b"child" in note(host, name), "the note is there")  # type: ignore[misc]
                assert json.loads(note(host, child)) == {"parent": "forked", "child": k, "of": 2}
                assert count(host, child) >= before
                told.append(host.hv("exec", child, "--", "sh", "-c", TELL).stdout.decode().splitlines())
            told.append(host.hv("exec", "forked", "--", "sh", "-c", TELL).stdout.decode().splitlines())
            assert [lines[0] for lines in told] == ["forked-1", "forked-2", "forked"]
            assert len({lines[1] for lines in told}) == len({lines[2] for lines in told}) == 3
            assert {lines[3] for lines in told} == {"/log"}  # the file is open in each, and a disk of its own
            now = count(host, "forked")
            wait_for(lambda: count(host, "forked") > now, "the parent counts on")
        finally:
            host.hv("rm", "-f", "forked-1", "forked-2")


def note(host: Host, pod: str) -> bytes:
    return host.hv("exec", pod, "--", "cat", "/run/podvisor-fork.json", check=False).stdout


def refusal(host: Host, name: str) -> str:
    done = host.hv("resume", name, check=False)
    assert done.returncode == 1
    assert status(host, name) == "Suspended"
    return done.stderr.decode()


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """A file with other content, under its name; as it was afterwards."""
    kept = path.with_name("kept")
    path.rename(kept)
    path.write_bytes(content)
    try:
        yield
    finally:
        path.unlink()
        kept.rename(path)


def flipped(path: Path, at: int) -> bytes:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    return bytes(data)


def test_damaged_files_are_named(host: Host) -> None:
    with counting(host, "damaged") as folder:
        host.hv("suspend", "damaged")
        files = folder / "suspended"
        (layer,) = files.glob("layer-*")
        for name in ("manifest.json", "index", "state", layer.name):
            path = files / name
            half = path.stat().st_size // 2
            for content in (flipped(path, half), path.read_bytes()[:half], b""):
                with changed(path, content):
                    assert name in refusal(host, "damaged")
        for name in ("ram", "template.json"):
            with changed(files / "template" / name, b""):
                assert name in refusal(host, "damaged")
        gone = files / "state"
        kept = gone.rename(files / "kept")
        assert "state: No such file" in refusal(host, "damaged")
        kept.rename(gone)
        host.hv("resume", "damaged")
        assert count(host, "damaged") > 0


def misfit(files: Path, **key: Any) -> bytes:
    """A manifest as another host would have written it."""
    from hypervisor.vmm import records
    from hypervisor.vmm.snapshots.snapshot import Manifest

    value = json.loads((files / "manifest.json").read_text())
    value["key"] |= key
    manifest = records.from_json(Manifest, value, where="manifest.json")
    return records.dumps(manifest.sealed()).encode()


def test_what_does_not_fit_is_named(host: Host) -> None:
    with counting(host, "misfit") as folder:
        host.hv("suspend", "misfit")
        files = folder / "suspended"
        argv = json.loads((files / "manifest.json").read_text())["key"]["argv"]
        model = argv[argv.index("-cpu") + 1]
        other = [word.replace(model, "qemu64") if word == model else word for word in argv]
        for content, words in (
            (misfit(files, qemu_version="6.2.0"), "taken with QEMU 6.2.0"),
            (misfit(files, guest="0" * 64), "guest image 000000000000"),
            (misfit(files, argv=other), f"-cpu qemu64, here {model}"),
        ):
            with changed(files / "manifest.json", content):
                assert words in refusal(host, "misfit")
        host.hv("resume", "misfit")
        assert count(host, "misfit") > 0


def act(daemon: Daemon, verb: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"HV_STATE_DIR": str(daemon.state)}
    null = subprocess.DEVNULL
    return subprocess.Popen([HV, verb, "killed"], stdin=null, stdout=null, stderr=null, env=environment)


def test_killed_daemons(daemon: Daemon) -> None:
    """Killed when each file comes to be: the pod then runs or is suspended, nothing is left, and it counts on."""
    daemon.run("killed", COUNT)
    daemon.wait_running("killed")
    folder, seen = daemon.folder("killed"), 0
    for verb, comes in (
        ("suspend", "suspended.new/state"),
        ("suspend", "suspended/manifest.json"),
        ("resume", "vm/snapshot/manifest.json"),
    ):
        files = folder / "suspended"
        if files.exists() != (verb == "resume"):
            daemon.call("POST", f"/hv/v1/pods/default/killed/{'suspend' if verb == 'resume' else 'resume'}")
        client = act(daemon, verb)
        wait_for((folder / comes).exists, comes)
        daemon.end(signal.SIGKILL)
        client.wait(30)
        daemon.start()
        pod = daemon.wait("killed", settled, "it runs or is suspended")
        if pod["status"].get("reason") == "Suspended":
            wait_for(lambda: not (folder / "vm").exists(), "the VM is gone")
            assert {p.name for p in folder.iterdir()} == {"pod.json", "status.json", "suspended"}
            daemon.call("POST", "/hv/v1/pods/default/killed/resume")
        wait_for(lambda: {p.name for p in folder.iterdir()} == {"pod.json", "status.json", "vm"}, "nothing is left")
        assert len(processes_naming("guest=killed-")) <= 2  # QEMU and its launcher
        wait_for(lambda least=seen: told(daemon) > least, "it counts on")  # type: ignore[misc]
        seen = told(daemon)
        assert daemon.pod("killed")["status"]["containerStatuses"][0]["restartCount"] == 0
    daemon.remove("killed")


def settled(pod: Any) -> bool:
    conditions = {c["type"]: c["status"] for c in pod["status"]["conditions"]}
    return pod["status"].get("reason") == "Suspended" or conditions["Ready"] == "True"


def told(daemon: Daemon) -> int:
    environment = os.environ | {"HV_STATE_DIR": str(daemon.state)}
    done = subprocess.run([HV, "exec", "killed", "--", "cat", "/log"], env=environment, capture_output=True, timeout=60)
    if done.returncode:
        return -1
    numbers = list(map(int, done.stdout.split()))
    assert numbers == list(range(1, len(numbers) + 1))
    return len(numbers)
