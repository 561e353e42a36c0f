"""Samples and what is said of them: median with minimum and maximum, never a single number."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Figure:
    """One measured quantity.

    :ivar bar: the most (or, with `at_least`, the least) that the project promises; None where nothing is promised
    """

    name: str
    unit: str
    samples: tuple[float, ...]
    bar: float | None = None
    at_least: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.median >= self.bar if self.at_least else self.median <= self.bar

    def to_json(self) -> dict[str, object]:
        body = asdict(self)
        body |= {"median": self.median, "min": min(self.samples), "max": max(self.samples), "met": self.met}
        return body

    def row(self) -> str:
        """A line of a Markdown table: name, median (min-max), number of samples, bar, met."""
        bar = "" if self.bar is None else f"{'>=' if self.at_least else '<='} {self.bar:g} {self.unit}"
        verdict = {None: "", True: "yes", False: "**no**"}[self.met]
        spread = f"{self.median:.4g} ({min(self.samples):.4g}-{max(self.samples):.4g}) {self.unit}"
        return f"| {self.name} | {spread} | {len(self.samples)} | {bar} | {verdict} |"


@contextmanager
def timed(samples: list[float], *, scale: float = 1.0) -> Iterator[None]:
    """Appends the seconds that the block took, times `scale`."""
    start = time.perf_counter()
    yield
    samples.append((time.perf_counter() - start) * scale)


def interleaved(rounds: int, **cases: Callable[[], float]) -> dict[str, tuple[float, ...]]:
    """Runs the cases in turn, `rounds` times, so that a drift of the machine meets them alike."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            samples[name].append(case())
    return {name: tuple(values) for name, values in samples.items()}
