"""A filter of a chain as it is written down. Loads no native code: whoever only carries chains about stays light."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hypervisor.errors import InvalidInput


@dataclass(frozen=True)
class FilterSpec:
    """A filter as a descriptor names it.

    :param kind: its class, as ``throttle``
    :param name: unique in its chain; the class's name unless it was given another
    :param settings: pairs of text. A value that begins with ``./`` (or ``file:./``) is a file in the disk's own folder
    """

    kind: str
    name: str
    settings: tuple[tuple[str, str], ...] = ()

    def resolved(self, folder: Path) -> tuple[tuple[str, str], ...]:
        """The settings with the disk's folder in the place of a leading ``./``."""
        return tuple((key, _absolute(value, folder)) for key, value in self.settings)

    def as_json(self) -> dict[str, Any]:
        """Its object in the file."""
        return {"kind": self.kind, "name": self.name, "settings": dict(self.settings)}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """Checks and converts. Raises `InvalidInput`."""
        known(value, {"kind", "name", "settings"}, where)
        values = value.get("settings", {})
        if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
            raise InvalidInput("settings are an object of texts", where=where)
        return cls(text(value, "kind", where), text(value, "name", where), tuple(values.items()))


def _absolute(value: str, folder: Path) -> str:
    for prefix in ("file:", ""):
        if value.startswith(prefix + "./"):
            return f"{prefix}{folder}/{value.removeprefix(prefix + './')}"
    return value


def known(value: Any, names: set[str], where: str) -> None:
    """Refuses what is no object, or has a field that is not among `names`."""
    if not isinstance(value, dict):
        raise InvalidInput("is not an object", where=where)
    unknown = set(value) - names
    if unknown:
        raise InvalidInput(f"unknown field {sorted(unknown)[0]}", where=where)


def text(value: dict[str, Any], name: str, where: str) -> str:
    """A field that must be a text. Raises `InvalidInput`."""
    found = value.get(name)
    if not isinstance(found, str) or not found or "\0" in found:
        raise InvalidInput("is a text that is not empty", where=f"{where}.{name}")
    return found
