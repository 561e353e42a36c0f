"""docs/pods.md prints the table of fields; HV_REGENERATE=1 writes it anew."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hypervisor.controller.fields import CONTAINER_FIELDS, POD_FIELDS, Field, Support

PAGE = Path(__file__).parents[3] / "docs/pods.md"
BEGIN, END = "<!-- fields: begin -->\n", "<!-- fields: end -->\n"


def table(rows: Mapping[str, Field], prefix: str) -> str:
    """A line for each reason: its fields share it."""
    groups: dict[tuple[Support, str], list[str]] = {}
    for row in rows.values():
        groups.setdefault((row.support, row.why), []).append(f"`{prefix}{row.path}`")
    order = list(Support)
    lines = ["| | fields | why |", "|---|---|---|"]
    for (support, why), paths in sorted(groups.items(), key=lambda g: order.index(g[0][0])):
        lines.append(f"| {support.value} | {', '.join(paths)} | {why} |")
    return "\n".join(lines) + "\n"


def test_the_page_has_the_table() -> None:
    wanted = table(POD_FIELDS, "") + "\nOf each container (`spec.containers[]`, `spec.initContainers[]`):\n\n"
    wanted += table(CONTAINER_FIELDS, "")
    head, _, rest = PAGE.read_text().partition(BEGIN)
    found, _, tail = rest.partition(END)
    if os.environ.get("HV_REGENERATE"):
        PAGE.write_text(head + BEGIN + wanted + END + tail)
    assert found == wanted or os.environ.get("HV_REGENERATE"), "run this test with HV_REGENERATE=1"
