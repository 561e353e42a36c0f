"""Where the files of an image source lie: a folder, or a tar archive that is read in place."""

from __future__ import annotations

import os
import posixpath
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from hypervisor.errors import InvalidInput, ResourceExhausted
from hypervisor.images.blobs import Blob
from hypervisor.images.model import Limits
from hypervisor.images.tarstream import Kind, TarReader

_HEADER = 512  # bytes; what has no first header is no tar
_LINK_DEPTH = 8


class Files(Protocol):
    """Files by their names relative to the source."""

    def find(self, name: str, digest: str | None = None) -> Blob | None:
        """The file ``name``, or None; ``digest`` is what it must have when it is read.

        :raises InvalidInput: it is no regular file
        """


@dataclass(frozen=True)
class FolderFiles:
    """Files in a folder."""

    root: Path

    def find(self, name: str, digest: str | None = None) -> Blob | None:
        """See :class:`Files`. ``name`` never comes from an archive."""
        path = self.root / name
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InvalidInput(f"{path}: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise InvalidInput(f"{path} is no regular file")
        return Blob(path, 0, status.st_size, digest)


class ArchiveFiles:
    """Files in an uncompressed tar archive: an index of where each begins."""

    def __init__(self, path: Path, limits: Limits) -> None:
        """Read the archive's headers.

        :raises InvalidInput: it is no tar archive, damaged or cut short, or has too many members
        """
        self._path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        with path.open("rb") as file:
            stream = _SeekingStream(file, path)
            try:
                self._read(stream, limits)
            except InvalidInput as error:
                if stream.position > _HEADER:
                    raise
                raise InvalidInput("is no image archive (a tar file, packed or not)") from error

    def find(self, name: str, digest: str | None = None) -> Blob | None:
        """See :class:`Files`. Links (docker used them for layers that images share) stay inside the archive."""
        for _ in range(_LINK_DEPTH):
            if name not in self._links:
                break
            name = self._links[name]
        place = self._places.get(name)
        return Blob(self._path, *place, digest) if place else None

    def _read(self, stream: _SeekingStream, limits: Limits) -> None:
        reader = TarReader(stream, header_limit=limits.header_bytes)
        for count, entry in enumerate(reader.entries()):
            name = _member_name(entry.name)
            if count >= limits.entries:
                raise ResourceExhausted(f"{self._path}: more than {limits.entries} members")
            if name in self._places or name in self._links:
                raise InvalidInput(f"{self._path}: {entry.shown} is in the archive twice")
            if entry.kind is Kind.FILE and entry.regions is None:
                self._places[name] = (stream.position, entry.size)
            elif entry.kind is Kind.SYMLINK:
                folder, _, _ = os.fsencode(name).rpartition(b"/")
                self._links[name] = _member_name(folder + b"/" + entry.target)
            elif entry.kind is Kind.LINK:
                self._links[name] = _member_name(entry.target)


def _member_name(name: bytes) -> str:
    return os.fsdecode(posixpath.normpath(b"/" + name).lstrip(b"/"))


class _SeekingStream:
    """What :class:`TarReader` needs, over a file: data that nobody wants are passed over without being read."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._end = os.fstat(file.fileno()).st_size
        self.position = 0

    def read(self, count: int) -> bytes:
        data = self._file.read(count)
        self.position += len(data)
        if len(data) != count:
            raise self._cut_short()
        return data

    def read_some(self, limit: int) -> bytes:
        return self.read(min(limit, 1 << 20))

    def read_if_any(self, count: int) -> bytes:
        return self.read(count) if self.position < self._end else b""

    def skip(self, count: int) -> None:
        self.position += count
        if self.position > self._end:
            raise self._cut_short()
        self._file.seek(self.position)

    def _cut_short(self) -> InvalidInput:
        return InvalidInput(f"{self._path}: the archive is cut short")
