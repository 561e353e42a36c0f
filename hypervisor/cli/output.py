"""What commands print: aligned tables, JSON, YAML, names. No rich: it would cost 100 ms."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import click

FORMATS = ("table", "wide", "json", "yaml", "name")
Row = Sequence[str]


def format_option(*formats: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option ``-o``, with `formats` (default: all) as its choices."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(formats or FORMATS),
        default="table",
        show_default=True,
        help="How to print it.",
    )


def table(header: Row, rows: Sequence[Row]) -> str:
    """Left-aligned columns, three blanks apart; control characters in cells are made visible."""
    cells = [header, *([_printable(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ("   ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
    return "\n".join(lines)


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def as_json(value: Any) -> str:
    """Indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def as_yaml(value: Any) -> str:
    """YAML, keys in their order."""
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)).rstrip("\n")


def emit(text: str) -> None:
    """Prints a block of text to standard output; an empty one prints nothing."""
    if text:
        sys.stdout.write(text + "\n")


def show(value: Any, output: str, *, names: Sequence[str], header: Row, rows: Sequence[Row]) -> None:
    """Prints `value` in the format `output`; header and rows are the table's, already narrow or wide."""
    if output == "json":
        emit(as_json(value))
    elif output == "yaml":
        emit(as_yaml(value))
    elif output == "name":
        emit("\n".join(names))
    else:
        emit(table(header, rows))


def note(text: str) -> None:
    """One line on standard error, for people."""
    print(f"hv: {text}", file=sys.stderr)  # noqa: T201


def age(seconds: float) -> str:
    """A duration as people say it, two units at most: ``45s``, ``3m10s``, ``5h``, ``12d``."""
    left = max(0, int(seconds))
    if left < 120:
        return f"{left}s"
    for size, name, below, below_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if left >= size:
            rest = left % size // below
            return f"{left // size}{name}" + (f"{rest}{below_name}" if rest and left < 10 * size else "")
    return f"{left}s"


def age_since(timestamp: str | None, now: float | None = None) -> str:
    """The age of an RFC 3339 time; ``-`` where there is none."""
    if not timestamp:
        return "-"
    try:
        then = datetime.fromisoformat(timestamp).timestamp()
    except ValueError:
        return "?"
    return age((time.time() if now is None else now) - then)


def size(count: float | None) -> str:
    """Bytes as people say them, in powers of 1024: ``812B``, ``1.5Mi``, ``12Gi``."""
    if count is None:
        return "-"
    for unit in ("B", "Ki", "Mi", "Gi"):
        if abs(count) < 1024:
            return f"{count:.0f}{unit}" if count >= 10 or unit == "B" else f"{count:.1f}{unit}"
        count /= 1024
    return f"{count:.1f}Ti"
