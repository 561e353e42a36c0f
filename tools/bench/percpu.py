"""Per-CPU private data areas beside what they replace; not one add lost; a breakpoint at every instruction."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import percpu_users
from measure import Figure

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
CSRC, TESTS = ROOT / "csrc", ROOT / "tests" / "c" / "percpu"
ADDS = 1_000_000_000

WHAT = {
    "tls": "thread-local `++`",
    "percpu": "per-CPU add",
    "outside": "as public rseq libraries add: place found outside, no handle checked",
    "delayed": "per-CPU add by delayed preemption, in the area of the worker",
    "owned": "a counter with one writer, load and store",
    "getcpu": "`sched_getcpu` and an atomic add",
    "atomic": "shared atomic",
    "mutex": "mutex",
    "percpu_2": "per-CPU add, 2 threads",
    "atomic_2": "shared atomic, 2 threads",
    "mutex_2": "mutex, 2 threads",
    "malloc_2": "malloc and free of 256 bytes, 2 threads",
    "magazine_2": "request cache, alloc and free of 256 bytes, 2 threads",
    "malloc_deep_2": "malloc and free, 32 in use, 2 threads",
    "magazine_deep_2": "request cache, 32 in use, 2 threads",
    "own": "free list of one thread, take and give",
    "magazine": "request cache, alloc and free, one thread",
    "own_deep": "free list of one thread, 32 in use",
    "magazine_deep": "request cache, 32 in use, one thread",
    "ring": "record of 24 bytes through a per-CPU ring, both ends",
    "trace": "trace event",
    "trace_2": "trace event, 2 threads",
    "shared_trace_2": "the same into one ring for all, 2 threads",
    "trace_off": "trace point while tracing is off",
}
FAULTS = {
    "thread_anywhere": "a fault served by a thread that the kernel places",
    "thread_other": "by a thread on another CPU",
    "thread_same": "by a thread on the asking CPU",
    "thread_same_atomics": "the same, with five shared atomic counters",
    "thread_same_percpu": "the same, with five per-CPU counters",
    "context_same": "by a context on the asking CPU",
    "thread_anywhere_moving": "asker moves every 50 faults; thread that the kernel places",
    "thread_follows_moving": "asker moves every 50 faults; thread is moved after it",
    "context_follows_moving": "asker moves every 50 faults; context is moved after it",
}


def build(folder: Path, name: str, *sources: Path) -> Path:
    """A program of `sources` and the library, as it is shipped: -O2, no sanitizer."""
    program = folder / name
    flags = ("-O2", "-g", "-D_GNU_SOURCE", "-std=gnu11", "-no-pie", f"-I{CSRC}", f"-I{TESTS}")
    library = sorted((CSRC / "percpu").glob("*.c"))
    subprocess.run(["gcc", *flags, *sources, *library, "-o", program, "-pthread"], check=True)
    return program


def run(rounds: int) -> list[Figure]:
    """Every case in turn, `rounds` times; then the checks that are counted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = measure(build(folder, "percpu", FOLDER / "percpu.c"), WHAT, rounds)
        faults = measure(build(folder, "faults", FOLDER / "percpu_faults.c"), FAULTS, rounds)
        return [
            *(Figure(WHAT[case], "ns", values) for case, values in samples.items()),
            *ratios(samples),
            *(Figure(FAULTS[case], "us", tuple(v / 1000 for v in values)) for case, values in faults.items()),
            *_followers(faults),
            *_adds(build(folder, "adds", TESTS / "test_adds.c")),
            *_delayed(build(folder, "context", TESTS / "test_context.c")),
            _breakpoints(build(folder, "break", TESTS / "test_break.c")),
            *percpu_users.figures(folder, rounds),
        ]


def measure(program: Path, cases: dict[str, str], rounds: int) -> dict[str, tuple[float, ...]]:
    """Nanoseconds of one operation, by case."""
    samples: dict[str, list[float]] = {case: [] for case in cases}
    lines = subprocess.run([program, str(rounds)], check=True, capture_output=True, text=True).stdout
    for line in lines.splitlines():
        case, value = line.split()
        samples[case].append(float(value))
    return {case: tuple(values) for case, values in samples.items()}


