"""Who asks, and what for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SYSTEM_MASTERS = "system:masters"
AUTHENTICATED = "system:authenticated"
UNAUTHENTICATED = "system:unauthenticated"
NODES_GROUP = "system:nodes"


@dataclass(frozen=True, slots=True)
class User:
    """Who was authenticated. `groups` includes ``system:authenticated`` (or ``system:unauthenticated``)."""

    name: str
    groups: tuple[str, ...] = ()
    uid: str = ""
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def node_name(self) -> str:
        """The node that this user is; empty for anyone else. Source: Kubernetes, "Using Node Authorization"."""
        is_node = NODES_GROUP in self.groups and self.name.startswith("system:node:")
        return self.name.removeprefix("system:node:") if is_node else ""


ANONYMOUS = User("system:anonymous", (UNAUTHENTICATED,))


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a request is about, as authorizers see it.

    :ivar verb: get, list, watch, create, update, patch, delete, deletecollection; of a URL that is no resource the
        HTTP method in lower case
    :ivar path: of a URL that is no resource; empty for resources
    :ivar field_selector: of a list or watch, as the query has it
    """

    user: User
    verb: str
    group: str = ""
    version: str = ""
    plural: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""
    field_selector: str = ""
