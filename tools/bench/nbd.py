"""A disk over NBD: ours beside nbdkit's file plugin and qemu-nbd, 4 KiB random, fio as client; filters; redirects."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from measure import Figure

SIZE = 256 << 20
SECONDS = 1.5
DEPTHS = (1, 32)
WAYS = ("randread", "randwrite")
HV = Path(sys.executable).parent / "hv"
TICK = os.sysconf("SC_CLK_TCK")

Samples = dict[tuple[str, str, int], list[float]]


@contextmanager
def process(*words: str | Path, env: dict[str, str] | None = None) -> Iterator[int]:
    """A server for the length of a block; its process id."""
    running = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=env)
    try:
        yield running.pid
    finally:
        running.terminate()
        running.wait()


def await_socket(path: Path) -> Path:
    end = time.monotonic() + 30
    while not path.is_socket():
        if time.monotonic() > end:
            raise TimeoutError(f"no server on {path}")
        time.sleep(0.02)
    return path


class Servers:
    """All that is compared, each on a socket of its own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._env = os.environ | {"HV_STATE_DIR": str(folder / "state")}
        self.pids: dict[str, int] = {}

    def data(self, name: str) -> Path:
        path = self._folder / f"{name}.raw"
        path.write_bytes(os.urandom(1 << 20) * (SIZE >> 20))
        return path

    def socket(self, name: str) -> Path:
        return self._folder / f"{re.sub('[^a-z0-9]+', '-', name)}.sock"

    def start(self, name: str, *words: str | Path) -> None:
        self.pids[name] = self._stack.enter_context(process(*words, env=self._env))
        await_socket(self.socket(name))

    def hv(self, *words: str | Path) -> None:
        subprocess.run([HV, "disk", *words], check=True, env=self._env, stdout=subprocess.DEVNULL)

    def ours(self, name: str, disk: str) -> None:
        self.start(name, HV, "disk", "open", disk, "--socket", self.socket(name))

    def fill(self, disk: str) -> None:
        self.hv("open", disk, "--", "nbdcopy", self.data("source"), "{}")


def start_all(servers: Servers) -> None:
    """Ours plain, with eight pass-through filters, and a clone whose reads are redirected; nbdkit and qemu-nbd."""
    size = ("--size", str(SIZE))
    servers.hv("create", "plain", *size)
    servers.fill("plain")
    servers.ours("podvisor", "plain")
    servers.hv("create", "eight", *size)
    servers.fill("eight")
    for i in range(8):
        servers.hv("filter", "add", "eight", "null", "--as", f"null{i}")
    servers.ours("podvisor, 8 filters", "eight")
    servers.hv("create", "base", *size)
    servers.fill("base")
    servers.hv("clone", "base", "clone")
    servers.ours("podvisor, redirect", "clone")
    file = servers.data("nbdkit")
    nbdkit = ("nbdkit", "--foreground", "--unix")
    servers.start("nbdkit", *nbdkit, servers.socket("nbdkit"), "file", file)
    qemu = servers.data("qemu-nbd")
    servers.start(
        "qemu-nbd", "qemu-nbd", "--persistent", "--format=raw", f"--socket={servers.socket('qemu-nbd')}", qemu
    )


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def load(socket: Path, way: str, depth: int) -> float:
    """IOPS."""
    uri = f"--uri=nbd+unix:///?socket={socket}"
    shape = (f"--rw={way}", "--bs=4k", f"--iodepth={depth}", f"--size={SIZE}", "--time_based", f"--runtime={SECONDS}")
    words = ["fio", "--name=x", "--ioengine=nbd", uri, *shape, "--output-format=json"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job[way.removeprefix("rand")]["iops"])


def measure(rounds: int) -> tuple[Samples, Samples]:
    """IOPS, and microseconds of the server's CPU a request, by server, way and depth."""
    iops: Samples = {}
    cpu: Samples = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        servers = Servers(folder, stack)
        start_all(servers)
        for _ in range(rounds):
            for way in WAYS:
                for depth in DEPTHS:
                    for name, pid in servers.pids.items():
                        if name == "podvisor, redirect" and way == "randwrite":
                            continue  # what a clone has written is no longer redirected
                        before = cpu_seconds(pid)
                        rate = load(servers.socket(name), way, depth)
                        iops.setdefault((name, way, depth), []).append(rate)
                        used = (cpu_seconds(pid) - before) / (rate * SECONDS)
                        cpu.setdefault((name, way, depth), []).append(used * 1e6)
    return iops, cpu


def ratio(over: list[float], under: list[float]) -> tuple[float, ...]:
    return tuple(a / b for a, b in zip(over, under, strict=True))


def run(rounds: int) -> list[Figure]:
    """The figures of section 5 of the page on disks."""
    iops, cpu = measure(rounds)
    figures = [Figure(f"{name}, {way}, depth {depth}", "IOPS", tuple(s)) for (name, way, depth), s in iops.items()]
    for way in WAYS:
        for depth in DEPTHS:
            ours = iops["podvisor", way, depth]
            case = f"{way}, depth {depth}"
            least = 3 if depth == 32 else 1.5
            figures += [
                Figure(f"podvisor / nbdkit, {case}", "x", ratio(ours, iops["nbdkit", way, depth]), 1, True),
                Figure(f"podvisor / qemu-nbd, {case}", "x", ratio(ours, iops["qemu-nbd", way, depth]), least, True),
                Figure(
                    f"server CPU a request, podvisor / nbdkit, {case}",
                    "x",
                    ratio(cpu["podvisor", way, depth], cpu["nbdkit", way, depth]),
                    0.8,
                ),
                Figure(
                    f"8 filters / none, {case}", "x", ratio(iops["podvisor, 8 filters", way, depth], ours), 0.9, True
                ),
            ]
    for depth in DEPTHS:
        direct = iops["podvisor", "randread", depth]
        kept = ratio(iops["podvisor, redirect", "randread", depth], direct)
        figures.append(
            Figure(f"redirect on one loop / direct, depth {depth}", "x", kept, 0.9 if depth == 32 else None, True)
        )
    return figures
