"""Image sources on this host: an OCI layout (a folder or an archive), a docker archive, or what skopeo fetched.

Each yields :class:`FoundImage` values: everything about an image except its files, checked; the layers themselves are
checked while the disk is built from them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypervisor.errors import InvalidInput
from hypervisor.images import documents
from hypervisor.images.blobs import Blob
from hypervisor.images.build import Layer
from hypervisor.images.documents import ConfigDocument, Descriptor, Manifest
from hypervisor.images.files import Files, FolderFiles
from hypervisor.images.model import Limits, Platform
from hypervisor.images.reference import DEFAULT_REGISTRY, LOCAL_REGISTRY, Reference, digest_of, parse

_NESTING = 3
_NAME_KEYS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")


@dataclass(frozen=True)
class FoundImage:
    """An image in a source.

    :ivar names: that the source gives it
    :ivar digest: ``sha256:<hex>`` of its manifest or of the index that it was chosen from
    :ivar image_id: hex sha256 of its config
    """

    names: tuple[Reference, ...]
    digest: str
    image_id: str
    document: ConfigDocument
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Reader:
    """Reads images from files, for one platform, within limits."""

    files: Files
    platform: Platform
    limits: Limits

    def images(self) -> list[FoundImage]:
        """Every image of the source.

        :raises InvalidInput: the source is none of the known kinds, malformed, damaged, or has no image that fits
        """
        if self.files.find("oci-layout") is not None:
            return self._from_layout()
        if (manifest := self.files.find("manifest.json")) is not None:
            return self._from_docker(manifest)
        raise InvalidInput("neither an OCI layout (oci-layout) nor a docker archive (manifest.json) is in there")

    def fetched(self, manifest: Manifest, names: Sequence[Reference], digest: str) -> FoundImage:
        """The image that ``skopeo copy ... dir:`` left, whose manifest is known and was checked."""
        return self._found(manifest, "", tuple(names), digest)

    # ---- OCI layout --------------------------------------------------------------------------------------------------

    def _from_layout(self) -> list[FoundImage]:
        version = documents.parse_json(self._file("oci-layout"), "oci-layout").get("imageLayoutVersion")
        if not str(version).startswith("1."):
            raise InvalidInput(f"an OCI layout of version {version!r}; only 1.x is known")
        groups: dict[str, list[Descriptor]] = {}
        for entry in documents.parse_index(self._file("index.json"), self.limits, what="index.json"):
            groups.setdefault(_name_of(entry), []).append(entry)
        if not groups:
            raise InvalidInput("index.json lists no image")
        return [self._from_entries(name, entries) for name, entries in sorted(groups.items())]

    def _from_entries(self, name: str, entries: list[Descriptor]) -> FoundImage:
        """The image of one name; several entries are the same image for several platforms."""
        names = (parse(name, default_registry=LOCAL_REGISTRY),) if name else ()
        what = f"image {name}" if name else "the image without a name"
        top = entry = documents.choose(entries, self.platform, what=what)
        for _ in range(_NESTING):
            data = self._blob(entry)
            if not entry.is_index and not documents.is_index(data):
                manifest = documents.parse_manifest(data, self.limits)
                return self._found(manifest, "blobs/sha256/", names, f"sha256:{top.digest}")
            entry = documents.choose(documents.parse_index(data, self.limits), self.platform, what=what)
        raise InvalidInput(f"{what}: indexes nested deeper than {_NESTING}")

    def _found(self, manifest: Manifest, folder: str, names: tuple[Reference, ...], digest: str) -> FoundImage:
        config = documents.parse_config(self._blob(manifest.config, folder), self.platform)
        blobs = [self._locate(layer, folder) for layer in manifest.layers]
        return FoundImage(names, digest, manifest.config.digest, config, _layers(blobs, config))

    def _file(self, name: str) -> bytes:
        blob = self.files.find(name)
        if blob is None:
            raise InvalidInput(f"{name} is missing")
        return blob.read(self.limits.document_bytes)

    def _locate(self, descriptor: Descriptor, folder: str) -> Blob:
        blob = self.files.find(folder + descriptor.digest, descriptor.digest)
        if blob is None:
            raise InvalidInput(f"blob sha256:{descriptor.digest[:12]} is missing")
        if blob.size != descriptor.size:
            raise InvalidInput(f"{blob.label} has {blob.size} bytes; the manifest says {descriptor.size}")
        return blob

    def _blob(self, descriptor: Descriptor, folder: str = "blobs/sha256/") -> bytes:
        return self._locate(descriptor, folder).read(self.limits.document_bytes)

    # ---- docker archive ----------------------------------------------------------------------------------------------

    def _from_docker(self, manifest: Blob) -> list[FoundImage]:
        try:
            entries = json.loads(manifest.read(self.limits.document_bytes))
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"manifest.json is not JSON ({error})") from error
        if not isinstance(entries, list) or not entries:
            raise InvalidInput("manifest.json lists no image")
        return [self._from_docker_entry(entry, f"manifest.json[{index}]") for index, entry in enumerate(entries)]

    def _from_docker_entry(self, entry: Any, what: str) -> FoundImage:
        """Layers have no digest of their own there; the config's ``diff_ids`` vouch for them."""
        layers, tags = _member(entry, "Layers", list, what), _member(entry, "RepoTags", list, what)
        data = self._file(_member(entry, "Config", str, what))
        config = documents.parse_config(data, self.platform, what=f"{what}: Config")
        if len(layers) > self.limits.layers:
            raise InvalidInput(f"{what} has {len(layers)} layers; the limit is {self.limits.layers}")
        blobs = [self.files.find(str(layer)) for layer in layers]
        if None in blobs:
            raise InvalidInput(f"{what}: the layer {layers[blobs.index(None)]!r} is missing")
        names = tuple(parse(str(tag), default_registry=DEFAULT_REGISTRY) for tag in tags)
        digest = digest_of(data)
        found = [blob for blob in blobs if blob is not None]
        return FoundImage(names, digest, digest.removeprefix("sha256:"), config, _layers(found, config))


def open_folder(path: Path, platform: Platform, limits: Limits) -> Reader:
    """Reads an OCI layout, or what skopeo fetched."""
    return Reader(FolderFiles(path), platform, limits)


def _layers(blobs: Sequence[Blob], config: ConfigDocument) -> tuple[Layer, ...]:
    if len(blobs) != len(config.diff_ids):
        raise InvalidInput(f"the manifest has {len(blobs)} layers, the config names {len(config.diff_ids)}")
    return tuple(Layer(blob, diff_id) for blob, diff_id in zip(blobs, config.diff_ids, strict=True))


def _name_of(entry: Descriptor) -> str:
    """The name in an index entry's annotations; many tools write just a tag there, which names nothing."""
    annotations = entry.annotations or {}
    for key in _NAME_KEYS:
        name = annotations.get(key)
        if isinstance(name, str) and (":" in name or "/" in name or (name.isalpha() and name != "latest")):
            return name
    return ""


def _member(entry: Any, key: str, kind: type, what: str) -> Any:
    if not isinstance(entry, dict):
        raise InvalidInput(f"{what} must be an object")
    value = entry.get(key)
    if value is None and kind is list:
        value = []
    if not isinstance(value, kind):
        raise InvalidInput(f"{what}: {key} is missing or of the wrong type")
    return value
