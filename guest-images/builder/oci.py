"""OCI images as archives (`oci-archive:`), written by hand: layers, config, manifest and index with fixed metadata."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import stat
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_EPOCH = "1970-01-01T00:00:00Z"
_MEDIA = "application/vnd.oci.image"


@dataclass(frozen=True)
class Layer:
    """A compressed layer and the digest of what is in it."""

    blob: bytes
    diff_id: str
    comment: str


@dataclass(frozen=True)
class ImageConfig:
    """What a container of the image runs, unless told otherwise."""

    cmd: Sequence[str]
    entrypoint: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = "/"
    exposed_ports: Sequence[str] = ()
    stop_signal: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The `config` object of an OCI image configuration; what is not set is left out."""
        rows: dict[str, Any] = {
            "Cmd": list(self.cmd),
            "Entrypoint": list(self.entrypoint),
            "Env": [f"{k}={v}" for k, v in self.env.items()],
            "ExposedPorts": {port: {} for port in self.exposed_ports},
            "Labels": dict(self.labels),
            "StopSignal": self.stop_signal,
            "User": self.user,
            "WorkingDir": self.workdir,
        }
        return {key: value for key, value in rows.items() if value}


def make_layer(folder: Path, comment: str, *, modes: Mapping[str, int] | None = None) -> Layer:
    """A layer of everything below `folder`: sorted, owned by root, times 0.

    :param modes: permissions by path below `folder`, where they are not what the file itself has (sticky bits, say)
    """
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):
            _add(tar, path, str(path.relative_to(folder)), modes or {})
    data = plain.getvalue()
    return Layer(gzip.compress(data, compresslevel=6, mtime=0), _digest(data), comment)


def write_archive(target: Path, name: str, layers: Sequence[Layer], config: ImageConfig) -> None:
    """Writes one image as an OCI archive.

    :param name: what it calls itself: ``podvisor/busybox:latest``
    """
    blobs: dict[str, bytes] = {layer_digest(layer): layer.blob for layer in layers}

    def blob(media: str, content: bytes) -> dict[str, Any]:
        digest = _digest(content)
        blobs[digest] = content
        return {"mediaType": f"{_MEDIA}.{media}", "digest": digest, "size": len(content)}

    described = blob("config.v1+json", _json(_image_config(layers, config)))
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_MEDIA}.manifest.v1+json",
        "config": described,
        "layers": [blob("layer.v1.tar+gzip", layer.blob) for layer in layers],
    }
    pointer = blob("manifest.v1+json", _json(manifest))
    pointer["annotations"] = {"org.opencontainers.image.ref.name": name}
    files = {f"blobs/{digest.replace(':', '/')}": content for digest, content in sorted(blobs.items())}
    files["index.json"] = _json({"schemaVersion": 2, "mediaType": f"{_MEDIA}.index.v1+json", "manifests": [pointer]})
    files["oci-layout"] = _json({"imageLayoutVersion": "1.0.0"})
    with tarfile.open(target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))


def layer_digest(layer: Layer) -> str:
    """The digest by which a manifest names the layer."""
    return _digest(layer.blob)


def _image_config(layers: Sequence[Layer], config: ImageConfig) -> dict[str, Any]:
    return {
        "created": _EPOCH,
        "architecture": "amd64",
        "os": "linux",
        "config": config.as_json(),
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": _EPOCH, "created_by": f"podvisor guest-images: {layer.comment}"} for layer in layers],
    }


def _add(tar: tarfile.TarFile, path: Path, name: str, modes: Mapping[str, int]) -> None:
    entry = tarfile.TarInfo(name)
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, str(path.readlink()), 0o777
        tar.addfile(entry)
    elif stat.S_ISDIR(status.st_mode):
        entry.type, entry.mode = tarfile.DIRTYPE, modes.get(name, 0o755)
        tar.addfile(entry)
    else:
        # Not the file's own group and other bits: they depend on the umask of whoever built it.
        entry.mode = modes.get(name, 0o755 if status.st_mode & stat.S_IXUSR else 0o644)
        entry.size = status.st_size
        with path.open("rb") as f:
            tar.addfile(entry, f)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
