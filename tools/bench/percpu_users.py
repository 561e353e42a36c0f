"""Per-CPU areas and contexts on the real data plane, on against off: fault server, block device, vsock device."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from measure import Figure

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
CSRC, TESTS = ROOT / "csrc", ROOT / "tests" / "c" / "vsock"
COUNTED, COUNTS, READS = 2000, 3, 20_000
WRAPPED = ("epoll_wait", "epoll_pwait2", "poll", "ioctl", "pv_vsock_run")
NOT_LINKED = {"preload.c", "preload_trim.c", "disks.c", "blk/guest.c"}

USERS = {"fault": "a fault", "block": "a 4 KiB read", "vsock": "64 bytes there and back over vsock"}
CASES = {
    "anywhere": "server is a thread that the kernel places",
    "same": "a thread on the asking CPU",
    "traced": "the same, traced",
    "context": "a context on the asking CPU",
    "anywhere_moving": "asker moves every 50, thread that the kernel places",
    "follows_moving": "asker moves every 50, thread is moved after it",
    "context_moving": "asker moves every 50, context is moved after it",
    "same_cpu": "a thread on the asking CPU: its CPU time",
    "traced_cpu": "the same, traced: its CPU time",
}
REQUESTS = {"list": "its disk's own free list", "cache": "a per-CPU cache", "malloc": "malloc"}
COUNTERS = {"shipped": "counters as shipped", "percpu": "per-CPU counters"}

Samples = dict[tuple[str, str, str], list[float]]


def figures(folder: Path, rounds: int) -> list[Figure]:
    """Times of both programs, taken in turns; then instructions."""
    programs = {counters: build(folder, counters) for counters in COUNTERS}
    samples: Samples = {}
    for _ in range(rounds):
        for counters, program in programs.items():
            for line in subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines():
                user, case, value = line.split()
                samples.setdefault((counters, user, case), []).append(float(value) / 1000)
    found = [figure for user in USERS for figure in (*_times(samples, user), *_instructions(programs, user))]
    return [*found, *request_caches(folder, rounds)]


def build(folder: Path, counters: str) -> Path:
    """The data plane with one kind of counters, as it is shipped: -O2, no sanitizer."""
    place = folder / f"users-{counters}"
    place.mkdir()
    per_cpu = counters == "percpu"
    vsock = [*CSRC.glob("vsock/*.c"), *CSRC.glob("vhost/*.c")]
    parts = ("percpu", "common", "iofilter", "iofilter/filters/*", "blk", "memory")
    rest = [path for part in parts for path in CSRC.glob(f"{part}/*.c") if not _is_left_out(path)]
    rest += [FOLDER / "percpu_users.c", TESTS / "frontend.c", CSRC / "blk" / "driver" / "driver.c"]
    flags = ("-O2", "-g", "-D_GNU_SOURCE", "-std=gnu11", f"-I{CSRC}", f"-I{TESTS}", f"-I{FOLDER}")

    def counting(name: str) -> tuple[str, ...]:
        return ("-include", "percpu_users.h", f"-D{name}") if per_cpu else ()

    device, libraries = place / "vsock.o", ("-pthread", "-luring", "-lcrypto", "-lzstd")
    wrapped = [f"-Wl,--wrap={name}" for name in (*WRAPPED, *(("pv_fault_count",) if per_cpu else ()))]
    subprocess.run(["gcc", *flags, *counting("COUNT_VSOCK"), "-r", *vsock, "-o", device], check=True)
    words = [*flags, *counting("COUNT_BLOCK"), *rest, device, *wrapped, *libraries, "-o", place / "users"]
    subprocess.run(["gcc", *map(str, words)], check=True)
    return place / "users"


def _is_left_out(path: Path) -> bool:
    return path.name in NOT_LINKED or f"{path.parent.name}/{path.name}" in NOT_LINKED


def _times(samples: Samples, user: str) -> list[Figure]:
    """Each case with the counters that are shipped, and with per-CPU ones where these make the difference; ratios."""

    def figure(counters: str, case: str) -> Figure:
        note = "" if counters == "shipped" else f", {COUNTERS[counters]}"
        return Figure(f"{USERS[user]}, {CASES[case]}{note}", "us", tuple(samples[counters, user, case]))

    def ratio(name: str, over: tuple[str, str], under: tuple[str, str]) -> Figure:
        pairs = zip(samples[over[0], user, over[1]], samples[under[0], user, under[1]], strict=True)
        return Figure(f"{USERS[user]}: {name}", "x", tuple(a / b for a, b in pairs))

    return [
        *(figure("shipped", case) for case in CASES),
        *(figure("percpu", case) for case in ("same", "same_cpu")),
        ratio("counters as shipped over per-CPU ones, CPU time", ("shipped", "same_cpu"), ("percpu", "same_cpu")),
        ratio("thread over context, asking CPU", ("shipped", "same"), ("shipped", "context")),
        ratio("thread moved over context moved", ("shipped", "follows_moving"), ("shipped", "context_moving")),
        ratio("thread that the kernel places over thread moved", ("shipped", "anywhere_moving"),
              ("shipped", "follows_moving")),
        ratio("traced over not, CPU time", ("shipped", "traced_cpu"), ("shipped", "same_cpu")),
    ]  # fmt: skip


def _instructions(programs: dict[str, Path], user: str) -> list[Figure]:
    """Of one operation, both ends together, in user space. Of a read what the device does alone: how often its loop
    and the front end find each other asleep is another each time, and is more than what is looked for.
    """
    within = "pv_blk_serve" if user == "block" else ""
    where = ", device alone" if within else ""

    def figure(counters: str, case: str) -> Figure:
        program = programs[counters]
        each = []
        for _ in range(COUNTS):
            one, two = (collected(program, user, case, str(n), within=within) for n in (COUNTED, 2 * COUNTED))
            each.append((two - one) / COUNTED)
        return Figure(f"{USERS[user]}{where}, {CASES[case]}, {COUNTERS[counters]}", "instructions", tuple(each))

    wanted = (("shipped", "same"), ("percpu", "same"), ("shipped", "traced"), ("shipped", "context"))
    return [figure(counters, case) for counters, case in wanted if case != "context" or not within]


def collected(program: Path, *words: str, within: str = "") -> int:
    """Instructions of a run that counts, in user space; or of one function and what it calls."""
    tool = ("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--fair-sched=yes")
    only = (f"--toggle-collect={within}",) if within else ()
    command = [*tool, *only, str(program), "count", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found, done.stderr
    return int(found[1])


def request_caches(folder: Path, rounds: int) -> list[Figure]:
    """Where the requests of a linked clone come from."""
    program = folder / "requests"
    parts = ("percpu", "common", "iofilter", "iofilter/filters/*")
    sources = [path for part in parts for path in CSRC.glob(f"{part}/*.c") if not _is_left_out(path)]
    flags = ("-O2", "-g", "-D_GNU_SOURCE", "-std=gnu11", f"-I{CSRC}", f"-I{ROOT / 'tests/c/iofilter'}")
    wrapped = ("-Wl,--wrap=pv_take_child,--wrap=pv_give_child", "-pthread", "-luring", "-lcrypto")
    command = ["gcc", *flags, FOLDER / "percpu_requests.c", *sources, *wrapped, "-o", program]
    subprocess.run(list(map(str, command)), check=True)
    samples: dict[str, list[float]] = {}
    done = subprocess.run([program, str(rounds), folder], check=True, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        case, value = line.split()
        samples.setdefault(case, []).append(float(value))
    found = []
    for case, what in REQUESTS.items():
        counts = [collected(program, case, str(reads), str(folder)) for reads in (READS, 2 * READS)]
        name = f"4 KiB read of a linked clone, its request from {what}"
        found += [
            Figure(name, "ns", tuple(samples[case])),
            Figure(name, "instructions", ((counts[1] - counts[0]) / READS,)),
            Figure(f"{name}: memory that 32 clones keep", "KiB", (samples[f"{case}_bytes"][-1] / 1024,)),
        ]
    return found
