"""``hv disk`` with the real tools of the field: fio, nbdcopy, nbdinfo, qemu-img, nbdkit, qemu-nbd."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HV = Path(sys.executable).parent / "hv"
TOOLS = ("fio", "nbdcopy", "nbdinfo", "qemu-img", "nbdkit", "qemu-nbd")
pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS), reason=f"needs {', '.join(TOOLS)}: make test installs them"
)


class Hv:
    """``hv`` with a state folder of the test's own."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.env = os.environ | {"HV_STATE_DIR": str(state)}

    def __call__(self, *words: str | Path, code: int = 0) -> str:
        done = subprocess.run(
            [HV, "disk", *words], env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == code, f"hv disk {words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def info(self, name: str) -> Any:
        return json.loads(self("info", name, "-o", "json"))

    @contextmanager
    def opened(self, name: str, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
        """The disk served in a process of its own; its address and the process."""
        process = subprocess.Popen(
            [HV, "disk", "open", name, *options],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("nbd+unix"), address
            yield address, process
        finally:
            process.terminate()
            process.wait(30)
            process.stdout.close()


@pytest.fixture
def hv(tmp_path: Path) -> Hv:
    return Hv(tmp_path)


def run(*words: str | Path, timeout: float = 120) -> str:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.05)
    return found


def some_bytes(path: Path, size: int = 4 << 20) -> Path:
    path.write_bytes(os.urandom(size))
    return path


def fio(address: str, *options: str) -> list[str | Path]:
    return ["fio", "--name=x", "--ioengine=nbd", f"--uri={address}", "--bs=4k", "--iodepth=16", "--rw=randwrite",
            "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--size=16m", *options]  # fmt: skip


def test_real_clients_read_and_write(hv: Hv, tmp_path: Path) -> None:
    source = some_bytes(tmp_path / "source")
    hv("create", "d", "--size", "32Mi", "--filter", "stats")
    with hv.opened("d") as (address, _):
        run("nbdcopy", source, address)
        assert "32M" in run("nbdinfo", address)
        assert json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", address))["virtual-size"] == 32 << 20
        run("nbdcopy", address, tmp_path / "copy")
        run(*fio(address, "--offset=8m"))
        figures = hv.info("d")["live"]["figures"]
        assert figures["writes"] >= 4096
        assert figures["errors"] == 0
    assert (tmp_path / "copy").read_bytes()[: 4 << 20] == source.read_bytes()
    hv("export", "d", tmp_path / "d.qcow2")
    hv("import", tmp_path / "d.qcow2", "e", "--format", "qcow2")
    hv("export", "e", tmp_path / "e.raw", "--format", "raw")
    assert (tmp_path / "e.raw").read_bytes()[: 4 << 20] == source.read_bytes()


def test_the_chain_changes_under_a_verifying_load(hv: Hv) -> None:
    hv("create", "d", "--size", "32Mi")
    with hv.opened("d") as (address, _):
        load = subprocess.Popen(fio(address, "--loops=6"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        pauses = []
        while load.poll() is None:
            for words in (
                ("add", "d", "stats"),
                ("add", "d", "throttle", "iops=1000000"),
                ("set", "d", "throttle", "iops=500000"),
                ("rm", "d", "throttle"),
                ("rm", "d", "stats"),
            ):
                answer = hv("filter", *words)
                pauses.append(float(answer.split("waited ")[1].split(" ms")[0]))
        output, _ = load.communicate(timeout=60)
        assert load.returncode == 0, output
        assert len(pauses) >= 5
        assert hv.info("d")["filters"] == []


def test_a_clone_reads_through_its_base(hv: Hv, tmp_path: Path) -> None:
    source = some_bytes(tmp_path / "source")
    hv("create", "base", "--size", "32Mi")
    hv("open", "base", "--", "nbdcopy", source, "{}")
    hv("clone", "base", "c")
    with hv.opened("c") as (address, _):
        run("nbdcopy", address, tmp_path / "copy")
        run(*fio(address, "--offset=8m"))
        figures = hv.info("c")["live"]["figures"]
        assert figures["redirects_out"] > 0
    assert (tmp_path / "copy").read_bytes()[: 4 << 20] == source.read_bytes()
    assert "is the base of c" in hv("rm", "base", code=1)
    assert "open it read-only" in hv("open", "base", "--", "true", code=1)
    hv("open", "base", "--read-only", "--", "nbdcopy", "{}", str(tmp_path / "again"))
    assert (tmp_path / "again").read_bytes()[4 << 20 :].count(0) == 28 << 20  # nothing that was written to the clone
    assert (tmp_path / "again").read_bytes()[: 4 << 20] == source.read_bytes()


def test_a_handle_at_a_filter(hv: Hv, tmp_path: Path) -> None:
    """Above encryption the content is seen, below it what is stored."""
    key = tmp_path / "key"
    key.write_text(os.urandom(64).hex())
    key.chmod(0o600)
    source = some_bytes(tmp_path / "source")
    hv("create", "d", "--size", "8Mi", "--filter", f"encrypt,key={key}")
    with hv.opened("d") as (address, _):
        run("nbdcopy", source, address)
        hv("open", "d", "--at", "encrypt", "--read-only", "--", "nbdcopy", "{}", str(tmp_path / "below"))
        run("nbdcopy", address, tmp_path / "above")
    below = (tmp_path / "below").read_bytes()
    assert (tmp_path / "above").read_bytes()[: 4 << 20] == source.read_bytes()
    assert below[: 4 << 20] != source.read_bytes()
    assert below[: 4 << 20] == (tmp_path / "disks/d/data.raw").read_bytes()[: 4 << 20]


@pytest.mark.parametrize("server", ["nbdkit", "qemu-nbd"])
def test_another_server_as_data(hv: Hv, tmp_path: Path, server: str) -> None:
    data, socket = tmp_path / "data", tmp_path / "server.sock"
    data.write_bytes(bytes(32 << 20))
    command: list[str | Path] = ["nbdkit", "--foreground", "--unix", socket, "file", data]
    if server == "qemu-nbd":
        command = ["qemu-nbd", "--persistent", "--shared=4", "--format=raw", f"--socket={socket}", data]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        until(socket.is_socket)
        hv("create", "d", "--size", "32Mi", "--nbd", str(socket), "--filter", "stats")
        with hv.opened("d") as (address, _):
            run(*fio(address, "--offset=8m"))
    finally:
        process.terminate()
        process.wait(30)
    assert data.read_bytes()[8 << 20 :].count(0) < 20 << 20


def test_kill_of_the_process_that_has_it_open(hv: Hv, tmp_path: Path) -> None:
    source = some_bytes(tmp_path / "source")
    hv("create", "base", "--size", "32Mi")
    hv("clone", "base", "c")
    with hv.opened("c") as (address, process):
        run("nbdcopy", "--flush", source, address)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    hv("open", "c", "--", "nbdcopy", "{}", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes()[: 4 << 20] == source.read_bytes()
    left = {path.name for path in (tmp_path / "disks/c").iterdir()}
    assert left == {"disk.json", "data.raw", "linkedclone.state", "lock"}


def test_refusals(hv: Hv, tmp_path: Path) -> None:
    hv("create", "d", "--size", "8Mi")
    assert "already" in hv("create", "d", "--size", "8Mi", code=1)
    assert "no filter nosuch; there are" in hv("filter", "add", "d", "nosuch", code=1)
    assert "KEY=VALUE" in hv("filter", "add", "d", "throttle", "fast", code=1)
    assert "needs --shrink" in hv("resize", "d", "4Mi", code=1)
    assert "no disk e" in hv("info", "e", code=1)
    with hv.opened("d"):
        assert "another process" in hv("rm", "d", code=1)
    path = tmp_path / "disks/d/disk.json"
    path.write_text(path.read_text().replace("8388608", "8388609"))
    assert "damaged" in hv("open", "d", "--", "true", code=1)
    assert "damaged" in hv("ls")
    backed = tmp_path / "backed.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", backed, "8M")
    assert "backing file" in hv("import", backed, "x", "--format", "qcow2", code=1)


def test_a_hundred_clones(hv: Hv) -> None:
    """Their number costs no more than their folders."""
    hv("create", "base", "--size", "1Gi")
    script = f"""
from pathlib import Path
from hypervisor.iofilter.store import DiskStore
store = DiskStore(Path({str(hv.state / "disks")!r}))
for i in range(100):
    store.clone("base", f"c{{i}}")
"""
    run(sys.executable, "-c", script)
    used = sum(path.stat().st_blocks * 512 for path in (hv.state / "disks").rglob("*") if path.is_file())
    assert used < 100 * 64 * 1024
    assert hv("ls", "-o", "name").count("\n") == 101
