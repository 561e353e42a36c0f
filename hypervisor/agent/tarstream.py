"""Packing and unpacking a tar stream; runs in a child that has entered the tree in question (archive.py).

Owners are numbers: names would be looked up in databases that are not ours. Extended attributes are kept as GNU tar,
libarchive and docker keep them, in ``SCHILY.xattr.`` records.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import tarfile
from typing import BinaryIO, cast

from .errors import AgentError, from_os, invalid, not_found

# Never look names up: the databases (and the libraries that glibc would load for it) are the container's.
tarfile.pwd = None  # type: ignore[attr-defined]
tarfile.grp = None  # type: ignore[attr-defined]

_XATTR = "SCHILY.xattr."
_KERNEL_TREES = ("/proc", "/sys", "/dev")
BLOCK = 64 * 1024
_PAGE = 4096  # the kernel's own files state a size of 0 (/proc) or of a page (/sys), whatever they hold
_MAX_SMALL = 4 << 20  # bytes read of a file whose stated size may be such a lie
_ZEROS = bytes(BLOCK)


# ---- packing ---------------------------------------------------------------------------------------------------------


class _Exactly:
    """A file that gives exactly `size` bytes, whatever happens to it meanwhile: a shorter one is filled with zeros."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._left = size

    def read(self, count: int) -> bytes:
        """The next bytes."""
        count = min(count, self._left)
        data = os.read(self._fd, count)
        self._left -= len(data) or count
        return data or bytes(count)


def pack_path(path: str, fd: int) -> None:
    """Writes a tar of `path` to `fd`; names are relative to its parent, or to itself if it ends in ``/.``.

    :raises AgentError: NotFound and the like
    """
    contents = path.endswith("/.") or path.strip("/") == ""
    real = path.rstrip("/") or "/"
    name = "." if contents else real.rpartition("/")[2]
    try:
        os.lstat(real)
    except OSError as e:
        raise from_os(f"{path} in the container", e) from e
    with (
        os.fdopen(fd, "wb", buffering=BLOCK) as out,
        tarfile.open(mode="w|", fileobj=out, format=tarfile.PAX_FORMAT, bufsize=BLOCK) as tar,
    ):
        _Packer(tar, real).add(real, name)


class _Packer:
    """Adds trees to a tar. What was asked for must be readable; a file below it that is not gives what can be read."""

    def __init__(self, tar: tarfile.TarFile, wanted: str) -> None:
        self._tar = tar
        self._wanted = wanted
        root = os.stat("/").st_dev
        self._kernel = {s.st_dev for p in _KERNEL_TREES if (s := _stat_or_none(p)) and s.st_dev != root}

    def add(self, path: str, name: str) -> None:
        """Adds a tree. What vanishes while we look is left out."""
        pending = [(path, name)]
        while pending:
            path, name = pending.pop()
            try:
                info = self._tar.gettarinfo(path, name)
            except OSError as e:
                if e.errno in (errno.ENOENT, errno.ENOTDIR):
                    continue
                raise
            if not info:  # a socket: a tar cannot hold one, and gettarinfo says None
                continue
            info.pax_headers = _attributes(path)
            if info.isreg() and not info.islnk():
                self._add_file(path, info)
            else:
                self._tar.addfile(info)
            if info.isdir():
                pending += self._children(path, name)

    def _children(self, path: str, name: str) -> list[tuple[str, str]]:
        status = _stat_or_none(path)
        if status is None or (status.st_dev in self._kernel and path in _KERNEL_TREES):
            return []
        try:
            names = sorted(os.listdir(path), reverse=True)
        except OSError:
            return []
        return [(f"{path.rstrip('/')}/{n}", f"{name}/{n}") for n in names]

    def _add_file(self, path: str, info: tarfile.TarInfo) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            if e.errno in (errno.ENOENT, errno.ELOOP):
                return
            raise
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                self._tar.addfile(info, self._content(fd, path, info))
        finally:
            os.close(fd)

    def _content(self, fd: int, path: str, info: tarfile.TarInfo) -> BinaryIO:
        """The content of a file; a small one is read before its header is written, which then states its true size."""
        if info.size > _PAGE:
            return cast(BinaryIO, _Exactly(fd, info.size))
        data, error = _read_small(fd)
        if path == self._wanted:
            if error is not None:
                raise from_os(f"{path} in the container", error) from error
            if len(data) > _MAX_SMALL:
                raise invalid(f"{path} in the container: states {info.size} bytes and holds more than {_MAX_SMALL}")
        info.size = min(len(data), _MAX_SMALL)
        return io.BytesIO(data)


def _read_small(fd: int) -> tuple[bytes, OSError | None]:
    """All of a file, or a little more than the limit; and what ended the reading early."""
    data = bytearray()
    try:
        while len(data) <= _MAX_SMALL and (block := os.read(fd, BLOCK)):
            data += block
    except OSError as e:
        return bytes(data), e
    return bytes(data), None


