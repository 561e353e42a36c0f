"""Formatted, empty file systems that VMs' data disks are linked clones of, so that no start makes one.

Source: US 10331559 (a linked clone's filter redirects reads of base data to the base disk's instance).

A base is a sparse file of a disk's full size, named by all that it depends on: size, quotas, mke2fs's release. One is
made at its first use on a host, by whoever holds the lock, in a file with another name that is renamed when it is whole
and durable; its checksum stands beside it and is compared once in each daemon's life. A VM has a hard link to its base
in its own folder: what is removed here stays what it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypervisor.errors import HvError, NotFound
from hypervisor.vmm.config import MIB, DataDisk
from hypervisor.vmm.directory import disk_error
from hypervisor.vmm.disk import create_data_disk, format_data_disk, format_options
from hypervisor.vmm.filelock import locked

KEEP = 32
"""Bases that a host keeps; pods' disks come in few sizes."""
_CHUNK = 1 << 20


class DiskBases:
    """The bases in a folder, which daemons may share. Safe for several tasks of one loop."""

    def __init__(self, directory: Path, mke2fs: Path | None) -> None:
        self._directory = directory
        self._mke2fs = mke2fs
        self._good: dict[Path, tuple[int, ...]] = {}
        self._one = asyncio.Lock()

    async def get(self, disk: DataDisk) -> Path:
        """The base for a disk like this, made now if there is none, or if what is there is damaged.

        :raises HvError: it cannot be made
        """
        path = self._directory / f"ext4-{disk.size_bytes // MIB}m-{self._key(disk)}.img"
        if await asyncio.to_thread(self._is_good, path):
            return path
        async with self._one, locked(self._directory / ".lock", f"cannot use {self._directory}"):
            if not await asyncio.to_thread(self._is_good, path):
                await self._make(path, disk)
        return path

    def _key(self, disk: DataDisk) -> str:
        """mke2fs's file stands for its release: another one may lay file systems out differently."""
        made_by: Any = None
        with contextlib.suppress(OSError, AttributeError):
            status = Path(self._mke2fs or "").stat()
            made_by = (status.st_size, status.st_mtime_ns)
        text = repr((disk.size_bytes, made_by, format_options(disk)))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _is_good(self, path: Path) -> bool:
        try:
            status = path.stat()
            seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if self._good.get(path) == seen:
                return True
            if _sum_of(path).read_text() != checksum(path):
                return False
            os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
        except OSError:
            return False
        self._good[path] = seen
        return True

    async def _make(self, path: Path, disk: DataDisk) -> None:
        half = path.with_suffix(".half")
        half.unlink(missing_ok=True)
        try:
            await create_data_disk(half, disk)
            await format_data_disk(half, disk, self._mke2fs)
            await asyncio.to_thread(_publish, half, path)
        finally:
            half.unlink(missing_ok=True)
        await asyncio.to_thread(self._prune)
        if not await asyncio.to_thread(self._is_good, path):
            raise HvError(f"the base {path} is damaged as soon as it was made; is the host's disk sound?")

    def _prune(self) -> None:
        bases = sorted(self._directory.glob("ext4-*.img"), key=lambda p: p.stat().st_ctime_ns)
        for path in bases[:-KEEP]:
            for gone in (path, _sum_of(path)):
                gone.unlink(missing_ok=True)


def link_base(base: Path, target: Path) -> None:
    """From now on `target` is the base, whatever becomes of the other name.

    :raises NotFound: it has gone meanwhile; `HvError`: it cannot be linked
    """
    try:
        os.link(base, target)
    except FileNotFoundError as e:
        raise NotFound(f"the base {base} has gone; start the pod again") from e
    except OSError as e:
        raise disk_error(e, f"cannot link {base}") from e


def checksum(path: Path) -> str:
    """SHA-256 of what a sparse file holds, with its places; holes cost nothing. Raises `OSError`."""
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        for start, end in _extents(file.fileno()):
            file.seek(start)
            while start < end:
                data = file.read(min(_CHUNK, end - start))
                if data.count(0) < len(data):  # what is data to one file system may be a hole to the next
                    digest.update(f"{start}:{len(data)}:".encode() + data)
                start += len(data) or end
    return digest.hexdigest()


def _extents(fd: int) -> Iterator[tuple[int, int]]:
    """Ranges that are no holes, in whole chunks, so that their borders are nobody's choice."""
    done, size = 0, os.fstat(fd).st_size
    while done < size:
        try:
            data = os.lseek(fd, done, os.SEEK_DATA)
        except OSError:  # only a hole is left
            return
        start = max(done, data // _CHUNK * _CHUNK)
        done = min(size, start + _CHUNK)
        yield start, done


def _publish(half: Path, path: Path) -> None:
    try:
        half.chmod(0o400)
        _sum_of(path).write_text(checksum(half))
        fd = os.open(half, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        half.rename(path)
    except OSError as e:
        raise disk_error(e, f"cannot keep the base {path}") from e


def _sum_of(path: Path) -> Path:
    return path.with_suffix(".sha256")
