"""What an admission plug-in is given, and the chain that calls them in order.

Source: Kubernetes, "Admission Control in Kubernetes".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from hypervisor.master.auth.user import User
from hypervisor.master.kinds.kind import Kind

Object = dict[str, Any]
Operation = Literal["CREATE", "UPDATE", "DELETE", "CONNECT"]
Outcome = Literal["refused", "unknown"] | int


@dataclass(slots=True)
class AdmissionRequest:
    """A change that somebody is allowed to make, before it is made.

    :ivar object: what is to be stored; plug-ins change it in place. Empty for DELETE and CONNECT
    :ivar old: what is stored now; None for CREATE
    :ivar name: empty for a create with ``generateName``
    :ivar holds: what plug-ins keep for this request; each is told how it ended: the revision of the change,
        ``refused`` (nothing was changed) or ``unknown``
    """

    operation: Operation
    kind: Kind
    user: User
    namespace: str
    name: str
    object: Object
    old: Mapping[str, Any] | None = None
    subresource: str = ""
    dry_run: bool = False
    holds: list[Callable[[Outcome], None]] = field(default_factory=list)


class Plugin(Protocol):
    """One rule. `operations` and `plurals` say what it is called for (no plurals: every kind), so that the path of a
    request past the plug-ins that do not concern it costs nothing.
    """

    @property
    def operations(self) -> frozenset[Operation]:
        """Those it wants to see."""

    @property
    def plurals(self) -> frozenset[str]:
        """Qualified names of resources (``pods``, ``deployments.apps``); empty: all."""

    async def admit(self, request: AdmissionRequest) -> None:
        """Completes `request.object` in place.

        :raises ApiError: the change must not be made
        """


class Chain:
    """Plug-ins in order."""

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        self._plugins = tuple(plugins)
        self._concerned: dict[tuple[Operation, str], tuple[Plugin, ...]] = {}

    def concerned(self, operation: Operation, kind: Kind) -> tuple[Plugin, ...]:
        """Those that want to see an operation on a kind."""
        key = operation, kind.resource.qualified
        found = self._concerned.get(key)
        if found is None:
            found = tuple(
                p for p in self._plugins if operation in p.operations and (not p.plurals or key[1] in p.plurals)
            )
            self._concerned[key] = found
        return found

    async def admit(self, request: AdmissionRequest) -> None:
        """Calls them.

        :raises ApiError: the first refusal
        """
        for plugin in self.concerned(request.operation, request.kind):
            await plugin.admit(request)
