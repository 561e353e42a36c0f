"""What the server needs to know of a kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hypervisor.kube.errors import Cause
from hypervisor.kube.resources import Resource
from hypervisor.master.kinds.rules import dns_subdomain
from hypervisor.master.schema.types import Struct

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a ``Table``.

    :ivar value: of an object; what `kubectl get` prints
    :ivar priority: 0 is shown always, 1 with ``-o wide``
    """

    name: str
    value: Callable[[Mapping[str, Any]], Any]
    type: str = "string"
    format: str = ""
    priority: int = 0
    description: str = ""


@dataclass(frozen=True, slots=True)
class ScalePaths:
    """Where an object has what its Scale shows.

    :ivar selector: a label selector, or one written as text; empty: it has none
    """

    replicas: tuple[str, ...] = ("spec", "replicas")
    current: tuple[str, ...] = ("status", "replicas")
    selector: tuple[str, ...] = ("spec", "selector")


def no_defaults(obj: Object) -> None:
    """A kind without defaults of its own."""


def no_rules(obj: Mapping[str, Any]) -> Iterable[Cause]:
    """A kind whose schema says all."""
    return ()


def no_update_rules(new: Mapping[str, Any], old: Mapping[str, Any]) -> Iterable[Cause]:
    """A kind that may be changed freely."""
    return ()


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of object.

    :ivar schema: name of its definition in the published OpenAPI schema
    :ivar verbs: of the kind itself, as discovery tells them
    :ivar subresources: names; ``status`` and ``scale`` are served generically, others by handlers of their own
    :ivar selectable: field paths that a field selector may name, besides ``metadata.name`` and ``metadata.namespace``
    :ivar name_error: what is wrong with a name, or None
    :ivar default: fills in what is missing, in place
    :ivar validate: everything wrong with an object that fits its schema
    :ivar validate_update: everything wrong with a change (immutability)
    :ivar generation: fields below ``spec`` count as generations
    :ivar prepare_create: in place, before defaults: what a new object of this kind begins with (a Pod's phase)
    :ivar stored: False: a review that is answered and not kept
    :ivar scale: where its subresource ``scale`` finds what it shows
    :ivar struct: the type of a kind that a user has defined; its schema is no published one
    :ivar read: brings what is stored to the form of today's schema
    :ivar openapi: the schema, as its author wrote it
    :ivar served: False: clients do not see it; it is there to keep the objects of other versions
    :ivar kept_as: another kind's resource, whose objects these are in another form (events.k8s.io's Event is the core
        one); `to_kept` and `from_kept` turn one form into the other
    """

    resource: Resource
    singular: str
    schema: str
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")
    subresources: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()
    selectable: tuple[str, ...] = ()
    name_error: Callable[[str], str | None] = dns_subdomain
    default: Callable[[Object], None] = no_defaults
    validate: Callable[[Mapping[str, Any]], Iterable[Cause]] = no_rules
    validate_update: Callable[[Mapping[str, Any], Mapping[str, Any]], Iterable[Cause]] = no_update_rules
    generation: bool = True
    stored: bool = True
    prepare_create: Callable[[Object], None] = no_defaults
    kept_as: Resource | None = None
    to_kept: Callable[[Mapping[str, Any]], Object] = dict
    from_kept: Callable[[Mapping[str, Any]], Object] = dict
    scale: ScalePaths = field(default_factory=ScalePaths)
    struct: Struct | None = None
    read: Callable[[Mapping[str, Any]], Object] | None = None
    openapi: Mapping[str, Any] | None = None
    served: bool = True

    @property
    def has_status(self) -> bool:
        """Whether ``status`` is written through its subresource only."""
        return "status" in self.subresources

    @property
    def list_kind(self) -> str:
        """The kind of its lists: ``PodList``."""
        return f"{self.resource.kind}List"
