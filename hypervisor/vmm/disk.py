"""The VM's own writable disk: a raw file with an empty ext4, made in some ten milliseconds.

The file is sparse: it takes what the guest has written. Two promises keep a full host from hurting guests: a start is
refused while the host has less than `RESERVE` free, and a write that the host cannot take stops the VM (QEMU's
``werror=enospc``) instead of failing in the guest. ``preallocate`` reserves all of it at the start for those who want
neither.

No journal: the disk does not outlive its VM, and a journal would write everything twice.
"""

from __future__ import annotations

import asyncio
import functools
import os
from pathlib import Path

from hypervisor.errors import HostUnfit, HvError, ResourceExhausted
from hypervisor.vmm.config import MIB, DataDisk
from hypervisor.vmm.directory import disk_error
from hypervisor.vmm.uncut import uncut

#: what must be free on the host's file system beyond a preallocated disk, bytes
RESERVE = 128 * MIB
_FEATURES = "^has_journal,^resize_inode,^huge_file,sparse_super2"
_QUOTAS = ("quota,project", "quotatype=prjquota")
"""Feature and option of a disk whose directories may have limits."""


async def make_data_disk(path: Path, disk: DataDisk, mke2fs: Path | None) -> None:
    """`create_data_disk` and `format_data_disk`. Raises as these."""
    await create_data_disk(path, disk)
    await format_data_disk(path, disk, mke2fs)


async def create_data_disk(path: Path, disk: DataDisk) -> None:
    """Make `path`, mode 0600, of its full size; when it fails or is cancelled, the file is gone again.

    :raises ResourceExhausted: the host lacks the space
    """
    remove = functools.partial(path.unlink, missing_ok=True)
    await uncut(functools.partial(_make_file, path, disk), remove)


async def format_data_disk(path: Path, disk: DataDisk, mke2fs: Path | None) -> None:
    """Make the file system; when it fails or is cancelled, the file is gone.

    :raises HostUnfit: mke2fs is missing
    """
    remove = functools.partial(path.unlink, missing_ok=True)
    try:
        if mke2fs is None:
            raise HostUnfit("mke2fs is not installed; install the package e2fsprogs")
        await _format(path, mke2fs, *format_options(disk))
        if disk.preallocate:  # after mke2fs: it zeroes by punching holes where the file system has no other way
            await asyncio.to_thread(_allocate, path, disk.size_bytes)
    except BaseException:
        remove()
        raise


def _make_file(path: Path, disk: DataDisk) -> None:
    needed = RESERVE + (disk.size_bytes if disk.preallocate else 0)
    host = os.statvfs(path.parent)
    free = host.f_bavail * host.f_frsize
    if free < needed:
        raise ResourceExhausted(
            f"{path.parent} has {free // MIB} MiB free, the VM's disk needs {needed // MIB} MiB; free some space"
        )
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as e:
        raise disk_error(e, f"cannot make the disk {path}") from e
    try:
        os.ftruncate(fd, disk.size_bytes)
    except OSError as e:
        path.unlink(missing_ok=True)
        raise disk_error(e, f"cannot make the disk {path}") from e
    finally:
        os.close(fd)


def _allocate(path: Path, size: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as e:
        raise disk_error(e, f"cannot make the disk {path}") from e
    finally:
        os.close(fd)


def format_options(disk: DataDisk) -> tuple[str, str]:
    """mke2fs's features and extended options for it."""
    features, options = _FEATURES, "nodiscard,lazy_itable_init=1,root_owner=0:0,num_backup_sb=0"
    if disk.quotas:
        features, options = f"{features},{_QUOTAS[0]}", f"{options},{_QUOTAS[1]}"
    return features, options


async def _format(path: Path, mke2fs: Path, features: str, options: str) -> None:
    process = await asyncio.create_subprocess_exec(
        str(mke2fs), "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-O", features, "-E", options, str(path),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        _, error = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await asyncio.shield(process.wait())
    if process.returncode:
        said = error.decode(errors="replace").strip().splitlines()
        raise HvError(f"mke2fs could not format {path}: {said[-1] if said else f'exit status {process.returncode}'}")
