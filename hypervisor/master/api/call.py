"""One request for objects, whoever sent it: a client over HTTP, or a controller in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hypervisor.kube.errors import bad_request
from hypervisor.master.admission.plugin import Outcome
from hypervisor.master.api.info import RequestInfo
from hypervisor.master.auth.user import User
from hypervisor.master.kinds.kind import Kind

_VALIDATIONS = ("Strict", "Warn", "Ignore")
MANAGER_LIMIT = 128


@dataclass(frozen=True, slots=True)
class Call:
    """:ivar validation: of fields: ``Strict``, ``Warn`` or ``Ignore``
    :ivar manager: who is written to ``metadata.managedFields`` as the one who changed a field
    :ivar holds: what admission keeps for the request until it has ended
    :ivar warnings: texts for the client, added to while the request is served
    """

    user: User
    kind: Kind
    namespace: str = ""
    name: str = ""
    subresource: str = ""
    dry_run: bool = False
    validation: str = "Warn"
    manager: str = "unknown"
    warnings: list[str] = field(default_factory=list)
    holds: list[Callable[[Outcome], None]] = field(default_factory=list)

    def settle(self, outcome: Outcome) -> None:
        """Tells those who hold something how the request ended."""
        while self.holds:
            self.holds.pop()(outcome)


def of_request(info: RequestInfo, user: User, user_agent: str, kind: Kind) -> Call:
    """The call that an HTTP request makes.

    :raises ApiError: a parameter of the query that is none
    """
    query = info.query
    return Call(
        user,
        kind,
        info.namespace if kind.resource.namespaced else "",
        info.name,
        info.subresource,
        dry_run(query.get("dryRun", "")),
        _validation(query.get("fieldValidation", "")),
        _manager(query.get("fieldManager", ""), user_agent),
    )


def dry_run(text: str) -> bool:
    """The parameter ``dryRun``.

    :raises ApiError: it is neither empty nor All
    """
    if text not in ("", "All"):
        raise bad_request(f'invalid value "{text[:40]}" of dryRun: supported values: "All"')
    return bool(text)


def _validation(text: str) -> str:
    if text in ("", *_VALIDATIONS):
        return text or "Warn"
    raise bad_request(f'invalid value "{text[:40]}" of fieldValidation: supported values: "Ignore", "Strict", "Warn"')


def _manager(given: str, user_agent: str) -> str:
    if len(given) > MANAGER_LIMIT or not given.isprintable():
        raise bad_request(f"fieldManager must be printable and have at most {MANAGER_LIMIT} characters")
    return given or user_agent.partition("/")[0][:MANAGER_LIMIT] or "unknown"
