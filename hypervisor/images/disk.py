"""Writes a tree of files as a read-only EROFS disk: data while the layers stream by, everything else at the end.

Theory of operation
-------------------
Nothing is unpacked on the host, so no privilege is needed for owners, devices and attributes, no name from an archive
meets a host file system, and the same layers give the same bytes. The image file is laid out in the order in which it
becomes known::

    block 0        superblock, written last
    block 1...     files' whole blocks, in the order of the layers
    ...            directories' whole blocks
    meta_block...  inodes with their attributes and, behind them, symlinks' targets and the partial last blocks
                   ("tails") of files and directories

Data of a file that a later layer hides has been written by then; its blocks become a hole (``fallocate``), so that
it costs nothing. Tails wait in an unlinked scratch file until their inodes are placed.

Placement: an inode, its attributes and its tail must lie in one block; directories and their children are placed
together, each in the fullest of a few open blocks where it fits.

States of a :class:`DiskWriter`: storing (:meth:`DiskWriter.store`, any number) -> :meth:`DiskWriter.finish` -> done.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, cast

from hypervisor.errors import HvError, ResourceExhausted, Unavailable
from hypervisor.images import erofs
from hypervisor.images.erofs import BLOCK, INODE, SLOT
from hypervisor.images.tree import Content, Node, Tree

_BUFFER = 1 << 20
_ZEROS = bytes(_BUFFER)
_SPARSE_FROM = 1 << 16
"""Zeros in pieces of at least so many bytes become a hole."""
_OPEN_BLOCKS = 16
_FIRST_SLOT = 4
"""Inode numbers begin here: 0 would be taken for "no inode" by programs that read directories."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def space_error(error: OSError, path: Path) -> HvError:
    """The error for an image file that cannot be written."""
    if error.errno in _NO_SPACE:
        return ResourceExhausted(
            f"no room for the image in {path.parent} ({os.strerror(error.errno)}): free some space, "
            f"or remove images that no pod uses (hv image prune)"
        )
    return Unavailable(f"cannot write the image {path}: {error.strerror or error}")


class DiskWriter:
    """Writes one disk to a new file; a context manager that closes what it opened. On failure the caller removes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()
        self._next_block = 1

    def __enter__(self) -> Self:
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
            self._file = self._stack.enter_context(os.fdopen(descriptor, "wb", buffering=_BUFFER))
            scratch = self._stack.enter_context(tempfile.TemporaryFile(dir=self._path.parent, buffering=_BUFFER))
            self._tails = cast(BinaryIO, scratch)
            self._file.seek(BLOCK)
        except OSError as error:
            self._stack.close()
            raise space_error(error, self._path) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.close()
        except OSError as failure:  # what was buffered could not be written
            if error is None:
                raise space_error(failure, self._path) from failure

    def store(
        self, size: int, pieces: Iterator[bytes], *, xattr_bytes: int, regions: list[tuple[int, int]] | None
    ) -> Content:
        """Write one file's data.

        :param size: in bytes, holes included
        :param pieces: the stored data
        :param xattr_bytes: what the attributes take beside the inode
        :param regions: where the stored data belong, for a sparse file
        :raises ResourceExhausted: no room
        """
        try:
            if regions is not None:
                return self._store_sparse(size, pieces, regions)
            return self._store_plain(size, pieces, xattr_bytes)
        except OSError as error:
            raise space_error(error, self._path) from error

    def finish(self, tree: Tree, image_id: str) -> None:
        """Write what the tree says, and make it durable.

        :param image_id: hex; gives the file system its UUID and label
        :raises ResourceExhausted: no room
        """
        try:
            _Finisher(self._file, self._tails, self._next_block).write(tree, image_id)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise space_error(error, self._path) from error

    def _store_plain(self, size: int, pieces: Iterator[bytes], xattr_bytes: int) -> Content:
        tail_size = size % BLOCK
        inline = 0 < tail_size <= BLOCK - INODE - xattr_bytes
        whole = size - tail_size if inline else size
        block = self._reserve(whole)
        tail_at = self._tails.tell() if inline else -1
        left = whole
        for piece in pieces:
            if len(piece) <= left:
                self._write(piece)
            else:
                self._file.write(piece[:left])
                self._tails.write(piece[left:])
            left = max(0, left - len(piece))
        if whole % BLOCK:
            self._file.seek(self._next_block * BLOCK)
        return Content(size, block, tail_at)

    def _store_sparse(self, size: int, pieces: Iterator[bytes], regions: list[tuple[int, int]]) -> Content:
        block = self._reserve(size)
        source = _Pieces(pieces)
        for offset, length in regions:
            self._file.seek(block * BLOCK + offset)
            for piece in source.take(length):
                self._write(piece)
        self._file.seek(self._next_block * BLOCK)
        return Content(size, block, -1)

    def _reserve(self, size: int) -> int:
        block = self._next_block
        self._next_block += -(-size // BLOCK)
        if self._next_block >= erofs.NO_BLOCK:
            raise ResourceExhausted("the image is larger than EROFS can hold (16 TiB)")
        return block

    def _write(self, piece: bytes) -> None:
        if len(piece) >= _SPARSE_FROM and piece == _ZEROS[: len(piece)]:
            self._file.seek(len(piece), os.SEEK_CUR)
        else:
            self._file.write(piece)


class _Pieces:
    """Cuts a stream of pieces at given lengths."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def take(self, length: int) -> Iterator[bytes]:
        while length:
            piece = self._rest or next(self._pieces)
            part, self._rest = piece[:length], piece[length:]
            length -= len(part)
            yield part


