"""Answers as bytes: objects, lists, tables, partial metadata, statuses.

Source: Kubernetes, "API Concepts" (receiving resources as Tables); `kubectl get` prints what `table` makes.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
import yaml

from hypervisor.kube import meta
from hypervisor.kube.errors import bad_request
from hypervisor.master.api.negotiate import YAML, Representation
from hypervisor.master.kinds.kind import Column, Kind

_INCLUDE = ("None", "Metadata", "Object")
GZIP_FROM = 128 << 10
"""Bytes from which an answer is compressed for those who ask, as upstream has it."""
_GZIP_LEVEL = 1  # on the same machine or network, time counts more than the last tenth of size

NAME_AND_AGE = (
    Column("Name", lambda o: meta.get(o, "metadata", "name", default=""), format="name", description="Name"),
    Column("Created At", lambda o: meta.get(o, "metadata", "creationTimestamp"), "date", description="Creation time"),
)
"""The columns of kinds that have none of their own."""


def dumps(value: Any) -> bytes:
    """Compact JSON."""
    return orjson.dumps(value)


def render(value: Any, form: Representation) -> bytes:
    """`value` in a representation's media type."""
    if form.media == YAML:
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode()
    return orjson.dumps(value, option=orjson.OPT_INDENT_2) if form.indent else orjson.dumps(value)


def compress(body: bytes) -> bytes:
    """Gzip, quickly. Runs for milliseconds a megabyte: call it in a thread."""
    return gzip.compress(body, _GZIP_LEVEL, mtime=0)


def include_object(text: str) -> str:
    """The query parameter ``includeObject``.

    :raises ApiError: no such policy
    """
    if text in ("", *_INCLUDE):
        return text or "Metadata"
    raise bad_request(f'invalid value "{text[:40]}" of includeObject: it must be None, Metadata or Object')


def partial(obj: Mapping[str, Any], version: str = "v1") -> dict[str, Any]:
    """An object's ``PartialObjectMetadata``."""
    return {
        "kind": "PartialObjectMetadata",
        "apiVersion": f"meta.k8s.io/{version}",
        "metadata": obj.get("metadata") or {},
    }


def partial_list(objects: Iterable[Mapping[str, Any]], metadata: Mapping[str, Any], version: str) -> dict[str, Any]:
    """Their ``PartialObjectMetadataList``."""
    return {
        "kind": "PartialObjectMetadataList",
        "apiVersion": f"meta.k8s.io/{version}",
        "metadata": metadata,
        "items": [partial(o, version) for o in objects],
    }


def list_head(kind: Kind, metadata: Mapping[str, Any]) -> bytes:
    """A list up to its first item; items follow with commas between, then ``]}``."""
    resource = kind.resource
    head = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version, "metadata": metadata}
    return dumps(head)[:-1] + b',"items":['


def columns_of(kind: Kind) -> Sequence[Column]:
    """A kind's columns."""
    return kind.columns or NAME_AND_AGE


def table(
    kind: Kind,
    objects: Iterable[Mapping[str, Any]],
    metadata: Mapping[str, Any],
    *,
    version: str = "v1",
    include: str = "Metadata",
    definitions: bool = True,
) -> dict[str, Any]:
    """Objects as a ``Table``.

    :param definitions: with the definitions of the columns; only the first table of a watch has them
    """
    columns = columns_of(kind)
    return {
        "kind": "Table",
        "apiVersion": f"meta.k8s.io/{version}",
        "metadata": metadata,
        "columnDefinitions": [_definition(c) for c in columns] if definitions else None,
        "rows": [_row(columns, o, include, version) for o in objects],
    }


def _definition(column: Column) -> dict[str, Any]:
    return {
        "name": column.name,
        "type": column.type,
        "format": column.format,
        "description": column.description,
        "priority": column.priority,
    }


def _row(columns: Sequence[Column], obj: Mapping[str, Any], include: str, version: str) -> dict[str, Any]:
    row: dict[str, Any] = {"cells": [c.value(obj) for c in columns]}
    if include == "Metadata":
        row["object"] = partial(obj, version)
    elif include == "Object":
        row["object"] = obj
    return row


def success(message: str = "", *, details: Mapping[str, Any] | None = None, code: int = 200) -> dict[str, Any]:
    """A ``Status`` of success."""
    body: dict[str, Any] = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
    body |= {"message": message} if message else {}
    body |= {"details": dict(details)} if details else {}
    return body | ({"code": code} if code != 200 else {})
