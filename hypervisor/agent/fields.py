"""Reading a request's arguments: every field is taken once, checked, and what is left over is an error.

Bad input gets one message that names the field, what it must be and what it was.
"""

from __future__ import annotations

from typing import Any

from .errors import invalid

MAX_TEXT = 64 * 1024
MAX_ITEMS = 65536
MAX_INT = (1 << 63) - 1


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Fields:
    """The fields of one JSON object, at `where` in the request."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise invalid(f"{where}: must be an object, not {_shown(value)}")
        self._left: dict[str, Any] = dict(value)
        self._where = where

    def path(self, name: str) -> str:
        """Where `name` stands in the request, for messages."""
        return f"{self._where}.{name}"

    def take(self, name: str, kind: type, what: str, default: Any = ...) -> Any:
        """The field `name`, of type `kind` (None counts as absent); `default` when absent, and required without one."""
        value = self._left.pop(name, None)
        if value is None:
            if default is ...:
                raise invalid(f"{self.path(name)}: missing; must be {what}")
            return default
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise invalid(f"{self.path(name)}: must be {what}, not {_shown(value)}")
        return value

    def text(self, name: str, default: Any = ..., *, limit: int = MAX_TEXT) -> Any:
        """A string of at most `limit` characters without NUL."""
        value = self.take(name, str, "a string", default)
        if value is not default:
            check_text(value, self.path(name), limit)
        return value

    def path_text(self, name: str, default: Any = ...) -> Any:
        """An absolute path."""
        value = self.text(name, default, limit=4095)
        if value is not default and not value.startswith("/"):
            raise invalid(f"{self.path(name)}: must be an absolute path, not {_shown(value)}")
        return value

    def flag(self, name: str, default: Any = False) -> bool:
        """true or false."""
        return bool(self.take(name, bool, "true or false", default))

    def integer(self, name: str, default: Any = ..., *, low: int = 0, high: int = MAX_INT) -> Any:
        """A whole number between `low` and `high`."""
        value = self.take(name, int, f"a whole number from {low} to {high}", default)
        if value is not default and not low <= value <= high:
            raise invalid(f"{self.path(name)}: must be a whole number from {low} to {high}, not {value}")
        return value

    def seconds(self, name: str, default: Any = ...) -> float:
        """A time in seconds, 0 to a year."""
        value = self._left.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            self._left[name] = float(value)
        seconds = self.take(name, float, "a number of seconds", default)
        if not 0 <= seconds <= 366 * 86400:
            raise invalid(f"{self.path(name)}: must be a number of seconds from 0 to a year, not {_shown(value)}")
        return float(seconds)

    def choice(self, name: str, allowed: tuple[str, ...], default: Any = ...) -> Any:
        """One of `allowed`."""
        value = self.text(name, default)
        if value is not default and value not in allowed:
            raise invalid(f"{self.path(name)}: must be one of {', '.join(allowed)}, not {_shown(value)}")
        return value

    def texts(self, name: str, default: Any = ..., *, limit: int = MAX_TEXT * 32) -> Any:
        """A list of strings without NUL."""
        values = self.take(name, list, "a list of strings", default)
        if values is default:
            return default
        self._check_count(name, values)
        for i, value in enumerate(values):
            check_text(value, f"{self._where}.{name}[{i}]", limit)
        return values

    def objects(self, name: str) -> list[Fields]:
        """A list of objects; empty when absent."""
        values = self.take(name, list, "a list of objects", [])
        self._check_count(name, values)
        return [Fields(value, f"{self._where}.{name}[{i}]") for i, value in enumerate(values)]

    def object(self, name: str) -> Fields:
        """An object; an empty one when absent."""
        return Fields(self.take(name, dict, "an object", {}), self.path(name))

    def done(self) -> None:
        """Refuses what nobody took."""
        left = [name for name, value in self._left.items() if value is not None or not name]
        if left:
            raise invalid(f"{self._where}: unknown field {_shown(left[0])}")

    def _check_count(self, name: str, values: list[Any]) -> None:
        if len(values) > MAX_ITEMS:
            raise invalid(f"{self.path(name)}: {len(values)} items; at most {MAX_ITEMS} are allowed")


def check_text(value: object, where: str, limit: int) -> None:
    """Refuses what is no string, is too long, or holds a NUL (which no argument, path or variable can)."""
    if not isinstance(value, str):
        raise invalid(f"{where}: must be a string, not {_shown(value)}")
    if len(value) > limit:
        raise invalid(f"{where}: {len(value)} characters; at most {limit} are allowed")
    if "\0" in value:
        raise invalid(f"{where}: must not contain a NUL character")


def check_command(argv: list[str], env: list[str], where: str) -> None:
    """Refuses what execve() could not take: an empty list, one string over 128 KiB, 2 MiB in all."""
    if not argv:
        raise invalid(f"{where}.argv: must name a program; the list is empty")
    total = 0
    for value in (*argv, *env):
        size = len(value.encode("utf-8", "surrogateescape")) + 1
        if size > 128 * 1024:
            raise invalid(f"{where}: an argument or variable of {size} bytes; Linux takes at most 131072 for one")
        total += size + 8
    if total > 2 * 1024 * 1024:
        raise invalid(f"{where}: arguments and environment take {total} bytes; Linux takes at most 2097152")
