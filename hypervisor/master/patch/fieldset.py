"""Sets of fields, as ``metadata.managedFields`` keeps them.

A field is a path of elements: ``f:name`` a field or a map's key, ``k:{...}`` a list's entry by its keys, ``v:...`` a
list's entry by its value. What counts as one field follows from the type: atomic maps and lists are one, others are
looked into.

Source: Kubernetes, "Server-Side Apply"; structured-merge-diff, FieldsV1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hypervisor.master.patch.values import equal
from hypervisor.master.schema.types import KEY_DEFAULTS, ListOf, MapOf, Struct, Type

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FieldSet:
    """Paths. Membership of an object does not follow from that of its fields, nor the other way round."""

    paths: frozenset[Path] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.paths)

    def __or__(self, other: FieldSet) -> FieldSet:
        return FieldSet(self.paths | other.paths)

    def __sub__(self, other: FieldSet) -> FieldSet:
        return FieldSet(self.paths - other.paths)

    def __and__(self, other: FieldSet) -> FieldSet:
        return FieldSet(self.paths & other.paths)

    def without(self, *roots: Path) -> FieldSet:
        """Those that are not at or below one of `roots`."""
        return FieldSet(frozenset(p for p in self.paths if not any(p[: len(root)] == root for root in roots)))

    def prefixes(self) -> frozenset[Path]:
        """Every path that is one of these or leads to one."""
        return frozenset(path[:end] for path in self.paths for end in range(1, len(path) + 1))

    def render(self) -> dict[str, Any]:
        """As ``fieldsV1``."""
        root: dict[str, Any] = {}
        for path in sorted(self.paths):
            node = root
            for element in path:
                node = node.setdefault(element, {})
            node["."] = {}
        _shorten(root)
        return root

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> FieldSet:
        """Of ``fieldsV1``.

        :raises ValueError: it is none
        """
        return cls(frozenset(_parsed(fields, ())))


def _shorten(node: dict[str, Any]) -> None:
    """A member without members below it is written as an empty object."""
    for child in node.values():
        if len(child) == 1 and "." in child:
            child.clear()
        else:
            _shorten(child)


def _parsed(node: Any, path: Path) -> Iterator[Path]:
    if not isinstance(node, Mapping) or len(path) > 64:
        raise ValueError("fieldsV1 is a tree of objects")
    if path and (not node or "." in node):
        yield path
    for element, child in node.items():
        if element == ".":
            continue
        if element[:2] not in ("f:", "k:", "v:", "i:"):
            raise ValueError(f"{element!r} names no field")
        yield from _parsed(child, (*path, element))


def path_text(path: Path) -> str:
    """As upstream writes a path in a conflict: ``.spec.containers[name="a"].image``."""
    return "".join(map(_element_text, path))


def _element_text(element: str) -> str:
    sort, rest = element[:2], element[2:]
    if sort == "f:":
        return f".{rest}"
    if sort == "k:":
        return "[" + ",".join(f"{key}={json.dumps(value)}" for key, value in json.loads(rest).items()) + "]"
    return f"[={rest}]" if sort == "v:" else f"[{rest}]"


# ---- the fields of an object -----------------------------------------------------------------------------------------


def granular(value: Any, kind: Type | None) -> bool:
    """Whether `value` is looked into, and not one field as a whole."""
    if isinstance(kind, (Struct, MapOf)):
        return not kind.atomic and isinstance(value, dict)
    return isinstance(kind, ListOf) and kind.list_type != "atomic" and isinstance(value, list)


def children(value: Any, kind: Type | None) -> dict[str, tuple[Any, Type | None]]:
    """The parts of a value that is looked into, by path element. Of entries with equal keys the first counts."""
    if isinstance(kind, Struct):
        return {f"f:{key}": (item, kind.fields.get(key)) for key, item in value.items()}
    if isinstance(kind, MapOf):
        return {f"f:{key}": (item, kind.item) for key, item in value.items()}
    if not isinstance(kind, ListOf):
        return {}
    found: dict[str, tuple[Any, Type | None]] = {}
    for item in value:
        found.setdefault(element_of(item, kind), (item, kind.item))
    return found


def element_of(item: Any, kind: ListOf) -> str:
    """The path element of a list's entry."""
    if kind.list_type == "set" or not isinstance(item, Mapping):
        return "v:" + json.dumps(item, separators=(",", ":"), sort_keys=True)
    keys = {key: item.get(key, KEY_DEFAULTS.get(key)) for key in sorted(kind.keys)}
    present = {key: value for key, value in keys.items() if value is not None}
    return "k:" + json.dumps(present, separators=(",", ":"))


def set_of(value: Any, kind: Type | None) -> FieldSet:
    """Every field of `value`."""
    return FieldSet(frozenset(_fields(value, kind, ())))


def _fields(value: Any, kind: Type | None, path: Path) -> Iterator[Path]:
    if not value or not granular(value, kind):
        if path:
            yield path
        return
    if path and isinstance(kind, MapOf):
        yield path
    for element, (item, inner) in children(value, kind).items():
        here = (*path, element)
        if isinstance(kind, ListOf):
            yield here
        yield from _fields(item, inner, here)


@dataclass(frozen=True, slots=True)
class Difference:
    """What a change did to the fields of an object."""

    added: FieldSet
    modified: FieldSet
    removed: FieldSet

    @property
    def written(self) -> FieldSet:
        """Fields that have a new value."""
        return self.added | self.modified


def compare(old: Any, new: Any, kind: Type | None) -> Difference:
    """Which fields `new` has that `old` has not, or has with another value, or has no longer."""
    added: list[Path] = []
    modified: list[Path] = []
    removed: list[Path] = []
    _compare(old, new, kind, (), added, modified, removed)
    return Difference(*(FieldSet(frozenset(paths)) for paths in (added, modified, removed)))


def _compare(
    old: Any, new: Any, kind: Type | None, path: Path, added: list[Path], modified: list[Path], removed: list[Path]
) -> None:
    if old is new or equal(old, new):
        return
    if not granular(old, kind) or not granular(new, kind):
        modified.append(path)
        return
    before, after = children(old, kind), children(new, kind)
    for element, (item, inner) in after.items():
        here = (*path, element)
        if element in before:
            _compare(before[element][0], item, inner, here, added, modified, removed)
        else:
            added.extend(_whole(item, inner, kind, here))
    for element, (item, inner) in before.items():
        if element not in after:
            removed.extend(_whole(item, inner, kind, (*path, element)))


def _whole(item: Any, inner: Type | None, parent: Type | None, path: Path) -> Iterable[Path]:
    if isinstance(parent, ListOf):
        yield path
    yield from _fields(item, inner, path)
