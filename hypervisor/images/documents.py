"""Indexes, manifests and configs of images: JSON in, checked values out. Nothing here touches a file.

Both vocabularies are read: the OCI image specification's and docker's "schema 2". The digest and the size of every
document were checked by whoever read it; here only its meaning is.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypervisor.errors import InvalidInput
from hypervisor.images.model import ImageConfig, Limits, Platform
from hypervisor.images.reference import parse_digest

_INDEXES = {
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
}
_MANIFESTS = {
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
}
_CONFIGS = {
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
}
_LAYER_TAR = ("application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar")
_LAYERS = {base + suffix for base in _LAYER_TAR for suffix in ("", "+gzip", ".gzip", "+zstd", ".zstd")}
_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1"


@dataclass(frozen=True)
class Descriptor:
    """A pointer to a blob: its type, hex sha256 and size, and for a manifest in an index what it is made for."""

    media_type: str
    digest: str
    size: int
    platform: Mapping[str, Any] | None = None
    annotations: Mapping[str, Any] | None = None

    @property
    def is_index(self) -> bool:
        """True if it points to another index."""
        return self.media_type in _INDEXES

    def matches(self, platform: Platform) -> bool:
        """True if it is stated to be made for this platform, or nothing is stated."""
        if self.platform is None:
            return True
        return (self.platform.get("os"), self.platform.get("architecture")) == (platform.os, platform.architecture)


@dataclass(frozen=True)
class Manifest:
    """An image's config and layers, bottom layer first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]

    @property
    def size(self) -> int:
        """Bytes to fetch."""
        return self.config.size + sum(layer.size for layer in self.layers)


@dataclass(frozen=True)
class ConfigDocument:
    """What a config file says: for running, and the hex sha256 of each uncompressed layer."""

    config: ImageConfig
    created: str
    diff_ids: tuple[str, ...]


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object.

    :raises InvalidInput: it is none
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{what} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{what} is not a JSON object")
    return value


def is_index(data: bytes) -> bool:
    """Whether a document fetched by name is an index of manifests (else it should be a manifest)."""
    document = parse_json(data, "the manifest")
    return document.get("mediaType") in _INDEXES or ("manifests" in document and "config" not in document)


def parse_index(data: bytes, limits: Limits, *, what: str = "the index") -> list[Descriptor]:
    """The manifests and indexes that an index lists.

    :raises InvalidInput: it is malformed
    """
    entries = _list(parse_json(data, what), "manifests", what)
    if len(entries) > limits.layers:
        raise InvalidInput(f"{what} lists {len(entries)} manifests; the limit is {limits.layers}")
    return [_descriptor(entry, f"{what}: manifests[{index}]") for index, entry in enumerate(entries)]


def choose(descriptors: Sequence[Descriptor], platform: Platform, *, what: str) -> Descriptor:
    """The entry made for a platform: without a variant (as "v3") rather than with one.

    :raises InvalidInput: there is none
    """
    fitting = [entry for entry in descriptors if entry.matches(platform)]
    if not fitting:
        offered = sorted({_platform_text(entry.platform) for entry in descriptors} - {"unknown/unknown"})
        raise InvalidInput(f"{what}: there is no image for {platform}, only for: {', '.join(offered) or 'nothing'}")
    return min(fitting, key=lambda entry: (entry.platform is None, bool((entry.platform or {}).get("variant"))))


def parse_manifest(data: bytes, limits: Limits, *, what: str = "the manifest") -> Manifest:
    """An image manifest.

    :raises InvalidInput: it is malformed, no image, in docker's old schema 1, or has layers that must be fetched from
        elsewhere
    """
    document = parse_json(data, what)
    media_type = document.get("mediaType")
    if document.get("schemaVersion") == 1 or str(media_type).startswith(_SCHEMA_1):
        raise InvalidInput(f"{what} is in docker's schema 1, which is obsolete: push the image again with a newer tool")
    if document.get("schemaVersion") != 2 or (media_type is not None and media_type not in _MANIFESTS):
        raise InvalidInput(f"{what} is no image manifest (media type {media_type!r})")
    config = _descriptor(document.get("config"), f"{what}: config")
    if config.media_type not in _CONFIGS:
        raise InvalidInput(f"{what} is not of a container image but of an artifact ({config.media_type})")
    layers = _list(document, "layers", what)
    if len(layers) > limits.layers:
        raise InvalidInput(f"{what} has {len(layers)} layers; the limit is {limits.layers}")
    return Manifest(config, tuple(_layer(layer, f"{what}: layers[{index}]") for index, layer in enumerate(layers)))


