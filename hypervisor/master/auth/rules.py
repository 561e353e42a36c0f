"""RBAC rules: what they say, and whether one set of them says at least what another does.

Source: Kubernetes, "Using RBAC Authorization".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypervisor.master.auth.user import Attributes

ALL = "*"


@dataclass(frozen=True, slots=True)
class Rule:
    """A ``PolicyRule``. It is about resources, or about URLs that are no resources.

    :ivar names: resourceNames; empty: every object
    """

    verbs: frozenset[str]
    groups: frozenset[str] = frozenset()
    resources: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()

    @classmethod
    def of(cls, rule: Mapping[str, Any]) -> Rule:
        """From its JSON."""
        fields = ("verbs", "apiGroups", "resources", "resourceNames", "nonResourceURLs")
        return cls(*(frozenset(rule.get(field) or ()) for field in fields))

    def render(self) -> dict[str, list[str]]:
        """Its JSON; empty fields are left out, but for the verbs."""
        fields = {
            "apiGroups": self.groups,
            "resources": self.resources,
            "resourceNames": self.names,
            "nonResourceURLs": self.urls,
        }
        return {"verbs": sorted(self.verbs)} | {name: sorted(values) for name, values in fields.items() if values}

    def shown(self) -> str:
        """As messages have it, in upstream's form."""
        names = {"apiGroups": "APIGroups", "nonResourceURLs": "NonResourceURLs"}
        parts = {names.get(key, key[0].upper() + key[1:]): json.dumps(value) for key, value in self.render().items()}
        return "{" + ", ".join(f"{key}:{value}" for key, value in sorted(parts.items())) + "}"

    def allows(self, asked: Attributes) -> bool:
        """Whether it allows a request."""
        if asked.verb not in self.verbs and ALL not in self.verbs:
            return False
        if asked.path:
            return self._names_url(asked.path)
        if asked.group not in self.groups and ALL not in self.groups:
            return False
        return self._names_resource(asked.plural, asked.subresource) and (not self.names or asked.name in self.names)

    def _names_resource(self, plural: str, subresource: str) -> bool:
        if ALL in self.resources:
            return True
        if not subresource:
            return plural in self.resources
        return f"{plural}/{subresource}" in self.resources or f"*/{subresource}" in self.resources

    def _names_url(self, path: str) -> bool:
        return any(path == url or (url.endswith(ALL) and path.startswith(url[:-1])) for url in self.urls)

    def atoms(self) -> Iterator[Rule]:
        """Rules of one verb, one group, one resource and one name each that together say what this one does."""
        for verb in self.verbs:
            for url in self.urls:
                yield Rule(frozenset((verb,)), urls=frozenset((url,)))
            for group in self.groups:
                for resource in self.resources:
                    for name in self.names or (None,):
                        names = frozenset(() if name is None else (name,))
                        yield Rule(frozenset((verb,)), frozenset((group,)), frozenset((resource,)), names)

    def covers(self, atom: Rule) -> bool:
        """Whether it allows all that a rule of `atoms` does."""
        if not (ALL in self.verbs or atom.verbs <= self.verbs):
            return False
        if atom.urls:
            return all(self._names_url(url) for url in atom.urls)
        if not (ALL in self.groups or atom.groups <= self.groups) or not atom.resources:
            return False
        return all(self._covers_resource(r) for r in atom.resources) and (
            not self.names or (bool(atom.names) and atom.names <= self.names)
        )

    def _covers_resource(self, resource: str) -> bool:
        plural, _, subresource = resource.partition("/")
        return resource in self.resources or self._names_resource(plural, subresource)


def parse(rules: Iterable[Mapping[str, Any]] | None) -> tuple[Rule, ...]:
    """The rules of a role's JSON."""
    return tuple(Rule.of(rule) for rule in rules or ())


def lacking(held: Sequence[Rule], wanted: Iterable[Rule]) -> list[Rule]:
    """What `wanted` allows and `held` does not, in atoms; empty when `held` covers all of it."""
    atoms = (atom for rule in wanted for atom in rule.atoms())
    return [atom for atom in atoms if not any(rule.covers(atom) for rule in held)]
