"""The page walk beside the ways to search regions: random addresses, 1 to a million VADs, 4 GiB mapped in all."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from measure import Figure

FOLDER = Path(__file__).parent
COUNTS = (1, 100, 10_000, 1_000_000)
METHODS = {"page_table": "page walk", "upper_bound": "std::upper_bound", "branchless": "bisect", "map": "std::map"}
MODES = ("independent", "dependent")

Samples = dict[tuple[int, str, str], list[float]]


def build(folder: Path) -> Path:
    """Every method is inlined into a timed loop of its own language; see page_table.cc."""
    c = ("gcc", "-O2", "-std=gnu11", "-D_GNU_SOURCE", "-c", "-o", folder / "ours.o")
    subprocess.run([*c, FOLDER / "page_table_ours.c"], check=True)
    program = folder / "page_table"
    cc = ("g++", "-O2", "-o", program, FOLDER / "page_table.cc", folder / "ours.o", "-lpthread")
    subprocess.run(cc, check=True)
    return program


def measure(rounds: int) -> Samples:
    """Nanoseconds (memory: parts of what is mapped) by number of VADs, method and mode; each round has all of them."""
    samples: Samples = {}
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for _ in range(rounds):
            for count in COUNTS:
                for (method, mode), value in once(program, count).items():
                    samples.setdefault((count, method, mode), []).append(value)
    return samples


def once(program: Path, count: int) -> dict[tuple[str, str], float]:
    """One process's second turn: the first has the caches to itself, and what it looks up is not there yet."""
    done = subprocess.run([program, str(count), "2"], check=True, capture_output=True, text=True)
    rows = (line.split() for line in done.stdout.splitlines())
    return {(method, mode): float(value) for _, method, mode, value in rows}


def run(rounds: int) -> list[Figure]:
    """The figures; draws the curves into docs/performance/lookups.png as well."""
    samples = measure(rounds)
    draw(samples, FOLDER.parents[1] / "docs" / "performance" / "lookups.png")
    most = COUNTS[-1]
    figures = [
        Figure(f"look-up among {count:,} VADs, {mode}, {name}", "ns", tuple(samples[count, method, mode]))
        for mode in MODES
        for count in (1, most)
        for method, name in METHODS.items()
    ]
    return [*figures, *_ratios(samples, most), *_memory(samples, most)]


def _ratio(samples: Samples, over: tuple[int, str, str], under: tuple[int, str, str]) -> tuple[float, ...]:
    return tuple(a / b for a, b in zip(samples[over], samples[under], strict=True))


def _ratios(samples: Samples, most: int) -> list[Figure]:
    ours = (most, "page_table", "independent")
    slow = (most, "page_table", "dependent")
    best = tuple(
        min(values) for values in zip(*(samples[most, m, "dependent"] for m in list(METHODS)[1:]), strict=True)
    )
    return [
        Figure("upper_bound over page walk, independent, 10^6 VADs", "x",
               _ratio(samples, (most, "upper_bound", "independent"), ours), bar=5, at_least=True),
        Figure("std::map over page walk, independent, 10^6 VADs", "x",
               _ratio(samples, (most, "map", "independent"), ours), bar=20, at_least=True),
        Figure("page walk over the best peer, dependent, 10^6 VADs", "x",
               tuple(a / b for a, b in zip(samples[slow], best, strict=True)), bar=1),
        Figure("page walk: 10^6 VADs over 1, independent", "x", _ratio(samples, ours, (1, *ours[1:])), bar=1.5),
        Figure("page walk: 10^6 VADs over 1, dependent", "x", _ratio(samples, slow, (1, *slow[1:])), bar=1.5),
    ]  # fmt: skip


def _memory(samples: Samples, most: int) -> list[Figure]:
    def percent(count: int, what: str) -> tuple[float, ...]:
        return tuple(100 * value for value in samples[count, "memory", what])

    return [
        Figure("tables and page-frame entries, of mapped memory", "%", percent(most, "table_and_entries"), bar=0.7),
        Figure("VADs (apart), a VAD for each page", "%", percent(most, "vads")),
        Figure("VADs (apart), one in all", "%", percent(1, "vads")),
    ]


def draw(samples: Samples, path: Path) -> None:
    """Time against the number of VADs, one curve a method, medians with their spread."""
    import statistics

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for mode, axis in zip(MODES, axes, strict=True):
        for method, name in METHODS.items():
            rows = [samples[count, method, mode] for count in COUNTS]
            axis.plot(COUNTS, [statistics.median(row) for row in rows], marker="o", label=name)
            axis.fill_between(COUNTS, [min(row) for row in rows], [max(row) for row in rows], alpha=0.15)
        axis.set(xscale="log", yscale="log", xlabel="VADs", title=f"{mode} look-ups, 4 GiB mapped")
    axes[0].set_ylabel("ns a look-up")
    axes[0].legend(fontsize=8)
    chart.tight_layout()
    chart.savefig(path, dpi=100)
    pyplot.close(chart)
