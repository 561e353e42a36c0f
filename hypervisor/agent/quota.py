"""Limits of directories on the data disk: ext4 project quotas.

A directory that is given a project while it is empty hands it on to all that is made in it. The kernel counts each
project's blocks and refuses a write above its limit with EDQUOT, whoever writes, except those who may exceed quotas
(CAP_SYS_RESOURCE: privileged containers, and the agent with its logs). An overlay never may.

The limit that the kernel holds lies `SLACK` above what was asked for: so a container that does not stop where it should
shows (its use is more than its limit, and the host evicts its pod), and yet cannot take much more.

Source: US 11579916 (per-directory quotas of a container's ephemeral layer).
"""

from __future__ import annotations

import fcntl
import os
import struct

from . import syscalls

MOUNT_OPTION = "prjquota"
SLACK = 64 * 1024
_FSGETXATTR = 0x801C581F
_FSSETXATTR = 0x401C5820
_XATTR = struct.Struct("=IIIII8x")  # xflags, extsize, nextents, projid, cowextsize
_PROJINHERIT = 0x200
_Q_GETQUOTA = 0x800007
_Q_SETQUOTA = 0x800008
_PRJQUOTA = 2
_DQBLK = struct.Struct("=8QI4x")  # block limits (KiB, hard and soft), bytes, inode limits, inodes, times, what is valid
_BLOCK_LIMITS = 1


class Quotas:
    """Projects of the file system that `directory` lies on. `on` is set once it was mounted with them."""

    def __init__(self, directory: str) -> None:
        self.on = False
        self._directory = directory
        self._last = 0

    def assign(self, directory: str, limit: int | None) -> int:
        """Makes an empty directory a project of its own; its number, 0 where there are no quotas.

        :param limit: bytes; None counts, and limits nothing
        :raises OSError: the kernel refuses
        """
        if not self.on:
            return 0
        self._last += 1
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            attributes = bytearray(_XATTR.size)
            fcntl.ioctl(fd, _FSGETXATTR, attributes)
            flags, extent, extents, _, cow = _XATTR.unpack(attributes)
            fcntl.ioctl(fd, _FSSETXATTR, _XATTR.pack(flags | _PROJINHERIT, extent, extents, self._last, cow))
        finally:
            os.close(fd)
        if limit is not None:
            kib = -(-(limit + SLACK) // 1024)
            self._quotactl(_Q_SETQUOTA, self._last, bytearray(_DQBLK.pack(kib, 0, 0, 0, 0, 0, 0, 0, _BLOCK_LIMITS)))
        return self._last

    def used(self, project: int) -> int:
        """Bytes that a project takes on the disk."""
        found = bytearray(_DQBLK.size)
        self._quotactl(_Q_GETQUOTA, project, found)
        return int(_DQBLK.unpack(found)[2])

    def _quotactl(self, command: int, project: int, block: bytearray) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syscalls.quotactl(fd, command, _PRJQUOTA, project, block)
        finally:
            os.close(fd)