def _stat_or_none(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


def _attributes(path: str) -> dict[str, str]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
        return {
            _XATTR + name: os.getxattr(path, name, follow_symlinks=False).decode("utf-8", "surrogateescape")
            for name in names
            if not name.startswith("trusted.overlay.")
        }
    except OSError:
        return {}


# ---- unpacking -------------------------------------------------------------------------------------------------------


def unpack_into(directory: str, fd: int) -> None:
    """Unpacks the tar that comes from `fd` below `directory`, replacing files that are in the way.

    A failure leaves what was unpacked until then.

    :raises AgentError: no such directory, a name that leads out of it, no space
    :raises tarfile.TarError: not a tar, or cut short
    """
    _check_target(directory)
    os.umask(0o022)  # for directories that the tar implies; every mode that it names is set
    with os.fdopen(fd, "rb", buffering=BLOCK) as source:
        try:
            with tarfile.open(mode="r|", fileobj=source, bufsize=BLOCK) as tar:
                _Unpacker(directory).run(tar)
        except tarfile.TarError as e:
            raise invalid(f"archive: not a whole tar stream: {e}") from e
        while source.read(BLOCK):  # padding behind the end mark
            pass


def _check_target(directory: str) -> None:
    try:
        status = os.stat(directory)
    except OSError as e:
        raise not_found(f"{directory} in the container: {e.strerror}") from e
    if not stat.S_ISDIR(status.st_mode):
        raise invalid(f"{directory} in the container: is not a directory")


class _Unpacker:
    def __init__(self, directory: str) -> None:
        self._directory = directory.rstrip("/")
        self._directories: list[tuple[str, tarfile.TarInfo]] = []

    def run(self, tar: tarfile.TarFile) -> None:
        """Unpacks every member; directories get their modes and times last, when nothing is put into them any more."""
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # a stream of a million files must not stay in memory
            path = self._path_of(member.name)
            if path is None:
                continue
            try:
                self._unpack(tar, member, path)
            except OSError as e:
                raise from_os(f"{path} in the container", e) from e
        for path, member in reversed(self._directories):
            _apply(path, member)

    def _path_of(self, name: str) -> str | None:
        """The member's path; None for the target directory itself, which is left as it is."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise invalid(f"archive: the name {name[:200]!r} leads out of the directory")
        return f"{self._directory}/{'/'.join(parts)}" if parts else None

    def _unpack(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        os.makedirs(os.path.dirname(path) or "/", exist_ok=True)
        if member.isdir():
            self._make_directory(path)
            self._directories.append((path, member))
            return None
        _clear_way(path)
        if member.isreg():
            _write_file(path, tar, member)
        elif member.issym():
            os.symlink(member.linkname, path)
        elif member.islnk():
            return self._link(member, path)
        else:
            os.mknod(path, _device_mode(member), os.makedev(member.devmajor, member.devminor))
        _apply(path, member)
        return None

    @staticmethod
    def _make_directory(path: str) -> None:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not os.path.isdir(path):
                os.unlink(path)
                os.mkdir(path, 0o700)

    def _link(self, member: tarfile.TarInfo, path: str) -> None:
        target = self._path_of(member.linkname)
        if target is None:
            raise invalid(f"archive: {member.name[:200]!r} is a hard link to a directory")
        os.link(target, path, follow_symlinks=False)


def _clear_way(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        os.rmdir(path)


def _device_mode(member: tarfile.TarInfo) -> int:
    if member.isfifo():
        return stat.S_IFIFO | 0o600
    if member.ischr():
        return stat.S_IFCHR | 0o600
    if member.isblk():
        return stat.S_IFBLK | 0o600
    raise AgentError("Invalid", f"archive: {member.name[:200]!r} is of an unknown type")


def _write_file(path: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Writes a file's content; blocks of zeros become holes."""
    source = tar.extractfile(member)
    assert source is not None
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        while block := source.read(BLOCK):
            if block == _ZEROS[: len(block)]:
                os.lseek(fd, len(block), os.SEEK_CUR)
            else:
                _write_all(fd, block)
        os.ftruncate(fd, member.size)
    finally:
        os.close(fd)


def _write_all(fd: int, block: bytes) -> None:
    while block:
        block = block[os.write(fd, block) :]


def _apply(path: str, member: tarfile.TarInfo) -> None:
    """Owner, then mode (chown clears set-user-ID), attributes, and times last."""
    os.chown(path, member.uid, member.gid, follow_symlinks=False)
    if not member.issym():
        os.chmod(path, member.mode & 0o7777)
    for name, value in member.pax_headers.items():
        if name.startswith(_XATTR):
            _set_attribute(path, name[len(_XATTR) :], value.encode("utf-8", "surrogateescape"))
    os.utime(path, (member.mtime, member.mtime), follow_symlinks=False)


def _set_attribute(path: str, name: str, value: bytes) -> None:
    try:
        os.setxattr(path, name, value, follow_symlinks=False)
    except OSError as e:
        if e.errno not in (errno.ENOTSUP, errno.EPERM, errno.EINVAL):
            raise
