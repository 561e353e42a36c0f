"""Bodies of requests: decoded by their content type, and fitted to the type of their kind.

Source: Kubernetes, "API Concepts" (server-side field validation).
"""

from __future__ import annotations

from typing import Any

from hypervisor.kube.client import Object
from hypervisor.kube.errors import ApiError, bad_request, invalid
from hypervisor.master.api.call import Call
from hypervisor.master.schema.conform import conform
from hypervisor.master.schema.decode import decode_json, decode_yaml
from hypervisor.master.schema.protobuf import decode_protobuf
from hypervisor.master.schema.types import Struct

BODY_LIMIT = 3 << 20
"""Bytes, as upstream has it."""
_YAML = frozenset(("application/yaml", "application/x-yaml", "text/yaml"))
PROTOBUF = "application/vnd.kubernetes.protobuf"
_MAX_TOLD = 20


def media_type(content_type: str) -> str:
    """The type without its parameters."""
    return content_type.partition(";")[0].strip().lower()


def unsupported(media: str, supported: tuple[str, ...]) -> ApiError:
    """415."""
    return ApiError(
        "UnsupportedMediaType",
        f"the body of the request was in an unknown format ({media or 'none'}) - accepted media types include: "
        + ", ".join(supported),
    )


def decode(body: bytes, content_type: str) -> tuple[Any, list[str]]:
    """A body's value, and what stands in it twice.

    :raises ApiError: BadRequest, UnsupportedMediaType
    """
    media = media_type(content_type)
    if media in ("application/json", "", "application/octet-stream"):
        return decode_json(body)
    if media in _YAML:
        return decode_yaml(body)
    if media == PROTOBUF:
        return decode_protobuf(body), []
    raise unsupported(media, ("application/json", "application/yaml", PROTOBUF))


def decode_object(body: bytes, content_type: str) -> tuple[Object, list[str]]:
    """As `decode`, of an object.

    :raises ApiError: it is none
    """
    if not body:
        raise bad_request("the request has no body; send the object")
    value, doubles = decode(body, content_type)
    if not isinstance(value, dict):
        raise bad_request("the body is no object: it must be a JSON or YAML mapping with apiVersion and kind")
    return value, doubles


def note_doubles(call: Call, doubles: list[str]) -> None:
    """Fields that stand twice: refused, told or passed over.

    :raises ApiError: BadRequest
    """
    texts = [d if d.startswith("line ") else f'duplicate field "{d}"' for d in doubles]
    _tell(call, texts)


def fit(call: Call, struct: Struct, obj: Object) -> None:
    """Brings an object to the form of its type, in place.

    :raises ApiError: BadRequest: a value of a wrong type (Invalid, of a kind that a user has defined); an unknown field
        where validation is strict
    """
    report = conform(obj, struct)
    if report.mismatches:
        resource = call.kind.resource
        causes = list(call.kind.validate(obj)) if call.kind.struct is not None else []
        if causes:  # a user's kind: its schema tells it in its own words
            raise invalid(resource.group, resource.kind, call.name or _name(obj), causes)
        raise bad_request(
            f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}: '
            + "; ".join(m.message for m in report.mismatches[:_MAX_TOLD])
        )
    if report.unknown:
        _tell(call, [f'unknown field "{path}"' for path in report.unknown])


def _name(obj: Object) -> str:
    metadata = obj.get("metadata")
    return str(metadata.get("name") or "") if isinstance(metadata, dict) else ""


def _tell(call: Call, texts: list[str]) -> None:
    if not texts or call.validation == "Ignore":
        return
    if call.validation == "Strict":
        raise bad_request("strict decoding error: " + ", ".join(texts[:_MAX_TOLD]))
    call.warnings.extend(text for text in texts[:_MAX_TOLD] if text not in call.warnings)
