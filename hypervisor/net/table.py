"""A table of nftables as a value, and what makes a kernel's table into it: all of it, or only what differs.

A set's elements are compared one by one, a chain's rules together: a change of one pod or one endpoint touches its own
elements and chains, whatever else the table has. Commands are libnftables' JSON (libnftables-json(5)); each list of
them is one transaction: all of it happens, or nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

FAMILY = "inet"

Expression = dict[str, Any]
Rule = tuple[Expression, ...]
Command = dict[str, Any]
Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Hook:
    """Where packets come into a chain."""

    kind: str
    hook: str
    priority: int


@dataclass(frozen=True)
class Chain:
    """Rules, in their order. Without a hook it is gone to from others."""

    rules: tuple[Rule, ...] = ()
    hook: Hook | None = None


@dataclass(frozen=True)
class Set:
    """Elements by their key. A `verdicts` one is a map to a chain's name; a `dynamic` one is filled by packets.

    :ivar timeout_s: how long an element of a dynamic one stays
    """

    type: tuple[str, ...]
    elements: Mapping[Key, str | None] = field(default_factory=dict)
    verdicts: bool = False
    timeout_s: int = 0

    @property
    def dynamic(self) -> bool:
        """Whether the kernel's elements are none of this value's business."""
        return self.timeout_s > 0

    def same_kind(self, other: Set) -> bool:
        """Whether elements alone tell them apart."""
        return (self.type, self.verdicts, self.timeout_s) == (other.type, other.verdicts, other.timeout_s)


@dataclass(frozen=True)
class Table:
    """Chains and sets by their names."""

    name: str
    chains: Mapping[str, Chain] = field(default_factory=dict)
    sets: Mapping[str, Set] = field(default_factory=dict)


def whole(table: Table) -> list[Command]:
    """The old table goes, this one comes."""
    named = {"family": FAMILY, "name": table.name}
    # To delete what is not there is an error; to add what is there is none.
    fresh = [{"add": {"table": named}}, {"delete": {"table": named}}, {"add": {"table": named}}]
    return [*fresh, *change(Table(table.name), table)]


def change(old: Table, new: Table) -> list[Command]:
    """What makes `old` into `new`; empty when they are the same.

    Sets come before the rules that name them, chains before the elements that lead to them; what goes, goes in the
    opposite order.
    """
    make = _Maker(new.name)
    stale = {name for name, s in old.sets.items() if name not in new.sets or not s.same_kind(new.sets[name])}
    fresh_sets = {name for name in new.sets if name not in old.sets or name in stale}
    chains = [name for name, chain in new.chains.items() if old.chains.get(name) != chain]
    gone = [name for name in old.chains if name not in new.chains]
    kept = [name for name in new.sets if name not in fresh_sets and old.sets[name] is not new.sets[name]]
    commands = [make.remove_elements(name, old.sets[name], new.sets[name]) for name in kept]
    commands += [[make.flush(name) for name in (*chains, *gone) if name in old.chains]]
    commands += [[make.delete("set", name, old.sets[name]) for name in stale]]
    commands += [[make.set(name, new.sets[name]) for name in fresh_sets]]
    commands += [[make.chain(name, new.chains[name]) for name in chains if name not in old.chains]]
    commands += [[make.rule(name, rule) for name in chains for rule in new.chains[name].rules]]
    commands += [make.add_elements(name, {}, new.sets[name]) for name in fresh_sets]
    commands += [make.add_elements(name, old.sets[name].elements, new.sets[name]) for name in kept]
    commands += [[make.delete("chain", name) for name in gone]]
    return [command for some in commands for command in some]


@dataclass(frozen=True)
class _Maker:
    """Commands about one table."""

    table: str

    def _of(self, verb: str, kind: str, **fields: Any) -> Command:
        return {verb: {kind: {"family": FAMILY, "table": self.table, **fields}}}

    def flush(self, chain: str) -> Command:
        return self._of("flush", "chain", name=chain)

    def delete(self, kind: str, name: str, what: Set | None = None) -> Command:
        return self._of("delete", "map" if what is not None and what.verdicts else kind, name=name)

    def chain(self, name: str, chain: Chain) -> Command:
        hook = chain.hook
        if hook is None:
            return self._of("add", "chain", name=name)
        fields = {"type": hook.kind, "hook": hook.hook, "prio": hook.priority, "policy": "accept"}
        return self._of("add", "chain", name=name, **fields)

    def rule(self, chain: str, rule: Rule) -> Command:
        return self._of("add", "rule", chain=chain, expr=list(rule))

    def set(self, name: str, what: Set) -> Command:
        fields: dict[str, Any] = {"type": what.type[0] if len(what.type) == 1 else list(what.type)}
        if what.dynamic:
            fields |= {"flags": ["timeout"], "timeout": what.timeout_s, "size": 65535}
        if what.verdicts:
            return self._of("add", "map", name=name, map="verdict", **fields)
        return self._of("add", "set", name=name, **fields)

    def remove_elements(self, name: str, old: Set, new: Set) -> list[Command]:
        gone = {key: value for key, value in old.elements.items() if new.elements.get(key, _NONE) != value}
        return self._elements("delete", name, gone)

    def add_elements(self, name: str, old: Mapping[Key, str | None], new: Set) -> list[Command]:
        come = {key: value for key, value in new.elements.items() if old.get(key, _NONE) != value}
        return self._elements("add", name, come)

    def _elements(self, verb: str, name: str, elements: Mapping[Key, str | None]) -> list[Command]:
        listed = [_element(key, value) for key, value in elements.items()]
        return [self._of(verb, "element", name=name, elem=listed)] if listed else []


_NONE = object()


def _element(key: Key, target: str | None) -> Any:
    plain: Any = key[0] if len(key) == 1 else {"concat": list(key)}
    return plain if target is None else [plain, {"goto": {"target": target}}]


def lacks(listing: Iterable[Mapping[str, Any]], table: Table) -> list[str]:
    """Names of the chains and sets of `table` of which the kernel has another number of rules or elements.

    :param listing: what ``nft -j list table`` says
    """
    rules: Counter[str] = Counter()
    counts: dict[str, int] = {}
    for entry in listing:
        if "rule" in entry:
            rules[entry["rule"]["chain"]] += 1
        elif "chain" in entry:
            counts[entry["chain"]["name"]] = 0
        for kind in ("set", "map"):
            if kind in entry:
                counts[entry[kind]["name"]] = len(entry[kind].get("elem") or ())
    counts |= rules
    return sorted(name for name, number in _numbers(table) if counts.get(name, -1) != number)


def _numbers(table: Table) -> Iterator[tuple[str, int]]:
    for name, chain in table.chains.items():
        yield name, len(chain.rules)
    for name, what in table.sets.items():
        if not what.dynamic:
            yield name, len(what.elements)