def parse_config(data: bytes, platform: Platform, *, what: str = "the config") -> ConfigDocument:
    """An image's config file.

    :raises InvalidInput: it is malformed, or the image is made for another platform
    """
    document = parse_json(data, what)
    made_for = _platform_text(document)
    if made_for != str(platform):
        raise InvalidInput(f"{what}: the image is made for {made_for}; this host runs {platform}")
    rootfs = document.get("rootfs")
    if not isinstance(rootfs, dict) or rootfs.get("type") != "layers":
        raise InvalidInput(f"{what}: rootfs must be an object with type: layers")
    diff_ids = [
        parse_digest(entry, what=f"{what}: rootfs.diff_ids[{index}]")
        for index, entry in enumerate(_list(rootfs, "diff_ids", what))
    ]
    created = document.get("created")
    return ConfigDocument(_run_config(document, what), created if isinstance(created, str) else "", tuple(diff_ids))


def _platform_text(document: Mapping[str, Any] | None) -> str:
    document = document or {}
    return f"{document.get('os', 'unknown')}/{document.get('architecture', 'unknown')}"


def _run_config(document: Mapping[str, Any], what: str) -> ImageConfig:
    config = document.get("config")
    if config is None:
        config = {}
    if not isinstance(config, dict):
        raise InvalidInput(f"{what}: config must be an object")
    labels = _object(config, "Labels", what)
    return ImageConfig(
        entrypoint=_strings(config, "Entrypoint", what),
        cmd=_strings(config, "Cmd", what),
        env=_strings(config, "Env", what),
        user=_string(config, "User", what),
        workdir=posixpath.normpath(posixpath.join("/", _string(config, "WorkingDir", what))),
        stop_signal=_string(config, "StopSignal", what) or None,
        exposed_ports=tuple(sorted(_object(config, "ExposedPorts", what))),
        volumes=tuple(sorted(_object(config, "Volumes", what))),
        labels={name: str(value) for name, value in labels.items()},
        architecture=str(document.get("architecture")),
    )


def _layer(entry: object, what: str) -> Descriptor:
    layer = _descriptor(entry, what)
    if isinstance(entry, dict) and entry.get("urls"):
        raise InvalidInput(f"{what} lies outside the image (urls): such foreign layers are not fetched")
    if layer.media_type not in _LAYERS:
        raise InvalidInput(f"{what}: a layer of the unknown media type {layer.media_type!r}")
    return layer


def _descriptor(entry: object, what: str) -> Descriptor:
    if not isinstance(entry, dict):
        raise InvalidInput(f"{what} must be an object")
    size = entry.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise InvalidInput(f"{what}: size must be a number of bytes, not {size!r}")
    digest = parse_digest(entry.get("digest"), what=what)
    platform, annotations = entry.get("platform"), entry.get("annotations")
    return Descriptor(
        media_type=str(entry.get("mediaType")),
        digest=digest,
        size=size,
        platform=platform if isinstance(platform, dict) else None,
        annotations=annotations if isinstance(annotations, dict) else None,
    )


def _list(document: Mapping[str, Any], key: str, what: str) -> list[Any]:
    value = document.get(key)
    if value is None:
        value = []
    if not isinstance(value, list):
        raise InvalidInput(f"{what}: {key} must be a list")
    return value


def _object(document: Mapping[str, Any], key: str, what: str) -> dict[str, Any]:
    value = document.get(key)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise InvalidInput(f"{what}: {key} must be an object")
    return value


def _strings(document: Mapping[str, Any], key: str, what: str) -> tuple[str, ...]:
    value = _list(document, key, what)
    if not all(isinstance(part, str) and "\0" not in part for part in value):
        raise InvalidInput(f"{what}: {key} must be a list of strings")
    return tuple(value)


def _string(document: Mapping[str, Any], key: str, what: str) -> str:
    value = document.get(key)
    if value is None:
        value = ""
    if not isinstance(value, str) or "\0" in value:
        raise InvalidInput(f"{what}: {key} must be a string")
    return value