def ratios(samples: dict[str, tuple[float, ...]]) -> list[Figure]:
    """What is promised, each ratio of two cases of the same round."""

    def ratio(name: str, over: str, under: str, bar: float, *, at_least: bool) -> Figure:
        values = tuple(a / b for a, b in zip(samples[over], samples[under], strict=True))
        return Figure(name, "x", values, bar=bar, at_least=at_least)

    # A thread-local ++ has two speeds, by how the processor forwards its store; so the best of each are compared, too.
    best = Figure("the same, best over best", "x", (min(samples["percpu"]) / min(samples["tls"]),))
    return [
        ratio("per-CPU add over thread-local `++`", "percpu", "tls", 1.8, at_least=False),
        best,
        ratio("`sched_getcpu` and atomic over per-CPU add", "getcpu", "percpu", 7, at_least=True),
        ratio("shared atomic over per-CPU add, 2 threads", "atomic_2", "percpu_2", 14, at_least=True),
        ratio("one trace ring for all over one for each CPU, 2 threads", "shared_trace_2", "trace_2", 1, at_least=True),
        ratio("malloc over request cache, 2 threads", "malloc_2", "magazine_2", 3, at_least=True),
        ratio("malloc over request cache, 32 in use, 2 threads", "malloc_deep_2", "magazine_deep_2", 3, at_least=True),
    ]


def _followers(faults: dict[str, tuple[float, ...]]) -> list[Figure]:
    """What bringing the server to the asking CPU gains, and what a context adds to a thread there."""

    def ratio(name: str, over: str, under: str) -> Figure:
        return Figure(name, "x", tuple(a / b for a, b in zip(faults[over], faults[under], strict=True)))

    return [
        ratio("thread placed by the kernel over thread moved after the asker", "thread_anywhere_moving",
              "thread_follows_moving"),
        ratio("thread moved over context moved", "thread_follows_moving", "context_follows_moving"),
        ratio("a fault with five shared atomics over one with five per-CPU counters", "thread_same_atomics",
              "thread_same_percpu"),
    ]  # fmt: skip


def _adds(program: Path) -> list[Figure]:
    """The test program compares the sum; it fails when one is lost. Run without and with signals."""
    text = subprocess.run([program, str(ADDS)], capture_output=True, text=True, check=False)
    moves = tuple(float(rate) for rate in re.findall(r"(\d+) moves a second", text.stdout))
    lost = 0.0 if text.returncode == 0 and len(moves) == 2 else 1.0
    return [
        Figure(
            "10^9 adds of 16 threads that are moved, and again with signals: runs that lost one", "", (lost,), bar=0
        ),
        Figure("how often a thread was moved meanwhile", "1/s", moves or (0.0,), bar=1000, at_least=True),
    ]


def _delayed(program: Path) -> list[Figure]:
    """The same by the second embodiment: contexts that a signal preempts and a balancer moves."""
    text = subprocess.run([program, str(ADDS)], capture_output=True, text=True, check=False)
    found = re.search(r"adds, (\d+) signals", text.stdout)
    signals = float(found[1]) if found else 0.0
    return [
        Figure(
            "10^9 adds of contexts that are preempted: runs that lost one", "", (float(text.returncode != 0),), bar=0
        ),
        Figure("preemption signals meanwhile", "", (signals,), bar=1000, at_least=True),
    ]


def _breakpoints(program: Path) -> Figure:
    text = subprocess.run([program], capture_output=True, text=True, check=False)
    found = re.search(r"^(\d+) breakpoints", text.stdout, re.MULTILINE)
    count = float(found[1]) if found and text.returncode == 0 else 0.0
    name = "breakpoints, one at every instruction of every sequence, that aborted it and left no trace"
    return Figure(name, "", (count,), bar=1, at_least=True)
