"""The chain of filters of one disk that vmx serves: put together before the disk starts, changed while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hypervisor.errors import InvalidInput
from hypervisor.iofilter.loop import Disk
from hypervisor.iofilter.spec import FilterSpec

Filters = tuple[FilterSpec, ...]


class Chain:
    """A disk's filters, from the guest to the data. Its owner calls it from one thread.

    :param disk: not started, without filters
    :param folder: where files lie whose names in settings begin with ``./``
    :raises HvError: a filter refuses; the disk is to be closed
    """

    def __init__(self, disk: Disk, filters: Filters, folder: Path) -> None:
        self._disk = disk
        self._folder = folder
        self.filters: Filters = filters
        for spec in reversed(filters):
            disk.add(spec.kind, spec.name, spec.resolved(folder))

    def change(self, wanted: Filters) -> float:
        """Makes the chain `wanted`, which has one filter more, one less, or one with other settings. Harmless when it
        is so already, so that one who did not hear the answer may ask again.

        :return: seconds for which requests waited
        :raises HvError: refused; the chain is as it was
        """
        if wanted == self.filters:
            return 0.0
        pause = self._apply(wanted)
        self.filters = wanted
        return pause

    def _apply(self, wanted: Filters) -> float:
        have, names = {spec.name: spec for spec in self.filters}, [spec.name for spec in wanted]
        new, gone = [n for n in names if n not in have], [n for n in have if n not in names]
        other = [spec for spec in wanted if spec.name in have and spec != have[spec.name]]
        kept = [n for n in names if n in have]
        if len(new) + len(gone) + len(other) != 1 or kept != [n for n in have if n not in gone]:
            raise InvalidInput("a chain is changed by one filter at a time")
        if gone:
            return self._disk.remove(gone[0])
        if new:
            at = names.index(new[0])
            return self._disk.add(wanted[at].kind, new[0], wanted[at].resolved(self._folder), at=at)
        if other[0].kind != have[other[0].name].kind:
            raise InvalidInput(f"filter {other[0].name} is {have[other[0].name].kind}, not {other[0].kind}")
        return self._disk.set(other[0].name, other[0].resolved(self._folder))

    def figures(self) -> list[dict[str, Any]]:
        """Each filter with what it counts, in order."""
        return [{"name": s.name, "kind": s.kind, "figures": self._disk.figures(s.name)} for s in self.filters]


def filters_from_json(value: Any, where: str) -> Filters:
    """Checks and converts. Raises `InvalidInput`."""
    if not isinstance(value, list):
        raise InvalidInput("is not a list", where=where)
    return tuple(FilterSpec.from_json(one, f"{where}[{i}]") for i, one in enumerate(value))


def filters_as_json(filters: Iterable[FilterSpec]) -> list[dict[str, Any]]:
    """The inverse of `filters_from_json`."""
    return [spec.as_json() for spec in filters]
