"""Answers of a Kubernetes API server that are not success: one exception, carrying the ``Status`` object.

Source: Kubernetes API conventions, "Response Status Kind" (reasons and HTTP codes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypervisor.errors import HvError

CODES = {
    "BadRequest": 400,
    "Unauthorized": 401,
    "Forbidden": 403,
    "NotFound": 404,
    "MethodNotAllowed": 405,
    "NotAcceptable": 406,
    "AlreadyExists": 409,
    "Conflict": 409,
    "Expired": 410,
    "Gone": 410,
    "RequestEntityTooLarge": 413,
    "UnsupportedMediaType": 415,
    "Invalid": 422,
    "TooManyRequests": 429,
    "InternalError": 500,
    "ServiceUnavailable": 503,
    "Timeout": 504,
}
"""HTTP status by reason."""


@dataclass(frozen=True, slots=True)
class Cause:
    """One thing that is wrong with an object.

    :ivar reason: ``FieldValueInvalid``, ``FieldValueRequired``, ``FieldValueNotSupported``, ``FieldValueForbidden``,
        ``FieldValueDuplicate``, ``FieldValueNotFound``, ``FieldValueTooLong``, ``FieldValueTypeInvalid``
    :ivar field: its path, as ``spec.containers[0].image``
    """

    reason: str
    message: str
    field: str

    def render(self) -> dict[str, str]:
        """As a ``StatusCause``."""
        return {"reason": self.reason, "message": self.message, "field": self.field}


class ApiError(HvError):
    """A ``Status`` of failure, raised by an API server's inside and by its clients alike.

    :param reason: a key of `CODES`, or another word where `code` is given
    :param details: ``StatusDetails`` (name, group, kind, causes, retryAfterSeconds)
    :ivar metadata: ``ListMeta`` of the Status; a list's ``continue`` token goes here
    """

    def __init__(
        self, reason: str, message: str, *, code: int | None = None, details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.code = CODES.get(reason, 500) if code is None else code
        self.details: dict[str, Any] = dict(details or {})
        self.metadata: dict[str, Any] = {}

    def status(self) -> dict[str, Any]:
        """The ``Status`` object that goes over the wire."""
        body: dict[str, Any] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": self.metadata,
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "code": self.code,
        }
        return body | ({"details": self.details} if self.details else {})

    @classmethod
    def parse(cls, body: Any, http_status: int) -> ApiError:
        """The error in an answer's body; a body that is no ``Status`` makes one of its HTTP status."""
        if isinstance(body, Mapping) and body.get("kind") == "Status":
            details = body.get("details")
            return cls(
                str(body.get("reason") or _reason_of(http_status)),
                str(body.get("message") or f"HTTP status {http_status}"),
                code=int(body.get("code") or http_status),
                details=details if isinstance(details, Mapping) else None,
            )
        return cls(_reason_of(http_status), f"the server answered HTTP status {http_status}", code=http_status)


def _reason_of(http_status: int) -> str:
    return next((reason for reason, code in CODES.items() if code == http_status), "InternalError")


def _details(group: str, plural: str, name: str) -> dict[str, Any]:
    return {"name": name, "kind": plural} | ({"group": group} if group else {})


def _qualified(group: str, plural: str) -> str:
    return f"{plural}.{group}" if group else plural


def not_found(group: str, plural: str, name: str) -> ApiError:
    """404, worded as upstream words it (clients match on it)."""
    message = f'{_qualified(group, plural)} "{name}" not found'
    return ApiError("NotFound", message, details=_details(group, plural, name))


def already_exists(group: str, plural: str, name: str) -> ApiError:
    """409 for a create."""
    message = f'{_qualified(group, plural)} "{name}" already exists'
    return ApiError("AlreadyExists", message, details=_details(group, plural, name))


def conflict(group: str, plural: str, name: str, why: str = "") -> ApiError:
    """409 for an update whose resourceVersion or uid is not the object's."""
    why = why or "the object has been modified; please apply your changes to the latest version and try again"
    message = f'Operation cannot be fulfilled on {_qualified(group, plural)} "{name}": {why}'
    return ApiError("Conflict", message, details=_details(group, plural, name))


def invalid(group: str, kind: str, name: str, causes: Sequence[Cause]) -> ApiError:
    """422, with every cause."""
    qualified = f"{kind}.{group}" if group else kind
    listed = [f"{c.field}: {c.message}" for c in causes]
    text = listed[0] if len(listed) == 1 else f"[{', '.join(listed)}]"
    details = {"name": name, "kind": kind, "causes": [c.render() for c in causes]} | ({"group": group} if group else {})
    return ApiError("Invalid", f'{qualified} "{name}" is invalid: {text}', details=details)


def forbidden(group: str, plural: str, name: str, why: str) -> ApiError:
    """403."""
    named = f'{_qualified(group, plural)} "{name}"' if name else _qualified(group, plural)
    return ApiError("Forbidden", f"{named} is forbidden: {why}", details=_details(group, plural, name))


def bad_request(message: str) -> ApiError:
    """400."""
    return ApiError("BadRequest", message)


def expired(message: str) -> ApiError:
    """410 for a resourceVersion or a continue token that is too old."""
    return ApiError("Expired", message)
