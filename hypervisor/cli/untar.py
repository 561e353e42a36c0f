"""Unpacks a tar stream that an untrusted container made, below one folder and nowhere else.

Theory of operation
-------------------
Every path is opened component by component below the folder's descriptor, following no symbolic link: neither one that
the archive brings nor one that lies there already can lead a write elsewhere. Symbolic links are made last, and only
those that stay inside the copied tree; others, devices, pipes and sockets are skipped with a word on each. Files belong
to whoever runs hv; set-id bits and write permission for others are dropped (the rules of tarfile's ``data`` filter,
which Python before 3.11.4 lacks). Folders get their mode and time when everything is in them.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable
from contextlib import suppress
from typing import IO

from hypervisor.errors import InvalidInput, ProtocolError

Parts = tuple[str, ...]
CHUNK = 1024 * 1024


class Unpacker:
    """Unpacks one stream. A context manager: it holds descriptors."""

    def __init__(self, folder: str, place: Callable[[Parts, bool], Parts], warn: Callable[[str], None]) -> None:
        """
        :param folder: an existing folder
        :param place: gives an entry's path below `folder` from its path in the archive, which has no ``..``, and
            whether it is a folder itself; an empty answer leaves the entry out
        :param warn: told of each entry that is skipped
        """
        self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._place = place
        self._warn = warn
        self._parent: tuple[Parts, int] | None = None  # the folder that was written to last
        self._folders: list[tuple[Parts, int, float]] = []
        self._links: list[tuple[Parts, str]] = []
        self.count = 0
        self.skipped = 0

    def __enter__(self) -> Unpacker:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._parent is not None:
            os.close(self._parent[1])
            self._parent = None
        os.close(self._root)

    def unpack(self, stream: IO[bytes]) -> None:
        """Unpacks it all.

        :raises InvalidInput: an entry would leave the folder, or something is in its way; what came before stays
        :raises ProtocolError: the stream is no tar, or broken off
        """
        try:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    self._entry(archive, member)
        except tarfile.TarError as e:
            raise ProtocolError(f"the copy broke off: {e}") from e
        for parts, linked in self._links:
            self._symlink(parts, linked)
        for parts, mode, mtime in sorted(self._folders, reverse=True):
            self._finish_folder(parts, mode, mtime)

    def _entry(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = self._place(split(member.name), member.isdir())
        if not parts:
            return
        if member.isdir():
            self._folder(parts, member)
        elif member.isfile():
            self._file(parts, archive, member)
        elif member.issym():
            self._links.append((parts, member.linkname))
        elif member.islnk():
            self._hard_link(parts, member)
        else:
            self._skip(parts, "neither file, folder nor link")
            return
        self.count += 1

    def _skip(self, parts: Parts, why: str) -> None:
        self.skipped += 1
        self._warn(f"skipped {'/'.join(parts)}: {why}")

    # ---- kinds of entries --------------------------------------------------------------------------------------------

    def _folder(self, parts: Parts, member: tarfile.TarInfo) -> None:
        os.close(self._open_folder(parts))
        self._folders.append((parts, member.mode & 0o755 | 0o700, member.mtime))

    def _file(self, parts: Parts, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        source = archive.extractfile(member)
        if source is None:
            raise ProtocolError(f"the copy has no data for {member.name}")
        parent = self._parent_of(parts)
        self._clear(parent, parts)
        fd = os.open(parts[-1], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=parent)
        with open(fd, "wb", buffering=0) as target:  # noqa: PTH123
            while data := source.read(CHUNK):
                if data.count(0) == len(data):  # a hole: a container may have files of terabytes that are nothing else
                    target.seek(len(data), os.SEEK_CUR)
                else:
                    target.write(data)
            target.truncate()
            if target.tell() != member.size:
                raise ProtocolError(f"the copy broke off in {member.name}")
            os.fchmod(fd, member.mode & 0o755 | 0o600)
            os.utime(fd, (member.mtime, member.mtime))

    def _hard_link(self, parts: Parts, member: tarfile.TarInfo) -> None:
        source = self._place(split(member.linkname), False)
        if not source:
            raise InvalidInput(f"the copy links {member.name} to {member.linkname}, which is not part of it")
        source_fd = self._open_folder(source[:-1])
        try:
            parent = self._parent_of(parts)
            self._clear(parent, parts)
            if not stat.S_ISREG(os.stat(source[-1], dir_fd=source_fd, follow_symlinks=False).st_mode):
                raise InvalidInput(f"the copy links {member.name} to {member.linkname}, which is no file")
            os.link(source[-1], parts[-1], src_dir_fd=source_fd, dst_dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError as e:
            raise InvalidInput(f"the copy links {member.name} to {member.linkname}, which is not there") from e
        finally:
            os.close(source_fd)

    def _symlink(self, parts: Parts, linked: str) -> None:
        if not stays_inside(parts, linked):
            self.count -= 1
            self._skip(parts, f"a symbolic link to {linked}, which may lead out of the copy")
            return
        parent = self._parent_of(parts)
        self._clear(parent, parts)
        os.symlink(linked, parts[-1], dir_fd=parent)

    def _finish_folder(self, parts: Parts, mode: int, mtime: float) -> None:
        fd = self._open_folder(parts)
        try:
            os.fchmod(fd, mode)
            os.utime(fd, (mtime, mtime))
        finally:
            os.close(fd)

    # ---- paths below the root ----------------------------------------------------------------------------------------

    def _clear(self, parent: int, parts: Parts) -> None:
        """Removes what has the entry's name, unless that is a folder."""
        try:
            with suppress(FileNotFoundError):
                os.unlink(parts[-1], dir_fd=parent)
        except (IsADirectoryError, PermissionError) as e:
            raise InvalidInput(f"{'/'.join(parts)} cannot be replaced by the copy: {e.strerror}") from e

    def _parent_of(self, parts: Parts) -> int:
        folder = parts[:-1]
        if self._parent is not None:
            if self._parent[0] == folder:
                return self._parent[1]
            os.close(self._parent[1])
            self._parent = None
        self._parent = folder, self._open_folder(folder)
        return self._parent[1]

    def _open_folder(self, parts: Parts) -> int:
        """A descriptor of the folder, made where it is missing. The caller closes it."""
        fd = os.dup(self._root)
        for part in parts:
            try:
                below = _enter(fd, part)
            except OSError as e:
                raise InvalidInput(f"{'/'.join(parts)}: {part} is in the way: {e.strerror}") from e
            finally:
                os.close(fd)
            fd = below
        return fd


def _enter(fd: int, name: str) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        return os.open(name, flags, dir_fd=fd)
    except FileNotFoundError:
        os.mkdir(name, 0o700, dir_fd=fd)
        os.chmod(name, 0o755, dir_fd=fd)
        return os.open(name, flags, dir_fd=fd)


def split(name: str) -> Parts:
    """The components of an entry's name.

    :raises InvalidInput: it has ``..`` or a NUL; a leading slash is dropped, as tar does
    """
    parts = tuple(p for p in name.split("/") if p not in ("", "."))
    if ".." in parts or "\0" in name:
        raise InvalidInput(f"the copy holds {name!r}, which leads out of its folder; nothing more was unpacked")
    return parts


def stays_inside(parts: Parts, linked: str) -> bool:
    """Whether a symbolic link at `parts` can only lead to something below the same root.

    ``..`` may stand at its beginning alone: those are steps up from a real folder, while one further on would be a step
    up from wherever another link leads to.
    """
    if linked.startswith("/"):
        return False
    steps = [p for p in linked.split("/") if p not in ("", ".")]
    up = 0
    while up < len(steps) and steps[up] == "..":
        up += 1
    return up < len(parts) and ".." not in steps[up:]
