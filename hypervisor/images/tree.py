"""The files of an image as a tree in memory, to which layers are applied one after the other.

No host path is ever built from a name in an archive: names are keys of dictionaries here, so that a hostile one can
reach nothing. What an extracting program would have to defend itself against is refused all the same, because such an
archive was not made by an honest builder: ``..``, and names that lead through a symlink.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from hypervisor.errors import InvalidInput
from hypervisor.images.erofs import NAME_LIMIT
from hypervisor.images.tarstream import show

PATH_LIMIT = 65536
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_RESERVED = b".wh..wh."


class Content(NamedTuple):
    """Where a file's data lies: whole blocks from ``block`` on; the rest, if ``tail_at >= 0``, in the tail store."""

    size: int
    block: int
    tail_at: int


@dataclass(slots=True, eq=False)
class Node:
    """One inode. Several names may lead to one that is no directory."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime: tuple[int, int] = (0, 0)
    xattrs: bytes = b""
    target: bytes = b""
    device: int = 0
    content: Content | None = None
    children: dict[bytes, Node] | None = None
    serial: int = 0
    nlink: int = 0

    @property
    def is_directory(self) -> bool:
        """True for a directory: then ``children`` is a dict."""
        return self.children is not None


def new_directory(mode: int = 0o755) -> Node:
    """A directory that no archive described: owned by root, of mode 0755."""
    return Node(mode=stat.S_IFDIR | mode, children={})


def split_path(name: bytes) -> list[bytes]:
    """The parts of a name in an archive. A leading slash means the image's root, as for docker.

    :raises InvalidInput: ``..`` in it, or it is too long
    """
    if len(name) > PATH_LIMIT:
        raise InvalidInput(f"{show(name)}: the path is longer than {PATH_LIMIT} bytes")
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    for part in parts:
        if part == b"..":
            raise InvalidInput(f"{show(name)}: the path leads out of the image (..)")
        if len(part) > NAME_LIMIT:
            raise InvalidInput(f"{show(name)}: a name longer than {NAME_LIMIT} bytes")
    return parts


@dataclass
class Tree:
    """The merged tree. ``on_new`` is called for every directory that is made without an entry of its own."""

    on_new: Callable[[], None]
    root: Node = field(default_factory=new_directory)
    _serial: int = 0
    _touched: set[tuple[int, bytes]] = field(default_factory=set)
    """Names (parent's serial, name) that the present layer has set: its whiteouts spare them."""

    def begin_layer(self) -> None:
        """What comes from now on belongs to a new layer."""
        self._touched.clear()

    def put(self, parts: list[bytes], node: Node) -> None:
        """Set a name, as a tar entry does: it replaces what is there, except that directories merge.

        :raises InvalidInput: its parent is no directory, or it would replace the root by something else
        """
        if not parts:
            self._put_root(node)
            return
        parent = self._parent(parts, create=True)
        assert parent is not None
        assert parent.children is not None
        present = parent.children.get(parts[-1])
        if present is not None and present.is_directory and node.is_directory:
            _copy_metadata(present, node)
        else:
            self._set(parent, parts[-1], node)
        self._touched.add((parent.serial, parts[-1]))

    def find(self, parts: list[bytes]) -> Node | None:
        """What a path means, symlinks not followed.

        :raises InvalidInput: it leads through a symlink
        """
        if not parts:
            return self.root
        parent = self._parent(parts, create=False)
        return parent.children.get(parts[-1]) if parent is not None and parent.children is not None else None

    def whiteout(self, parts: list[bytes]) -> bool:
        """Apply a ``.wh.`` marker.

        :returns: whether ``parts`` was one
        :raises InvalidInput: a malformed one
        """
        if not parts or not parts[-1].startswith(_WHITEOUT):
            return False
        name = parts[-1]
        parent = self._parent(parts, create=False)
        hidden = name[len(_WHITEOUT) :]
        if name != _OPAQUE and name.startswith(_RESERVED):
            return True  # bookkeeping of aufs
        if hidden in (b"", b".", b".."):
            raise InvalidInput(f"{show(b'/'.join(parts))}: a whiteout of nothing")
        if parent is None:
            return True
        if name == _OPAQUE:
            self._clear_lower(parent)
        else:
            self._remove_lower(parent, hidden)
        return True

    def walk(self) -> Iterator[tuple[Node, Node]]:
        """Every directory and its parent, parents first, children in order of their names."""
        stack = [(self.root, self.root)]
        while stack:
            directory, parent = stack.pop()
            yield directory, parent
            assert directory.children is not None
            below = [child for _, child in sorted(directory.children.items()) if child.is_directory]
            stack.extend((child, directory) for child in reversed(below))

    def _put_root(self, node: Node) -> None:
        if not node.is_directory:
            raise InvalidInput("the archive replaces the root directory by something else")
        _copy_metadata(self.root, node)

    def _set(self, parent: Node, name: bytes, node: Node) -> None:
        assert parent.children is not None
        if node.is_directory:
            self._serial += 1
            node.serial = self._serial
        parent.children[name] = node

    def _parent(self, parts: list[bytes], *, create: bool) -> Node | None:
        """The directory that holds the last part; missing ones are made, or the answer is None."""
        at = self.root
        for depth, part in enumerate(parts[:-1]):
            assert at.children is not None
            below = at.children.get(part)
            if below is None:
                if not create:
                    return None
                below = self._implicit(at, part)
            elif not below.is_directory:
                kind = "the symlink" if stat.S_ISLNK(below.mode) else "what is no directory:"
                raise InvalidInput(
                    f"{show(b'/'.join(parts))}: the path leads through {kind} {show(b'/'.join(parts[: depth + 1]))}"
                )
            at = below
        return at

    def _implicit(self, parent: Node, name: bytes) -> Node:
        self.on_new()
        made = new_directory()
        self._set(parent, name, made)
        self._touched.add((parent.serial, name))
        return made

    def _remove_lower(self, parent: Node, name: bytes) -> None:
        """Remove a name as far as lower layers made it."""
        assert parent.children is not None
        child = parent.children.get(name)
        if child is None:
            return
        if child.is_directory:
            self._clear_lower(child)
        if not child.children and (parent.serial, name) not in self._touched:
            del parent.children[name]

    def _clear_lower(self, directory: Node) -> None:
        """Remove all that lower layers put into a directory, at any depth."""
        order = [directory]
        for at in order:  # grows while it is walked: parents first
            assert at.children is not None
            order.extend(child for child in at.children.values() if child.is_directory)
        for at in reversed(order):
            assert at.children is not None
            gone = [
                name
                for name, child in at.children.items()
                if not child.children and (at.serial, name) not in self._touched
            ]
            for name in gone:
                del at.children[name]


def _copy_metadata(to: Node, source: Node) -> None:
    to.mode, to.uid, to.gid = source.mode, source.uid, source.gid
    to.mtime, to.xattrs = source.mtime, source.xattrs
