"""Completion indexes of indexed Jobs: which are done, which are to be made, and how they are written down."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

from hypervisor.kube import meta

INDEX = "batch.kubernetes.io/job-completion-index"


def index_of(pod: Mapping[str, Any]) -> int | None:
    """A pod's index; None: it has none."""
    text = str(meta.get(pod, "metadata", "annotations", INDEX, default=""))
    return int(text) if text.isdigit() else None


def wanted_indexes(job: Mapping[str, Any], active: Sequence[Mapping[str, Any]], done: Collection[int]) -> list[int]:
    """Indexes that nobody works on and nobody has done, lowest first."""
    taken = {index_of(p) for p in active}
    completions = int(meta.get(job, "spec", "completions", default=1))
    return [i for i in range(completions) if i not in taken and i not in done]


def parse_completed(text: str) -> frozenset[int]:
    """The set that a status's ``completedIndexes`` (``1,3-5,7``) stands for."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)


def render_completed(indexes: Collection[int]) -> str:
    """The text for a set, as `parse_completed` reads it."""
    runs = []
    for _, group in groupby(enumerate(sorted(indexes)), key=lambda pair: pair[1] - pair[0]):
        run = [value for _, value in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}{',' if len(run) == 2 else '-'}{run[-1]}")
    return ",".join(runs)
