"""The shapes that objects have, as nodes of a graph: what the published schema says, without its prose.

A graph, not a tree: one definition is one node, and definitions may refer to themselves. Nodes are made by
`schema.load` and never changed after it, so any thread may read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

ListType: TypeAlias = Literal["atomic", "set", "map"]


@dataclass(frozen=True, slots=True)
class Scalar:
    """A value without parts.

    :ivar kind: ``string``, ``integer``, ``number``, ``boolean``, ``quantity``, ``int-or-string``, ``time``,
        ``micro-time`` or ``bytes`` (base64)
    :ivar bits: of an integer: 32 or 64
    """

    kind: str
    bits: int = 64

    @property
    def go(self) -> str:
        """The name that upstream's error messages have for it."""
        named = {"integer": f"int{self.bits}", "boolean": "bool", "number": "float64", "bytes": "[]uint8"}
        return named.get(self.kind, "string")


@dataclass(frozen=True, slots=True)
class AnyValue:
    """Whatever JSON has: raw extensions, managed fields."""


@dataclass(frozen=True, slots=True)
class MapOf:
    """Names of any kind to values of one type (labels, resource lists)."""

    item: Type
    atomic: bool = False


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list.

    :ivar list_type: who owns its entries in server-side apply: ``atomic`` the whole, ``set`` each value, ``map`` each
        entry by its `keys`
    :ivar merge: a strategic merge patch merges it (by `merge_key`; of values without one: as a set)
    :ivar retain_keys: entries' patches may carry ``$retainKeys``
    """

    item: Type
    list_type: ListType = "atomic"
    keys: tuple[str, ...] = ()
    merge: bool = False
    merge_key: str = ""
    retain_keys: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Struct:
    """An object with known fields. Compared by identity: there is one node per definition.

    :ivar name: of its definition, as ``io.k8s.api.core.v1.PodSpec``
    :ivar required: fields that the schema calls required
    :ivar preserve: what is not in `fields` is kept as it is
    """

    name: str
    fields: Mapping[str, Type] = field(repr=False)
    required: tuple[str, ...] = ()
    atomic: bool = False
    preserve: bool = False

    @property
    def short(self) -> str:
        """The last part of its name: ``PodSpec``."""
        return self.name.rpartition(".")[2]


Type: TypeAlias = Scalar | AnyValue | MapOf | ListOf | Struct

KEY_DEFAULTS = {"protocol": "TCP"}
"""What an absent key of a ``map`` list counts as. The published schema has lost these (container and service ports)."""
