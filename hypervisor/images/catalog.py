"""What is stored, on disk. Plain blocking functions; :mod:`hypervisor.images.store` is the asynchronous face.

::

    <directory>/
        lock                    flock, held for moments: names, and folders coming and going
        names.json              {"version": 1, "names": {"docker.io/library/busybox:latest": {"id", "digest"}}}
        disks/<id>/             appears and disappears whole, by rename
            disk.erofs          the disk
            image.json          everything else about the image
            lease               flock, shared: held by whoever uses the image
        building/<id>           flock, held while someone makes that image
        staging/<random>/       half-made things; removed by their maker, or swept when that is dead
            lock                flock, held by the maker

Order of steps, so that a crash at any moment leaves a good state: an image's folder is complete and on stable storage
before it is renamed into place, and there before a name points to it. A removed image loses its names first.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hypervisor.errors import Conflict, NotFound, Unavailable
from hypervisor.images.disk import space_error
from hypervisor.images.locks import locked, try_lock
from hypervisor.images.model import Image, ImageConfig
from hypervisor.images.reference import Reference, id_prefix, lookups

DISK = "disk.erofs"
_VERSION = 1
_log = logging.getLogger(__name__)


class Name(NamedTuple):
    """What a name points at: an image, and the ``sha256:<hex>`` digest that it came with."""

    id: str
    digest: str


class Match(NamedTuple):
    """An image that was looked for, and the stored name that led to it (None: its id did)."""

    image: Image
    name: str | None


class Catalog:
    """The stored images of one directory. Safe to use from several threads and processes."""

    def __init__(self, directory: Path) -> None:
        """Make the directory if need be.

        :raises Unavailable: that is not possible
        """
        self.directory = directory
        self.disks = directory / "disks"
        self.building = directory / "building"
        self._staging = directory / "staging"
        self._names = directory / "names.json"
        try:
            for folder in (self.disks, self.building, self._staging):
                folder.mkdir(parents=True, exist_ok=True)
            self._staging.chmod(0o700)
        except OSError as error:
            raise Unavailable(f"cannot keep images in {directory}: {error.strerror}") from error

    # ---- reading -----------------------------------------------------------------------------------------------------

    def images(self) -> list[Image]:
        """All of them, by their first name, then those without one."""
        names = self._read_names()
        found = [self._load(path.name, names) for path in self.disks.iterdir()]
        images = [image for image in found if image is not None]
        return sorted(images, key=lambda image: (not image.names, image.names, image.id))

    def find(self, text: str) -> Match | None:
        """By id or a unique prefix of it, or by name.

        :raises InvalidInput: it is no name
        :raises Conflict: several images' ids begin so
        """
        names = self._read_names()
        if (prefix := id_prefix(text)) and (image := self._by_prefix(prefix, names)):
            return Match(image, None)
        if text.startswith("sha256:"):
            return None
        for reference in lookups(text):
            name = _lookup(reference, names)
            image = self._load(names[name].id, names) if name else None
            if name and image:
                return Match(dataclasses.replace(image, digest=names[name].digest), name)
        return None

    def get(self, image_id: str) -> Image | None:
        """The image of exactly this id."""
        return self._load(image_id, self._read_names())

    # ---- making ------------------------------------------------------------------------------------------------------

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private folder for half-made things, on the same file system; removed at the end.

        :raises ResourceExhausted: no room for it
        """
        try:
            with locked(self.directory / "lock"):
                folder = Path(tempfile.mkdtemp(dir=self._staging))
                descriptor = try_lock(folder / "lock")
        except OSError as error:
            raise space_error(error, self._staging) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if descriptor is not None:
                os.close(descriptor)

    def publish(self, made: Sequence[Image], names: Mapping[Reference, Name]) -> None:
        """Store images whose disks lie in staging, each in a folder of its own named by its id, and set names.

        :raises ResourceExhausted: no room
        """
        try:
            for image in made:
                folder = image.disk.parent
                folder.chmod(0o755)
                _write_durably(folder / "image.json", _encode(image))
                _sync_folder(folder)
            with locked(self.directory / "lock"):
                for image in made:
                    image.disk.parent.rename(self.disks / image.id)
                _sync_folder(self.disks)
                entries = {str(reference): name for reference, name in names.items()}
                self._write_names({**self._read_names(), **entries})
        except OSError as error:
            raise space_error(error, self.disks) from error

    # ---- removing ----------------------------------------------------------------------------------------------------

    def remove(self, text: str) -> Image | None:
        """Remove a name; with its last name, or named by its id, the image itself, which is then the result.

        :raises NotFound: there is none
        :raises Conflict: it is in use
        """
        with self.staging() as trash, locked(self.directory / "lock"):
            match = self.find(text)
            if match is None:
                raise NotFound(f"image {text} is not here; hv image ls shows what is")
            if match.name is not None and len(match.image.names) > 1:
                names = self._read_names()
                del names[match.name]
                self._write_names(names)
                return None
            if not self._discard(match.image, trash):
                raise Conflict(f"image {text} is in use by a pod; stop and remove its pods first (hv ps shows them)")
            return match.image

    def prune(self, in_use: set[str], *, dangling_only: bool) -> list[Image]:
        """Remove the images that nobody uses; they are the result.

        :param in_use: ids to spare, besides those that are leased
        :param dangling_only: spare those that have a name too
        """
        spared = {image_id.removeprefix("sha256:") for image_id in in_use}
        removed = []
        with self.staging() as trash, locked(self.directory / "lock"):
            for image in self.images():
                if image.id in spared or (dangling_only and image.names):
                    continue
                if self._discard(image, trash):
                    removed.append(image)
        return removed

    def sweep(self) -> None:
        """Remove what dead makers left behind, and names and folders that lead nowhere."""
        with locked(self.directory / "lock"):
            for folder in self._staging.iterdir():
                if (descriptor := try_lock(folder / "lock")) is not None:
                    _log.warning("removing what an interrupted pull or import left in %s", folder)
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(descriptor)
            for path in self.building.iterdir():
                if (descriptor := try_lock(path)) is not None:
                    path.unlink()
                    os.close(descriptor)
            self._sweep_images()

    def _sweep_images(self) -> None:
        names = self._read_names()
        good = set()
        for folder in list(self.disks.iterdir()):
            if self._load(folder.name, names) is not None:
                good.add(folder.name)
            else:
                _log.warning("removing the damaged image %s", folder.name)
                shutil.rmtree(folder, ignore_errors=True)
        if any(name.id not in good for name in names.values()):
            self._write_names({text: name for text, name in names.items() if name.id in good})

    # ---- leases ------------------------------------------------------------------------------------------------------

    def lease(self, image: Image) -> int:
        """A descriptor; while it is open, the image stays.

        :raises NotFound: it went just now
        """
        try:
            descriptor = try_lock(image.disk.parent / "lease", shared=True)
        except FileNotFoundError:
            descriptor = None
        if descriptor is None:
            raise NotFound(f"image {image.short_id} is being removed")
        return descriptor

    # ---- inner -------------------------------------------------------------------------------------------------------

    def _by_prefix(self, prefix: str, names: Mapping[str, Name]) -> Image | None:
        found = sorted(path.name for path in self.disks.glob(f"{prefix}*"))
        if len(found) > 1:
            raise Conflict(f"image {prefix}: {len(found)} images' ids begin so; give more digits")
        return self._load(found[0], names) if found else None

    def _load(self, image_id: str, names: Mapping[str, Name]) -> Image | None:
        """The image, or None if there is none, or none that is whole."""
        folder = self.disks / image_id
        try:
            value = json.loads((folder / "image.json").read_bytes())
            if value["version"] != _VERSION or (folder / DISK).stat().st_size != value["disk_bytes"]:
                return None
            mine = tuple(sorted(text for text, name in names.items() if name.id == image_id))
            return _decode(value, folder / DISK, mine)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _read_names(self) -> dict[str, Name]:
        try:
            value = json.loads(self._names.read_bytes())
            return {str(text): Name(str(name["id"]), str(name["digest"])) for text, name in value["names"].items()}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError):
            aside = self._names.with_suffix(".damaged")
            _log.error("%s is damaged; it is kept as %s, and the images are there by their ids", self._names, aside)
            self._names.replace(aside)
            return {}

    def _write_names(self, names: Mapping[str, Name]) -> None:
        value = {"version": _VERSION, "names": {text: name._asdict() for text, name in sorted(names.items())}}
        temporary = self._names.with_suffix(".new")
        _write_durably(temporary, value)
        temporary.replace(self._names)
        _sync_folder(self.directory)

    def _discard(self, image: Image, trash: Path) -> bool:
        """Take an image out of the store unless it is leased. The lock is held, so that no lease can begin."""
        descriptor = try_lock(image.disk.parent / "lease")
        if descriptor is None:
            return False
        try:
            names = self._read_names()
            if image.names:
                self._write_names({text: name for text, name in names.items() if name.id != image.id})
            image.disk.parent.rename(trash / image.id)
        finally:
            os.close(descriptor)
        return True


def _lookup(reference: Reference, names: Mapping[str, Name]) -> str | None:
    """The stored name that a reference means: itself, or for a digest any of its repository that came with it."""
    if str(reference) in names:
        return str(reference)
    if reference.digest is None:
        return None
    fitting = (
        text
        for text, name in sorted(names.items())
        if name.digest == reference.digest and text.startswith((f"{reference.name}:", f"{reference.name}@"))
    )
    return next(fitting, None)


def _encode(image: Image) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "id": image.id,
        "digest": image.digest,
        "created": image.created,
        "size_bytes": image.size_bytes,
        "disk_bytes": image.disk.stat().st_size,
        "config": dataclasses.asdict(image.config),
    }


def _decode(value: Mapping[str, Any], disk: Path, names: tuple[str, ...]) -> Image:
    config: dict[str, Any] = {
        key: tuple(part) if isinstance(part, list) else part for key, part in value["config"].items()
    }
    return Image(
        id=value["id"],
        names=names,
        digest=value["digest"],
        disk=disk,
        size_bytes=value["size_bytes"],
        created=value["created"],
        config=ImageConfig(**config),
    )


def _write_durably(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
