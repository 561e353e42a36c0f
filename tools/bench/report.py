"""Figures as JSON, a table in docs/performance.md and plots beside it."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from measure import Figure

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- figures: begin (make bench) -->", "<!-- figures: end -->"


def machine() -> dict[str, object]:
    """What the figures were measured on, without naming the machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    return {"cores": os.cpu_count(), "memory_gib": memory, "kernel": platform.release().split("-")[0]}


def write(results: dict[str, list[Figure]]) -> None:
    """Writes the JSON, the table and the plots; sections that were not run keep their last figures."""
    folder = DOCS / "performance"
    folder.mkdir(exist_ok=True)
    path = folder / "results.json"
    known = json.loads(path.read_text()) if path.exists() else {"sections": {}}
    for name, figures in results.items():
        known["sections"][name] = {
            "when": datetime.now(UTC).strftime("%Y-%m-%d"),
            "machine": machine(),
            "figures": [f.to_json() for f in figures],
        }
    path.write_text(json.dumps(known, indent=1) + "\n")
    sections = {name: [_figure(f) for f in body["figures"]] for name, body in known["sections"].items()}
    _table(sections)
    for name, figures in sections.items():
        _plot(name, figures, folder / f"{name}.png")


def _figure(body: dict[str, object]) -> Figure:
    fields = {k: body[k] for k in ("name", "unit", "bar", "at_least")}
    return Figure(samples=tuple(body["samples"]), **fields)  # type: ignore[arg-type]


def _table(sections: dict[str, list[Figure]]) -> None:
    lines = [BEGIN]
    for name, figures in sections.items():
        lines += [f"\n### {name}\n", "| what | median (min-max) | n | bar | met |", "|---|---|---|---|---|"]
        lines += [f.row() for f in figures]
        lines.append(f"\n![{name}](performance/{name}.png)")
    lines.append("\n" + END)
    page = DOCS / "performance.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(before + "\n".join(lines) + after)


def _plot(name: str, figures: list[Figure], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    units = sorted({f.unit for f in figures})
    chart, axes = pyplot.subplots(len(units), 1, figsize=(9, 1.2 + 0.5 * len(figures)), squeeze=False)
    for unit, axis in zip(units, axes[:, 0], strict=True):
        rows = [f for f in figures if f.unit == unit][::-1]
        axis.boxplot([f.samples for f in rows], vert=False, whis=(0, 100), widths=0.5)
        axis.set_yticks(range(1, len(rows) + 1), [f.name.replace("`", "") for f in rows], fontsize=8)
        for y, figure in enumerate(rows, 1):
            if figure.bar is not None:
                axis.plot([figure.bar] * 2, [y - 0.4, y + 0.4], color="red", linewidth=2)
        axis.set_xlabel(f"{unit} (box: quartiles, whiskers: all samples, red: the promised bar)", fontsize=8)
        axis.set_xlim(left=0)
    chart.tight_layout()
    chart.savefig(path, dpi=100)
    pyplot.close(chart)
