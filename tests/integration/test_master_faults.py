"""What a master's machine can do to it: a full disk, a damaged store, clients that do not read."""

from __future__ import annotations

import itertools
import json
import os
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from master_process import MasterProcess, running_master, until

from hypervisor.cli.kubeapi import KubeApi
from hypervisor.errors import HvError
from hypervisor.kube import kubeconfig
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import CONFIG_MAPS

MAPS = "/api/v1/namespaces/default/configmaps"


def make(api: KubeApi, name: str, size: int = 100) -> Any:
    return api.create(CONFIG_MAPS, {"metadata": {"name": name}, "data": {"x": "x" * size}}, "default")


def names(api: KubeApi) -> set[str]:
    return {m["metadata"]["name"] for m in api.list(CONFIG_MAPS, "default")} - {"kube-root-ca.crt"}


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here: needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_up(filler: Path, leave: int = 2 << 20) -> None:
    """Takes what is free on the filler's disk but for `leave` bytes: how much the store takes itself differs."""
    free = os.statvfs(filler.parent)
    filler.write_bytes(b"x" * max(0, free.f_bavail * free.f_bsize - leave))


@pytest.mark.root
def test_a_full_disk_is_told_and_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    state, log = small_disk / "master", tmp_path / "log"
    filler = small_disk / "filler"
    master = MasterProcess(state, log=log).wait_ready()
    try:
        with KubeApi(master.kubeconfig) as api:
            fill_up(filler)
            kept = fill(api)
            assert names(api) == kept  # reading goes on
            assert api.ready()
            filler.unlink()
            until(lambda: make_or_not(api, "after"))
            kept |= {"after"}
            fill_up(filler)
            kept |= fill(api, "again")
        master.kill()
        full = MasterProcess(state, log=tmp_path / "full")
        until(lambda: full.process.poll() is not None or "master serves" in full.log.read_text())
        if full.process.poll() is not None:  # it may start; if it does not, it says why
            assert "full" in full.log.read_text()
            assert "Traceback" not in full.log.read_text()
        full.kill()
        filler.unlink()
        master = MasterProcess(state, log=log).wait_ready()
        with KubeApi(master.kubeconfig) as api:
            assert names(api) == kept
            make(api, "new")
    finally:
        master.end()


def fill(api: KubeApi, prefix: str = "m") -> set[str]:
    """Writes until it is refused; what was acknowledged."""
    kept = set()
    for number in itertools.count():
        name = f"{prefix}{number}"
        try:
            make(api, name, 200_000)
        except ApiError as error:
            assert (error.code, error.reason) == (503, "ServiceUnavailable")
            assert "full" in str(error), error
            assert "make room" in str(error), error
            return kept
        kept.add(name)
    raise AssertionError("the disk never was full")


def make_or_not(api: KubeApi, name: str) -> bool:
    try:
        make(api, name)
    except ApiError as error:
        return error.reason == "AlreadyExists"
    return True


# ---- a damaged store -------------------------------------------------------------------------------------------------


def damage(store: Path) -> None:
    """Overwrites all but the first pages, as a failing disk might."""
    size = store.stat().st_size
    with store.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xa5" * (size - 8192))


def test_a_store_damaged_under_a_running_master_is_found_and_brought_back(tmp_path: Path) -> None:
    state = tmp_path / "master"
    with running_master(state) as master, KubeApi(master.kubeconfig) as api:
        for number in range(120):
            make(api, f"m{number}", 2000)
    master = MasterProcess(state).wait_ready()
    with KubeApi(master.kubeconfig) as api:
        kept = names(api)
        from hypervisor.master.store.backup import backup

        saved = backup(state / "store.db", tmp_path / "saved")
        damage(state / "store.db")
        assert names(api) == kept  # what is in memory is right
        with pytest.raises(ApiError, match="hv cluster restore") as caught:
            read_the_past(api)
        assert caught.value.code == 503
    master.kill()
    master = MasterProcess(state)
    assert master.process.wait(30) == 1
    said = master.log.read_text()
    assert "is damaged" in said
    assert "hv cluster restore" in said
    assert "Traceback" not in said
    put_back(saved.path, state / "store.db")
    with running_master(state) as master, KubeApi(master.kubeconfig) as api:
        assert names(api) == kept
        make(api, "new")


