"""Which form of an answer a client wants, from its ``Accept`` header.

Source: Kubernetes, "API Concepts" (alternate representations of resources, receiving resources as Tables).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hypervisor.kube.errors import ApiError

_META_KINDS = frozenset(("Table", "PartialObjectMetadata", "PartialObjectMetadataList"))
JSON, YAML = "application/json", "application/yaml"
_WILD = frozenset(("*/*", "application/*"))
_META_VERSIONS = frozenset(("v1", "v1beta1"))
_DISCOVERY_VERSIONS = frozenset(("v2", "v2beta1"))


@dataclass(frozen=True, slots=True)
class Representation:
    """:ivar as_: another kind than the object's own; empty: the object itself
    :ivar version: of that other kind
    """

    media: str = JSON
    as_: str = ""
    version: str = "v1"
    indent: bool = False


PLAIN = Representation()


def not_acceptable() -> ApiError:
    """406."""
    return ApiError(
        "NotAcceptable", "only the following media types are accepted: application/json, application/yaml", code=406
    )


@lru_cache(maxsize=256)
def representation(accept: str, *, discovery: bool = False) -> Representation:
    """The first of the accepted forms that this server has, in the order of their weights.

    :param discovery: the answer may be an aggregated discovery document
    :raises ApiError: it has none of them
    """
    if not accept:
        return PLAIN
    weighted = sorted(enumerate(accept.split(",")), key=lambda item: (-_weight(item[1]), item[0]))
    for _, part in weighted:
        found = _one(part, discovery)
        if found is not None:
            return found
    raise not_acceptable()


def _parameters(part: str) -> tuple[str, dict[str, str]]:
    media, *rest = (p.strip() for p in part.split(";"))
    return media.lower(), {k.strip(): v.strip() for k, _, v in (p.partition("=") for p in rest)}


def _weight(part: str) -> float:
    try:
        return float(_parameters(part)[1].get("q", "1"))
    except ValueError:
        return 0.0


def _one(part: str, discovery: bool) -> Representation | None:
    media, parameters = _parameters(part)
    if media in _WILD:
        media = JSON
    if media not in (JSON, YAML):
        return None
    as_ = parameters.get("as", "")
    group, version = parameters.get("g", ""), parameters.get("v", "")
    if not as_:
        return Representation(media)
    if as_ == "APIGroupDiscoveryList":
        known = discovery and group == "apidiscovery.k8s.io" and version in _DISCOVERY_VERSIONS
        return Representation(media, as_, version) if known else None
    if group != "meta.k8s.io" or version not in _META_VERSIONS or discovery:
        return None
    return Representation(media, as_, version) if as_ in _META_KINDS else None
