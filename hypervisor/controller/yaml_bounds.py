"""What a YAML text would become, found out before any of it is made.

Aliases let a few lines stand for billions of values, and libyaml builds nested values by recursion in C, which no
RecursionError guards. One pass over the events, which are flat, tells both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from hypervisor.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_DEPTH = 100
MAX_VALUES = 1_000_000
_Parser = yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader


def check(text: str | bytes) -> None:
    """:raises InvalidInput: it is nested too deeply, has too many values with its aliases expanded, or is no YAML"""
    count(yaml.parse(text, _Parser))


def count(events: Iterable[yaml.Event]) -> int:
    """Values of all documents, aliases expanded.

    :raises InvalidInput: too many, or too deep
    """
    anchors: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # collections around: anchor, values that came before it
    total = 0
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total))
            if len(opened) > MAX_DEPTH:
                raise InvalidInput(f"is nested more than {MAX_DEPTH} deep", where=_line(event))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                anchors[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                anchors[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise InvalidInput(f"the alias *{event.anchor} stands within its own anchor", where=_line(event))
            total += anchors.get(str(event.anchor), 1)
        if total > MAX_VALUES:
            raise InvalidInput(f"stands for more than {MAX_VALUES} values", where=_line(event))
    return total


def _line(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}" if event.start_mark is not None else ""
