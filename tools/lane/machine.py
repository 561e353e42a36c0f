"""Boots L1 and brings back what its tests left."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import threading
from dataclasses import dataclass
from pathlib import Path

from lane.rootdisk import RootDisk

RESULT_BYTES = 256 << 20
_KERNEL = "console=ttyS0 quiet loglevel=2 panic=-1 tsc=reliable no_timer_check mitigations=off"


@dataclass(frozen=True)
class Size:
    """What L1 is given.

    :param dilation: seconds of the machine that are one second in L1, about: L1 is told that its TSC ticks so many
        times faster than it does, so that whatever has a time limit there, the code under test included, has more of
        the machine's time. 1 for figures
    """

    vcpus: int
    memory_mib: int
    dilation: int = 1


def run(root: RootDisk, project: Path, results: Path, size: Size, timeout_s: float) -> int:
    """Boots L1, shows its console, unpacks what it left into `results`; pytest's exit status.

    :raises SystemExit: L1 gave no results, or not within `timeout_s`
    """
    back = results / "disk"
    with back.open("wb") as file:
        file.truncate(RESULT_BYTES)
    argv = _argv(root, project, back, size)
    timed_out = _stream(argv, results / "console.log", timeout_s)
    try:
        with tarfile.open(back, "r:") as archive:
            archive.extractall(results, filter="data")
        status = int((results / "exit-code").read_text())
    except (tarfile.TarError, OSError, ValueError):
        why = f"did not end within {timeout_s:g} s" if timed_out else "ended without results"
        raise SystemExit(f"kvm-lane: L1 {why}; its console is in {results / 'console.log'}") from None
    finally:
        back.unlink()
    return status


def _argv(root: RootDisk, project: Path, back: Path, size: Size) -> list[str]:
    def disk(path: Path, read_only: bool) -> list[str]:
        node = f"file={path},if=virtio,format=raw,cache=unsafe,readonly={'on' if read_only else 'off'}"
        return ["-drive", node]

    return [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "pc",
        # emulates AMD's virtualization, nested page tables included
        "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(size.vcpus), "-m", str(size.memory_mib),
        "-serial", "stdio", "-kernel", str(root.kernel), "-initrd", str(root.initrd),
        "-append", f"{_KERNEL}{_slower_clock(size.dilation)}",
        "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
        *disk(root.disk, True), *disk(project, True), *disk(back, False),
    ]  # fmt: skip


def _slower_clock(dilation: int) -> str:
    """The kernel trusts this early value (it has no better one within a percent), and ``tsc=reliable`` asks no other
    clock. TCG hands the machine's own TSC on."""
    khz = _machine_tsc_khz()
    return f" tsc_early_khz={dilation * khz}" if dilation > 1 and khz else ""


def _machine_tsc_khz() -> int:
    """About; 0 where it is not told."""
    found = re.search(r"^cpu MHz\s*: (\d+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1000 if found else 0


def _stream(argv: list[str], log: Path, timeout_s: float) -> bool:
    """Shows and keeps L1's console until it ends; whether it had to be ended."""
    expired = threading.Event()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu, log.open("wb") as kept:

        def end() -> None:
            expired.set()
            qemu.kill()

        timer = threading.Timer(timeout_s, end)
        timer.start()
        try:
            assert qemu.stdout is not None
            while chunk := qemu.stdout.read1(65536):
                kept.write(chunk)
                sys.stdout.buffer.write(chunk.replace(b"\r\n", b"\n"))
                sys.stdout.buffer.flush()
        finally:
            timer.cancel()
            qemu.kill()
    return expired.is_set()
