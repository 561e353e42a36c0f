"""A disk over vhost-user-blk: ours beside qemu-storage-daemon's export, 4 KiB random, one front end without a guest for
both; and in a guest under TCG beside QEMU's own virtio-blk, in one guest that has both disks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from measure import Figure
from nbd import await_socket, process

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/integration"))

SIZE = 256 << 20
SECONDS = 1.0
DEPTHS = (1, 32)
WAYS = ("read", "write")
BUILT = ROOT / "build/c"
SERVER, DRIVER = BUILT / "hv-blkd", BUILT / "hv-blk-bench"
BAR = 1.5
GUEST_BARS = {1: 1.0, 16: 1.4}
_GUEST_LINE = re.compile(r"^bench (vd[ab]) (\d+) (\d+)", re.MULTILINE)

Samples = dict[tuple[str, str, int], list[float]]


def ours(socket: Path, image: Path, *, direct: bool) -> list[str | Path]:
    """The command line of our disk process."""
    return [SERVER, "--socket", socket, "--file", image, *(["--direct"] if direct else [])]


def rival(socket: Path, image: Path, *, direct: bool) -> list[str | Path]:
    """qemu-storage-daemon, with io_uring too."""
    cache = "cache.direct=on," if direct else ""
    return [
        *("qemu-storage-daemon", "--blockdev"),
        f"driver=file,node-name=disk,filename={image},{cache}aio=io_uring,locking=off",
        *("--export", f"type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable=on"),
    ]


def drive(socket: Path, way: str, depth: int, *, polling: bool = False) -> dict[str, float]:
    """One run of the front end."""
    words = [DRIVER, socket, way, str(depth), str(SECONDS), str(SIZE >> 20), *(["poll"] if polling else [])]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    found: dict[str, float] = json.loads(done.stdout)
    return found


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """An image full of data that does not compress, gone afterwards."""
    image = folder / "block-bench.raw"
    image.write_bytes(os.urandom(1 << 20) * (SIZE >> 20))
    try:
        yield image
    finally:
        image.unlink()


def beside_each_other(rounds: int, folder: Path, *, direct: bool) -> Samples:
    """Requests a second by (server, way, depth), interleaved."""
    samples: Samples = {}
    with disk(folder) as image, tempfile.TemporaryDirectory(prefix="hv-bench-") as sockets, ExitStack() as stack:
        servers = {"ours": ours, "qemu-storage-daemon": rival}
        paths = {name: Path(sockets, f"{name}.sock") for name in servers}
        for name, words in servers.items():
            stack.enter_context(process(*words(paths[name], image, direct=direct)))
            await_socket(paths[name])
        for _ in range(rounds):
            for way in WAYS:
                for depth in DEPTHS:
                    for name, path in paths.items():
                        samples.setdefault((name, way, depth), []).append(drive(path, way, depth)["iops"])
    return samples


def compared(where: str, samples: Samples) -> list[Figure]:
    """What each did, and how many times the rival's we did, round by round."""
    figures = []
    for way in WAYS:
        for depth in DEPTHS:
            mine, other = (samples[name, way, depth] for name in ("ours", "qemu-storage-daemon"))
            what = f"4 KiB random {way}, depth {depth}, {where}"
            figures.append(Figure(f"{what}: ours", "IOPS", tuple(mine)))
            figures.append(Figure(f"{what}: qemu-storage-daemon", "IOPS", tuple(other)))
            ratios = tuple(a / b for a, b in zip(mine, other, strict=True))
            figures.append(Figure(f"{what}: ours / qemu-storage-daemon", "x", ratios, BAR, at_least=True))
    return figures


def in_a_guest(folder: Path, image: Path) -> str:
    """The console of a guest whose first disk is ours and whose second is QEMU's; see tests/c/blk/guest.c."""
    from blk_guest import build_initrd

    from hypervisor.vmm.argv import kernel_command_line
    from hypervisor.vmm.guest import GuestImage

    guest = GuestImage.load()
    initrd = build_initrd(folder, guest.initrd)
    socket = folder / "guest.sock"
    with process(*ours(socket, image, direct=False)):
        await_socket(socket)
        words = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-accel", "tcg", "-cpu", "max", "-m", "256M"),
            *("-machine", "q35,memory-backend=ram", "-object", "memory-backend-memfd,id=ram,size=256M,share=on"),
            *("-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", guest.kernel, "-initrd", initrd),
            *("-append", kernel_command_line("tcg", ("blk.bench=vda,vdb",))),
            *("-chardev", f"socket,id=ours,path={socket}", "-device", "vhost-user-blk-pci,chardev=ours,num-queues=1"),
            *("-drive", f"file={image},format=raw,if=none,id=theirs,file.locking=off"),
            *("-device", "virtio-blk-pci,drive=theirs,num-queues=1"),
        ]
        done = subprocess.run(words, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    return done.stdout


def guest_figures(console: str) -> list[Figure]:
    """By depth, round by round."""
    samples: dict[tuple[str, int], list[float]] = {}
    for name, depth, iops in _GUEST_LINE.findall(console):
        samples.setdefault((name, int(depth)), []).append(float(iops))
    figures = []
    for depth, bar in GUEST_BARS.items():
        mine, other = samples["vda", depth], samples["vdb", depth]
        what = f"4 KiB random read in a TCG guest, depth {depth}, page cache"
        figures.append(Figure(f"{what}: ours", "IOPS", tuple(mine)))
        figures.append(Figure(f"{what}: QEMU's virtio-blk", "IOPS", tuple(other)))
        ratios = tuple(a / b for a, b in zip(mine, other, strict=True))
        figures.append(Figure(f"{what}: ours / QEMU's virtio-blk", "x", ratios, bar, at_least=True))
    return figures


def run(rounds: int) -> list[Figure]:
    """A file on tmpfs, a file on a real disk with O_DIRECT, a guest."""
    with tempfile.TemporaryDirectory(prefix="hv-bench-", dir="/dev/shm") as memory:
        figures = compared("file on tmpfs", beside_each_other(rounds, Path(memory), direct=False))
    with tempfile.TemporaryDirectory(prefix="hv-bench-", dir="/var/tmp") as real:
        figures += compared("file on a disk, O_DIRECT", beside_each_other(rounds, Path(real), direct=True))
        with disk(Path(real)) as image:
            figures += guest_figures(in_a_guest(Path(real), image))
    return figures
