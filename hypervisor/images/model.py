"""The values that the image service hands out: an image, its config, progress; and the limits it keeps to."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ID_SHOWN = 12
"""Hex digits of an image id that people see, and that the guest finds the disk by."""


@dataclass(frozen=True)
class ImageConfig:
    """What an image says about how to run it. Lists are tuples; a missing value is empty or None."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""
    workdir: str = "/"
    stop_signal: str | None = None
    exposed_ports: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    architecture: str = ""


@dataclass(frozen=True)
class Image:
    """A stored image: a read-only EROFS disk and what the image says about running it.

    :ivar id: hex sha256 of the image's config, which in turn names the content of every layer
    :ivar names: full names that mean this image now, sorted; none for one that lost its last name
    :ivar digest: ``sha256:<hex>`` of the manifest (or index) it came with
    :ivar size_bytes: what the disk occupies on the host
    :ivar created: RFC 3339 time that the image states, or ""
    """

    id: str
    names: tuple[str, ...]
    digest: str
    disk: Path
    size_bytes: int
    created: str
    config: ImageConfig

    @property
    def short_id(self) -> str:
        """The first 12 hex digits of the id."""
        return self.id[:ID_SHOWN]

    @property
    def serial(self) -> str:
        """Serial number of the image's disk in a guest: ``img-<first 12 hex digits of the id>``."""
        return f"img-{self.short_id}"


@dataclass(frozen=True)
class ProgressEvent:
    """One step of a pull or an import.

    :ivar phase: ``resolve``, ``download``, ``expand`` (a compressed archive), ``unpack``, ``write`` or ``done``
    :ivar done: so much of it is done, in ``unit``
    :ivar total: so much there is, or None while that is not known
    :ivar detail: one line for people
    """

    phase: str
    done: int = 0
    total: int | None = None
    unit: str = "bytes"
    detail: str = ""


Progress = Callable[[ProgressEvent], None]
"""Called in the event loop's thread; must not block."""


def no_progress(_event: ProgressEvent) -> None:
    """For callers who want none."""


@dataclass(frozen=True)
class Limits:
    """How much one image may ask for. They bound memory, time and disk that a hostile archive can take.

    :ivar image_bytes: sum of the sizes of all files in all layers, and of what decompression yields
    :ivar bomb_ratio: compressed data may grow by this factor at most, once past ``bomb_grace`` bytes
    :ivar entries: files, directories and so on in all layers (about 0.5 KiB of memory each)
    :ivar header_bytes: of one extended tar header (long names, extended attributes)
    :ivar document_bytes: of a manifest, index or config
    """

    image_bytes: int = 64 << 30
    bomb_ratio: int = 200
    bomb_grace: int = 1 << 30
    entries: int = 1_000_000
    layers: int = 512
    header_bytes: int = 1 << 20
    document_bytes: int = 8 << 20


_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Platform:
    """What an image must have been made for."""

    architecture: str = "amd64"
    os: str = "linux"

    @classmethod
    def of_host(cls) -> Platform:
        """Linux on this machine's kind of CPU, in the names that images use."""
        machine = platform.machine()
        return cls(_ARCHITECTURES.get(machine, machine))

    def __str__(self) -> str:
        return f"{self.os}/{self.architecture}"