class Placement:
    """Gives inodes their places: best fit among a few blocks that still have room."""

    def __init__(self) -> None:
        self._open: list[tuple[int, int]] = [(BLOCK - _FIRST_SLOT * SLOT, 0)]  # (room, block)
        self.blocks = 1

    def place(self, size: int) -> int:
        """Byte offset in the metadata area for ``size`` bytes, in one block if they fit into one."""
        size += -size % SLOT
        fitting = [entry for entry in self._open if entry[0] >= size]
        if not fitting:
            return self._new(size)
        room, block = best = min(fitting)
        self._open.remove(best)
        self._keep(room - size, block)
        return block * BLOCK + BLOCK - room

    def _new(self, size: int) -> int:
        first = self.blocks
        self.blocks += -(-size // BLOCK)
        self._keep(-size % BLOCK, self.blocks - 1)
        return first * BLOCK

    def _keep(self, room: int, block: int) -> None:
        if room >= INODE:
            self._open.append((room, block))
        if len(self._open) > _OPEN_BLOCKS:
            self._open.remove(min(self._open))


@dataclass(slots=True, eq=False)
class _Placed:
    """A node with its place. ``inline`` is the size of what lies behind the inode."""

    node: Node
    parent: Node
    number: int
    size: int
    inline: int
    offset: int
    names: list[bytes] = field(default_factory=list)
    layout: list[tuple[int, int]] = field(default_factory=list)


class _Finisher:
    """Everything after the last layer: number, place and write the inodes, directories and the superblock."""

    def __init__(self, file: BinaryIO, tails: BinaryIO, next_block: int) -> None:
        self._file = file
        self._tails = tails
        self._next_block = next_block
        self._data_end = next_block
        self._placement = Placement()
        self._placed: list[_Placed] = []
        self._place_of: dict[int, _Placed] = {}
        self._first_block: dict[int, int] = {}

    def write(self, tree: Tree, image_id: str) -> None:
        """All of it, in order."""
        self._tails.flush()
        for directory, parent in tree.walk():
            self._visit(directory, parent)
        for placed in self._placed:
            if placed.node.is_directory or placed.node.target:
                self._write_blocks(placed)
        meta_block = self._next_block
        end = meta_block + self._placement.blocks
        self._write_meta(meta_block, end)
        root = self._place_of[id(tree.root)]
        self._write_superblock(root.offset // SLOT, meta_block, end, image_id)
        self._file.flush()
        self._punch_hidden()

    def _visit(self, directory: Node, parent: Node) -> None:
        """Place a directory's children, and itself if it is the root."""
        assert directory.children is not None
        self._place(directory, parent)
        for _, child in sorted(directory.children.items()):
            child.nlink += 1
            self._place(child, directory)

    def _place(self, node: Node, parent: Node) -> None:
        if id(node) in self._place_of:
            return
        placed = _Placed(node, parent, len(self._placed) + 1, 0, 0, 0)
        self._measure(placed)
        placed.offset = self._placement.place(INODE + len(node.xattrs) + placed.inline)
        self._placed.append(placed)
        self._place_of[id(node)] = placed

    def _measure(self, placed: _Placed) -> None:
        node = placed.node
        room = BLOCK - INODE - len(node.xattrs)
        if node.children is not None:
            placed.names = sorted([b".", b"..", *node.children])
            placed.layout = erofs.directory_layout(placed.names)
            placed.size = erofs.directory_size(placed.layout)
        elif node.content is not None:
            placed.size = node.content.size
            placed.inline = placed.size % BLOCK if node.content.tail_at >= 0 else 0
            return
        else:
            placed.size = len(node.target)
        tail = placed.size % BLOCK
        placed.inline = tail if tail <= room else 0

    def _write_blocks(self, placed: _Placed) -> None:
        """What does not lie behind its inode: whole blocks of a directory, a very long symlink's target."""
        pieces = list(self._directory_data(placed)) if placed.node.is_directory else [placed.node.target]
        if placed.inline:
            pieces.pop()
        if not pieces:
            return
        self._first_block[placed.number] = self._next_block
        self._file.seek(self._next_block * BLOCK)
        for piece in pieces:
            self._file.write(piece.ljust(BLOCK, b"\0"))
        self._next_block += len(pieces)

    def _directory_data(self, placed: _Placed) -> Iterator[bytes]:
        children = placed.node.children
        assert children is not None
        special = {b".": placed.node, b"..": placed.parent}
        entries = []
        for name in placed.names:
            child = special.get(name) or children[name]
            entries.append((name, self._place_of[id(child)].offset // SLOT, child.mode))
        return erofs.directory_blocks(entries, placed.layout)

    def _write_meta(self, meta_block: int, end: int) -> None:
        """Inodes in the order of their places, zeros between them: one sequential pass."""
        start = at = meta_block * BLOCK
        self._file.seek(start)
        for placed in sorted(self._placed, key=lambda placed: placed.offset):
            data = self._inode(placed).encode() + self._inline_data(placed)
            self._file.write(bytes(start + placed.offset - at) + data)
            at = start + placed.offset + len(data)
        self._file.write(bytes(end * BLOCK - at))

    def _inode(self, placed: _Placed) -> erofs.Inode:
        node = placed.node
        return erofs.Inode(
            mode=node.mode,
            uid=node.uid,
            gid=node.gid,
            mtime=node.mtime,
            nlink=self._links(node),
            size=placed.size,
            where=self._where(placed),
            xattrs=node.xattrs,
            inline=placed.inline > 0,
            number=placed.number,
        )

    @staticmethod
    def _links(node: Node) -> int:
        if node.children is None:
            return node.nlink
        return 2 + sum(1 for child in node.children.values() if child.is_directory)

    def _where(self, placed: _Placed) -> int:
        node = placed.node
        if stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
            return node.device
        if node.content is not None and placed.size > placed.inline:
            return node.content.block
        return self._first_block.get(placed.number, erofs.NO_BLOCK)

    def _inline_data(self, placed: _Placed) -> bytes:
        if not placed.inline:
            return b""
        node = placed.node
        if node.children is not None:
            *_, last = self._directory_data(placed)
            return last
        if node.content is not None:
            return os.pread(self._tails.fileno(), placed.inline, node.content.tail_at)
        return node.target

    def _write_superblock(self, root: int, meta_block: int, end: int, image_id: str) -> None:
        block = erofs.superblock(
            root=root,
            inodes=len(self._placed),
            blocks=end,
            meta_block=meta_block,
            uuid=hashlib.sha256(image_id.encode()).digest()[:16],
            label=image_id[:12].encode(),  # 16 bytes with a NUL, or kernels refuse the file system
        )
        self._file.seek(0)
        self._file.write(block)

    def _punch_hidden(self) -> None:
        """Make holes where the data of hidden files lies."""
        used = sorted(
            (content.block, -(-(content.size - placed.inline) // BLOCK))
            for placed in self._placed
            if (content := placed.node.content) is not None
        )
        at = 1
        for block, count in [*used, (self._data_end, 0)]:
            if block > at:
                _punch(self._file.fileno(), at * BLOCK, (block - at) * BLOCK)
            at = max(at, block + count)


def _punch(descriptor: int, offset: int, length: int) -> None:
    """Free the space of a range; where the file system cannot, it stays taken, and nothing else changes."""
    libc = ctypes.CDLL(None, use_errno=True)
    keep_size_and_punch = 1 | 2
    call = libc.fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
    if call(descriptor, keep_size_and_punch, offset, length) != 0 and ctypes.get_errno() != errno.EOPNOTSUPP:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
