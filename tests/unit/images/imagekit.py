"""Makes layers and images for tests: layers with ``tarfile`` (not with the code under test), images as OCI layouts."""

from __future__ import annotations

import ctypes
import gzip
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from hypervisor.images.blobs import Blob
from hypervisor.images.build import BuildJob, Layer, build_disk
from hypervisor.images.model import Limits, no_progress

OCI = "application/vnd.oci.image"
IMAGE_ID = "0123456789abcdef" * 4


class LayerTar:
    """A layer in the making; every method adds an entry and returns the layer."""

    def __init__(self, tar_format: int = tarfile.PAX_FORMAT) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w", format=tar_format)  # noqa: SIM115

    def add(self, name: str, kind: bytes, data: bytes = b"", pax: Mapping[str, str] | None = None, **more: Any) -> Self:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.pax_headers = kind, len(data), dict(pax or {})
        for key, value in {"mode": 0o755 if kind == tarfile.DIRTYPE else 0o644, **more}.items():
            setattr(info, key, value)
        self._tar.addfile(info, io.BytesIO(data))
        return self

    def file(self, name: str, data: bytes | str = b"", **more: Any) -> Self:
        return self.add(name, tarfile.REGTYPE, data.encode() if isinstance(data, str) else data, **more)

    def dir(self, name: str, **more: Any) -> Self:
        return self.add(name, tarfile.DIRTYPE, **more)

    def symlink(self, name: str, target: str, **more: Any) -> Self:
        return self.add(name, tarfile.SYMTYPE, linkname=target, **more)

    def link(self, name: str, target: str, **more: Any) -> Self:
        return self.add(name, tarfile.LNKTYPE, linkname=target, **more)

    def device(self, name: str, kind: bytes, major: int, minor: int, **more: Any) -> Self:
        return self.add(name, kind, devmajor=major, devminor=minor, **more)

    def fifo(self, name: str, **more: Any) -> Self:
        return self.add(name, tarfile.FIFOTYPE, **more)

    def bytes(self) -> bytes:
        self._tar.close()
        return self._buffer.getvalue()


def xattr(name: str, value: bytes) -> dict[str, str]:
    """A PAX header for an extended attribute."""
    return {f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape")}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def zstd(data: bytes) -> bytes:
    """Compressed with the system's library."""
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_compressBound.restype = library.ZSTD_compress.restype = ctypes.c_size_t
    library.ZSTD_compressBound.argtypes = [ctypes.c_size_t]
    room = ctypes.create_string_buffer(library.ZSTD_compressBound(len(data)))
    library.ZSTD_compress.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int,
    ]  # fmt: skip
    size = library.ZSTD_compress(room, len(room), data, len(data), 3)
    return room.raw[:size]


COMPRESSORS = {"": lambda data: data, "+gzip": lambda data: gzip.compress(data, 1, mtime=0), "+zstd": zstd}


@dataclass
class Layout:
    """An OCI layout in a folder. Documents are plain dicts that a test may spoil before :meth:`write`."""

    folder: Path
    manifests: list[dict[str, Any]] = field(default_factory=list)

    def blob(self, data: bytes) -> dict[str, Any]:
        path = self.folder / "blobs/sha256" / sha256(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return {"digest": f"sha256:{sha256(data)}", "size": len(data)}

    def document(self, value: Any, media_type: str) -> dict[str, Any]:
        return {"mediaType": media_type, **self.blob(json.dumps(value).encode())}

    def image(
        self,
        layers: Iterable[bytes],
        *,
        name: str = "",
        compression: str = "+gzip",
        config: Mapping[str, Any] | None = None,
        architecture: str = "amd64",
        change: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Add an image; its descriptor in the index."""
        tars = list(layers)
        document = {
            "architecture": architecture,
            "os": "linux",
            "created": "2024-01-02T03:04:05Z",
            "config": dict(config or {}),
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(tar)}" for tar in tars]},
        }
        value = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.manifest.v1+json",
            "config": self.document(document, f"{OCI}.config.v1+json"),
            "layers": [
                {"mediaType": f"{OCI}.layer.v1.tar{compression}", **self.blob(COMPRESSORS[compression](tar))}
                for tar in tars
            ],
            **(change or {}),
        }
        descriptor = self.document(value, f"{OCI}.manifest.v1+json")
        if name:
            descriptor["annotations"] = {"org.opencontainers.image.ref.name": name}
        self.manifests.append(descriptor)
        return descriptor

    def write(self) -> Path:
        """Write the index; the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        (self.folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self.manifests}))
        return self.folder


def layout(folder: Path, *layers: bytes, **options: Any) -> Path:
    """An OCI layout with one image."""
    made = Layout(folder)
    made.image(layers, **options)
    return made.write()


def as_archive(folder: Path, path: Path) -> Path:
    """An OCI archive of a layout."""
    with tarfile.open(path, "w") as tar:
        for member in sorted(folder.rglob("*")):
            tar.add(member, member.relative_to(folder), recursive=False)
    return path


def docker_archive(path: Path, layers: Iterable[bytes], *, tags: list[str] | None = None, **members: bytes) -> Path:
    """What ``docker save`` made before it made OCI layouts."""
    tars = list(layers)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["sh"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(tar)}" for tar in tars]},
        }
    ).encode()
    names = [f"{sha256(tar)}/layer.tar" for tar in tars]
    manifest = [{"Config": "config.json", "RepoTags": tags, "Layers": names}]
    archive = LayerTar().file("config.json", config)
    for name, tar in zip(names, tars, strict=True):
        archive.file(name, tar)
    archive.file("manifest.json", members.get("manifest") or json.dumps(manifest).encode())
    path.write_bytes(archive.bytes())
    return path


def build(folder: Path, *layers: bytes, limits: Limits | None = None) -> Path:
    """The disk of an image of uncompressed layers, built in this process."""
    found = []
    for index, tar in enumerate(layers):
        path = folder / f"layer{index}.tar"
        path.write_bytes(tar)
        found.append(Layer(Blob(path, 0, len(tar)), sha256(tar)))
    output = folder / "disk.erofs"
    output.unlink(missing_ok=True)
    build_disk(BuildJob(IMAGE_ID, tuple(found), output, limits or Limits()), no_progress)
    return output


def has(program: str) -> bool:
    return shutil.which(program) is not None
