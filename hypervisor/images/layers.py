"""Applies layers (tar streams) to a :class:`~hypervisor.images.tree.Tree`, bottom layer first.

The rules are those of the OCI image specification and, where it is silent, docker's: a later entry replaces an earlier
one, directories merge, ``.wh.NAME`` hides NAME of lower layers, ``.wh..wh..opq`` all that lower layers put into its
directory, hard links name another entry of the image. Devices are kept: they are only reached inside a VM.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import Protocol

from hypervisor.errors import InvalidInput
from hypervisor.images import erofs
from hypervisor.images.blobs import Budget, ByteStream
from hypervisor.images.tarstream import Entry, Kind, TarReader, show
from hypervisor.images.tree import Content, Node, Tree, split_path

_TYPES = {
    Kind.FILE: stat.S_IFREG,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.CHAR: stat.S_IFCHR,
    Kind.BLOCK: stat.S_IFBLK,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.FIFO: stat.S_IFIFO,
}
_ID_LIMIT = (1 << 32) - 2
"""The largest uid and gid; the next number means "none" in system calls."""


class Sink(Protocol):
    """Takes files' data."""

    def store(
        self, size: int, pieces: Iterator[bytes], *, xattr_bytes: int, regions: list[tuple[int, int]] | None
    ) -> Content:
        """Store one file and say where it lies."""


def apply_layer(stream: ByteStream, tree: Tree, sink: Sink, budget: Budget) -> None:
    """Apply one layer to the tree; its files' data go to ``sink``.

    On failure tree and sink are of no more use.

    :raises InvalidInput: the layer is damaged or hostile
    :raises ResourceExhausted: it is beyond the limits
    """
    tree.begin_layer()
    reader = TarReader(stream, header_limit=budget.limits.header_bytes)
    for entry in reader.entries():
        budget.entry()
        parts = split_path(entry.name)
        if tree.whiteout(parts):
            continue
        if entry.kind is Kind.LINK:
            tree.put(parts, _link_target(entry, tree))
        else:
            tree.put(parts, _node(entry, reader, sink, budget))


def _link_target(entry: Entry, tree: Tree) -> Node:
    target = tree.find(split_path(entry.target))
    if target is None:
        raise InvalidInput(f"{entry.shown}: a hard link to {show(entry.target)}, which is not in the image")
    if target.is_directory:
        raise InvalidInput(f"{entry.shown}: a hard link to the directory {show(entry.target)}")
    return target


def _node(entry: Entry, reader: TarReader, sink: Sink, budget: Budget) -> Node:
    if not (0 <= entry.uid <= _ID_LIMIT and 0 <= entry.gid <= _ID_LIMIT):
        raise InvalidInput(f"{entry.shown}: no such owner: {entry.uid}:{entry.gid}")
    node = Node(
        mode=_TYPES[entry.kind] | entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        mtime=entry.mtime,
        xattrs=erofs.encode_xattrs(entry.xattrs) if entry.xattrs else b"",
    )
    if entry.kind is Kind.DIRECTORY:
        node.children = {}
    elif entry.kind is Kind.SYMLINK:
        node.mode |= 0o777
        node.target = _checked_target(entry)
    elif entry.kind in (Kind.CHAR, Kind.BLOCK):
        node.device = erofs.device_number(*entry.device)
    elif entry.kind is Kind.FILE:
        budget.file(entry.size)
        node.content = sink.store(entry.size, reader.data(), xattr_bytes=len(node.xattrs), regions=entry.regions)
    return node


def _checked_target(entry: Entry) -> bytes:
    if not 0 < len(entry.target) <= erofs.SYMLINK_LIMIT:
        raise InvalidInput(f"{entry.shown}: a symlink's target has {len(entry.target)} bytes; 1 to 4095 are possible")
    return entry.target
