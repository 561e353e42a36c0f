"""Cells of tables, as upstream's printers write them: ages, lists, selectors, and the columns that kinds share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from hypervisor.master.kinds.kind import Column

View = Mapping[str, Any]
NONE = "<none>"
UNKNOWN = "<unknown>"


def dig(obj: Any, path: str, default: Any = None) -> Any:
    """The value at a dotted path; `default` where anything on the way is absent."""
    for part in path.split("."):
        if not isinstance(obj, Mapping) or obj.get(part) is None:
            return default
        obj = obj[part]
    return obj


def field(path: str, default: Any = "") -> Callable[[View], Any]:
    """A cell that is a field."""
    return lambda obj: dig(obj, path, default)


def instant(text: str | None) -> datetime | None:
    """A time as objects carry it; None of what is none."""
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:
        return None


def human(seconds: float) -> str:
    """A duration as upstream's ``HumanDuration`` writes it: two units while it is short, one when it is long."""
    whole = int(seconds)
    minutes, hours = whole // 60, whole // 3600
    if whole < 0:
        return "<invalid>" if seconds < -2 else "0s"
    if whole < 120:
        return f"{whole}s"
    if minutes < 10:
        return _two(minutes, "m", whole % 60, "s")
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return _two(hours, "h", minutes % 60, "m")
    if hours < 48:
        return f"{hours}h"
    return _days(hours)


def _days(hours: int) -> str:
    days = hours // 24
    if hours < 192:
        return _two(days, "d", hours % 24, "h")
    if days < 730:
        return f"{days}d"
    return _two(days // 365, "y", days % 365, "d") if days < 2920 else f"{days // 365}y"


def _two(large: int, unit: str, small: int, sub: str) -> str:
    return f"{large}{unit}{small}{sub}" if small else f"{large}{unit}"


def since(text: str | None, default: str = UNKNOWN) -> str:
    """The time from `text` to now."""
    then = instant(text)
    return default if then is None else human((datetime.now(UTC) - then).total_seconds())


def age(obj: View) -> str:
    """The time since the object was made."""
    return since(dig(obj, "metadata.creationTimestamp"))


def count(path: str) -> Callable[[View], Any]:
    """How many entries a list or map has."""
    return lambda obj: len(dig(obj, path, ()))


def joined(path: str, member: str, default: str = "") -> Callable[[View], str]:
    """One member of every entry of a list, with commas."""
    return lambda obj: ",".join(str(dig(entry, member, "")) for entry in dig(obj, path, ())) or default


def labels(pairs: Mapping[str, Any] | None) -> str:
    """A set of labels as a selector: ``a=b,c=d``."""
    return ",".join(f"{key}={pairs[key]}" for key in sorted(pairs)) if pairs else NONE


_SIGNS = {"In": "in", "NotIn": "notin"}


def selector(obj: Mapping[str, Any] | None) -> str:
    """A LabelSelector as a string."""
    if not obj:
        return NONE
    parts = [f"{key}={value}" for key, value in sorted(obj.get("matchLabels", {}).items())]
    for rule in obj.get("matchExpressions", ()):
        sign = rule.get("operator")
        if sign in _SIGNS:
            parts.append(f"{rule.get('key')} {_SIGNS[sign]} ({','.join(sorted(rule.get('values', ())))})")
        else:
            parts.append(f"{'!' if sign == 'DoesNotExist' else ''}{rule.get('key')}")
    return ",".join(parts) or NONE


def listed(items: Sequence[str], most: int = 0) -> str:
    """`items` with commas, the first `most` of them and how many more there are."""
    if not items:
        return NONE
    shown = ",".join(items[:most] if most else items)
    return f"{shown} + {len(items) - most} more..." if most and len(items) > most else shown


NAME = Column(
    "Name",
    field("metadata.name"),
    format="name",
    description="Name must be unique within a namespace.",
)
AGE = Column("Age", age, description="The time since the object was created.")
CREATED_AT = Column("Created At", field("metadata.creationTimestamp"), type="date")
PLAIN = (NAME, CREATED_AT)
"""Kinds that upstream prints nothing more of."""


def number(name: str, path: str, priority: int = 0) -> Column:
    """A column of a count in a field, 0 when absent."""
    return Column(name, field(path, 0), type="integer", priority=priority)


def text(name: str, path: str, default: Any = "", priority: int = 0) -> Column:
    """A column of a field."""
    return Column(name, field(path, default), priority=priority)


def wide(name: str, value: Callable[[View], Any]) -> Column:
    """A column that only ``-o wide`` shows."""
    return Column(name, value, priority=1)


def template_columns(selected: Callable[[View], str]) -> tuple[Column, ...]:
    """The three wide columns of what runs pods from a template."""
    containers = "spec.template.spec.containers"
    return (
        wide("Containers", joined(containers, "name")),
        wide("Images", joined(containers, "image")),
        wide("Selector", selected),
    )


def by_selector(obj: View) -> str:
    """The cell of a ``spec.selector``."""
    return selector(dig(obj, "spec.selector"))