def read_the_past(api: KubeApi) -> None:
    """Reads revisions that only the file has."""
    newest = int(api.call("GET", MAPS)["metadata"]["resourceVersion"])
    for back in range(10, 110, 20):
        query = {"resourceVersion": str(newest - back), "resourceVersionMatch": "Exact"}
        api.call("GET", MAPS, query=query)


def put_back(saved: Path, store: Path) -> None:
    from hypervisor.master.store.backup import restore

    kept = restore(saved, store)
    assert kept is not None
    assert kept.exists()


# ---- clients that do not read ----------------------------------------------------------------------------------------


def resident(pid: int) -> int:
    """MiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) >> 10


def silent_watcher(config: Path) -> ssl.SSLSocket:
    """A client that asks for a watch and never reads what comes."""
    found = kubeconfig.load(config)
    parts, tls = urlsplit(found.server), found.tls()
    assert tls is not None
    plain = socket.create_connection((parts.hostname or "", parts.port or 0), 20)
    made = tls.wrap_socket(plain, server_hostname=parts.hostname)
    made.sendall(f"GET {MAPS}?watch=1&timeoutSeconds=300 HTTP/1.0\r\nHost: x\r\n\r\n".encode())  # no chunks
    assert made.recv(12) == b"HTTP/1.0 200"
    return made


def test_watchers_that_do_not_read_cost_bounded_memory(tmp_path: Path) -> None:
    with running_master(tmp_path / "master") as master, KubeApi(master.kubeconfig) as api, ExitStack() as stack:
        watchers = [stack.enter_context(silent_watcher(master.kubeconfig)) for _ in range(40)]
        make(api, "big", 1000)
        before = resident(master.process.pid)
        for number in range(120):  # 60 MB for each watcher, 2.4 GB for all
            api.patch(CONFIG_MAPS, "big", {"data": {"x": f"{number}" + "x" * 500_000}}, "default")
        assert resident(master.process.pid) - before < 200
        late = drained(watchers[0])
        assert late[-1]["type"] in ("ERROR", "MODIFIED")
        if late[-1]["type"] == "ERROR":
            assert late[-1]["object"]["code"] == 410
        make(api, "after")  # and the others are served as before


def test_what_there_is_is_not_copied_for_each_watcher(tmp_path: Path) -> None:
    with running_master(tmp_path / "master") as master, KubeApi(master.kubeconfig) as api, ExitStack() as stack:
        for number in range(40):
            make(api, f"big-{number}", 500_000)
        before = resident(master.process.pid)
        for _ in range(40):  # 20 MB for each, and as much again when joined: 1.6 GB for all
            stack.enter_context(silent_watcher(master.kubeconfig))
        api.patch(CONFIG_MAPS, "big-0", {"data": {"x": "less"}}, "default")
        assert resident(master.process.pid) - before < 600


def newest(obj: dict[str, Any]) -> str:
    return str(obj["data"].get("x", ""))


def drained(watcher: ssl.SSLSocket) -> list[dict[str, Any]]:
    """The events that a watcher gets who reads at last, until it is told to list again or has the newest."""
    watcher.settimeout(20)
    data, found = b"", list[dict[str, Any]]()
    while not found or (found[-1]["type"] != "ERROR" and not newest(found[-1]["object"]).startswith("119x")):
        try:
            data += watcher.recv(1 << 20)
        except (TimeoutError, OSError, HvError):
            break
        *lines, data = data.split(b"\n")
        found += [json.loads(line) for line in lines if line.startswith(b'{"type"')]
    return found
