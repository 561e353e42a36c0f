"""Kubernetes ``Status`` objects: for refused requests, and for how a streamed process ended."""

from __future__ import annotations

from typing import Any

from hypervisor.errors import HvError, InvalidInput
from hypervisor.introspect.agent import Ending


def status_of_error(error: HvError) -> dict[str, Any]:
    """The body of a refused request; its ``code`` is the HTTP status."""
    body: dict[str, Any] = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": str(error),
        "reason": error.reason,
        "code": error.code,
    }
    if isinstance(error, InvalidInput) and error.where:
        body["details"] = {"causes": [{"reason": "FieldValueInvalid", "field": error.where, "message": str(error)}]}
    return body


def status_of_ending(ending: Ending) -> dict[str, Any]:
    """The error channel's object in subprotocol v4 and later.

    A process that ran and failed is ``NonZeroExitCode`` with its code as a cause, which is where every client looks
    for it; a process that could not be run at all carries the reason in its message.
    """
    base: dict[str, Any] = {"metadata": {}, "apiVersion": "v1", "kind": "Status"}
    if ending.exit_code == 0 and ending.error is None:
        return base | {"status": "Success"}
    if ending.error is not None and ending.exit_code not in (126, 127):
        return base | {"status": "Failure", "reason": "InternalError", "message": str(ending.error), "code": 500}
    message = f"command terminated with non-zero exit code: exit status {ending.exit_code}"
    return base | {
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": str(ending.error) if ending.error else message,
        "details": {"causes": [{"reason": "ExitCode", "message": str(ending.exit_code)}]},
    }
