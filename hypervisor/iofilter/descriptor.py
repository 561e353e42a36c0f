"""A virtual disk's metadata: the small file that says where its bytes are and which filters stand before them.

The file is JSON: ``{"version": 1, "checksum": "sha256:...", "disk": {...}}``; the checksum is of the disk's object as
canonical JSON (sorted keys, no spaces). It is replaced as a whole (written beside, synced, renamed), so that a crash
leaves the old one or the new one. A descriptor that cannot be trusted is refused with what is wrong: data read through
another chain than the one that wrote it would be wrong data.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from hypervisor.errors import InvalidInput, NotFound
from hypervisor.iofilter.loop import ORDERS, filter_class
from hypervisor.iofilter.spec import FilterSpec, known, text

VERSION = 1
FILE = "disk.json"
BLOCK = 4096
"""A disk's size is a multiple of this."""


@dataclass(frozen=True)
class Data:
    """Where the bytes below the last filter are.

    :param kind: ``file`` or ``nbd``
    :param path: the file, relative to the disk's folder unless absolute; or the NBD server's Unix socket
    :param export: the NBD server's name for it
    :param direct: past the page cache
    """

    kind: str
    path: str
    export: str = ""
    direct: bool = False

    def as_json(self) -> dict[str, Any]:
        """Its object in the file."""
        return {"kind": self.kind, "path": self.path, "export": self.export, "direct": self.direct}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Checks and converts. Raises `InvalidInput`."""
        known(value, {"kind", "path", "export", "direct"}, "data")
        if value.get("kind") not in ("file", "nbd"):
            raise InvalidInput("is file or nbd", where="data.kind")
        return cls(
            value["kind"], text(value, "path", "data"), str(value.get("export", "")), value.get("direct") is True
        )


@dataclass(frozen=True)
class Descriptor:
    """A virtual disk, frozen; a changed one is another value.

    :param size: bytes as created; the open disk says what it is now
    :param parent: the base disk that a linked clone redirects to, by name
    :param filters: from the guest to the data
    """

    name: str
    size: int
    data: Data
    parent: str | None = None
    read_only: bool = False
    filters: tuple[FilterSpec, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.size <= 0 or self.size % BLOCK:
            raise InvalidInput(f"{self.size} bytes is not a positive multiple of {BLOCK}", where="size")
        _check_chain(self.filters)

    def filter(self, name: str) -> FilterSpec:
        """Raises `NotFound`."""
        for spec in self.filters:
            if spec.name == name:
                return spec
        raise NotFound(f"disk {self.name} has no filter {name}")

    def place_for(self, kind: str) -> int:
        """Where a filter goes when nobody says: after all of its class and those before. Raises `InvalidInput`."""
        order = ORDERS.index(filter_class(kind).order)
        if ORDERS[order] == "anywhere":
            return 0
        before = [i for i, spec in enumerate(self.filters) if ORDERS.index(filter_class(spec.kind).order) <= order]
        return before[-1] + 1 if before else 0

    def with_filter(self, spec: FilterSpec, at: int) -> Self:
        """With one more filter."""
        return replace(self, filters=(*self.filters[:at], spec, *self.filters[at:]))

    def without_filter(self, name: str) -> Self:
        """With one less. Raises `NotFound`."""
        gone = self.filter(name)
        return replace(self, filters=tuple(spec for spec in self.filters if spec is not gone))

    def with_settings(self, name: str, settings: tuple[tuple[str, str], ...]) -> Self:
        """With other settings for a filter. Raises `NotFound`."""
        old = self.filter(name)
        return replace(self, filters=tuple(replace(s, settings=settings) if s is old else s for s in self.filters))

    def as_json(self) -> dict[str, Any]:
        """Its object in the file."""
        return {
            "name": self.name,
            "size": self.size,
            "data": self.data.as_json(),
            "parent": self.parent,
            "readOnly": self.read_only,
            "filters": [spec.as_json() for spec in self.filters],
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Checks and converts. Raises `InvalidInput`."""
        known(value, {"name", "size", "data", "parent", "readOnly", "filters"}, "disk")
        size, filters, parent = value.get("size"), value.get("filters", []), value.get("parent")
        if not isinstance(size, int) or not isinstance(filters, list) or not isinstance(parent, str | None):
            raise InvalidInput("size is a number, filters a list, parent a name or null", where="disk")
        specs = tuple(FilterSpec.from_json(spec, f"filters[{i}]") for i, spec in enumerate(filters))
        return cls(
            text(value, "name", "disk"),
            size,
            Data.from_json(value.get("data")),
            parent,
            value.get("readOnly") is True,
            specs,
        )


def _check_chain(filters: tuple[FilterSpec, ...]) -> None:
    """Every filter exists, names are unique, classes are in order."""
    before = 0
    for i, spec in enumerate(filters):
        where = f"filters[{i}]"
        try:
            order = ORDERS.index(filter_class(spec.kind).order)
        except InvalidInput as error:
            raise InvalidInput(f"{error}; without it the disk would give wrong data", where=where) from None
        if ORDERS[order] == "anywhere":
            order = before
        if order < before:
            raise InvalidInput(
                f"{spec.kind} ({ORDERS[order]}) cannot come after {filters[i - 1].kind} ({ORDERS[before]})", where=where
            )
        if any(other.name == spec.name for other in filters[:i]):
            raise InvalidInput(f"there are two filters named {spec.name}", where=where)
        before = order


def _checksum(disk: Any) -> str:
    canonical = json.dumps(disk, sort_keys=True, separators=(",", ":")).encode()
    return "sha256:" + hashlib.sha256(canonical).hexdigest()


def load(folder: Path) -> Descriptor:
    """The descriptor in a disk's folder.

    :raises NotFound: there is none
    :raises InvalidInput: it is damaged, of a newer version, or names a filter that this version does not have
    """
    path = folder / FILE
    try:
        whole = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise NotFound(f"there is no disk {folder.name} ({path} is missing)") from error
    except ValueError as error:
        raise InvalidInput(f"{path} is damaged: {error}; restore it from a copy") from error
    if not isinstance(whole, dict) or not isinstance(whole.get("version"), int):
        raise InvalidInput(f"{path} is no disk's descriptor")
    if whole["version"] > VERSION:
        raise InvalidInput(
            f"{path} is of version {whole['version']}, this podvisor knows up to {VERSION}: use the one that wrote it"
        )
    if whole.get("checksum") != _checksum(whole.get("disk")):
        raise InvalidInput(f"{path} is damaged: its checksum is not that of its content; restore it from a copy")
    try:
        return Descriptor.from_json(whole["disk"])
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error


def save(folder: Path, descriptor: Descriptor) -> None:
    """Replaces the descriptor: after a crash there is the old one or this one."""
    disk = descriptor.as_json()
    text = json.dumps({"version": VERSION, "checksum": _checksum(disk), "disk": disk}, indent=2) + "\n"
    beside = folder / f".{FILE}.new"
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(folder / FILE)
    descriptor_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor_fd)
    finally:
        os.close(descriptor_fd)
