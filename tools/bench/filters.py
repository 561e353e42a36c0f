"""What I/O filters cost, without a front end: time, and instructions counted by callgrind; a thousand clones."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from measure import Figure

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
CSRC, TESTS = ROOT / "csrc", ROOT / "tests" / "c" / "iofilter"
REQUESTS, FILTERS = 20_000, 8
COUNTED = ("null", "template", "stats", "trace")

WHAT = {
    "iops_0": ("4 KiB random read, depth 32, file in memory, no filter", "IOPS"),
    "iops_8": ("the same through 8 pass-through filters", "IOPS"),
    "direct": ("the same from the base disk", "IOPS"),
    "redirect": ("the same from a linked clone of it", "IOPS"),
    "read_and_aes": ("reading, then AES-256-XTS per 4 KiB", "MB/s"),
    "encrypt": ("reading through `encrypt`", "MB/s"),
    "cache_miss": ("4 KiB read that misses, 100 us delay below", "us"),
    "cache_hit": ("the same, a hit", "us"),
}


def build(folder: Path, name: str, source: Path) -> Path:
    """A program of `source` and the sources of csrc, as they are shipped: -O2, no sanitizer."""
    program = folder / name
    own = sorted((CSRC / "iofilter").glob("*.c")) + sorted((CSRC / "iofilter" / "filters").glob("*/*.c"))
    library = [path for path in own if path.name != "disks.c"] + sorted((CSRC / "common").glob("*.c"))
    flags = ("-O2", "-g", "-D_GNU_SOURCE", "-std=gnu11", f"-I{CSRC}", f"-I{TESTS}")
    subprocess.run(["gcc", *flags, source, *library, "-o", program, "-pthread", "-luring", "-lcrypto"], check=True)
    return program


def run(rounds: int) -> list[Figure]:
    """Every case in turn, `rounds` times; then instructions, then clones."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        program = build(folder, "filters", FOLDER / "filters.c")
        samples = measure(program, rounds, folder)
        return [
            *(Figure(what, unit, samples[case]) for case, (what, unit) in WHAT.items()),
            ratio("8 filters over none", samples["iops_8"], samples["iops_0"], 0.9),
            ratio("redirect on one loop over direct", samples["redirect"], samples["direct"], 0.9),
            ratio("`encrypt` over reading, then AES", samples["encrypt"], samples["read_and_aes"], 0.9),
            ratio("miss over hit", samples["cache_miss"], samples["cache_hit"], 3),
            *(instructions(program, kind, FILTERS) for kind in COUNTED),
            instructions(program, "linkedclone", 1),
            *clones(build(folder, "clones", TESTS / "test_clones.c")),
        ]


def measure(program: Path, rounds: int, folder: Path) -> dict[str, tuple[float, ...]]:
    """Values by case."""
    samples: dict[str, list[float]] = {case: [] for case in WHAT}
    lines = subprocess.run([program, str(rounds), folder], check=True, capture_output=True, text=True).stdout
    for line in lines.splitlines():
        case, value = line.split()
        samples[case].append(float(value))
    return {case: tuple(values) for case, values in samples.items()}


def ratio(name: str, over: tuple[float, ...], under: tuple[float, ...], bar: float) -> Figure:
    """Each ratio is of two cases of the same round."""
    return Figure(name, "x", tuple(a / b for a, b in zip(over, under, strict=True)), bar=bar, at_least=True)


def instructions(program: Path, kind: str, most: int) -> Figure:
    """Of one request in one filter: with `most` of them less without, both counted by callgrind."""

    def counted(filters: int, requests: int) -> int:
        command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", program, "count", kind]
        done = subprocess.run([*command, str(filters), str(requests)], check=True, capture_output=True, text=True)
        found = re.search(r"Collected : (\d+)", done.stderr)
        assert found, done.stderr
        return int(found[1])

    def of_requests(filters: int) -> int:  # without what it takes to start, and to attach
        return counted(filters, 2 * REQUESTS) - counted(filters, REQUESTS)

    each = (of_requests(most) - of_requests(0)) / (most * REQUESTS)
    return Figure(f"instructions of a request in `{kind}`", "", (each,))


def clones(program: Path) -> list[Figure]:
    """The test program makes and opens them, and says how long that took and what each holds."""
    text = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    found = re.search(r"made in ([\d.]+) s, opened in ([\d.]+) s, (\d+) bytes", text)
    assert found, text
    made, opened, each = (float(value) for value in found.groups())
    return [
        Figure("1,000 linked clones of one base, made", "s", (made,), bar=5),
        Figure("the same, opened", "s", (opened,)),
        Figure("memory of an idle clone", "KiB", (each / 1024,), bar=64),
    ]
