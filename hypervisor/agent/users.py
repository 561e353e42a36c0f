"""Who a container's process runs as: a user text resolved against the image's own /etc/passwd and /etc/group.

The image is hostile until shown otherwise: its files are opened as if its root were / (`open_in_root`), must be regular
files, and only so much of them is read.
"""

from __future__ import annotations

import os
import stat

from .errors import invalid
from .spec import NamedUser, User
from .syscalls import open_in_root

MAX_DATABASE = 4 * 1024 * 1024


def read_in_root(root: int, path: str) -> str:
    """The text of a regular file below the directory `root`; empty when it is missing or anything else."""
    try:
        fd = open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        pieces = []
        left = MAX_DATABASE
        while left > 0 and (piece := os.read(fd, min(left, 65536))):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces).decode("utf-8", "surrogateescape")
    finally:
        os.close(fd)


def resolve(wanted: User | NamedUser | str, passwd: str, group: str) -> User:
    """The numbers, groups and home directory of `wanted`: numbers, ``name``, ``uid``, ``name:group``, ``uid:gid``.

    As docker does it: a name must be in the image; a number need not be. Without ``:group`` the user gets its group of
    /etc/passwd and all groups of /etc/group that list it.

    :raises AgentError: Invalid; no such user or group in the image
    """
    if isinstance(wanted, User):
        entry = _find(passwd, 2, str(wanted.uid))
        return wanted._replace(home=entry[5] if entry else None)
    if isinstance(wanted, NamedUser):
        found = resolve(wanted.name, passwd, group)
        return found._replace(groups=tuple(sorted({*found.groups, *wanted.groups}))[:1000])
    user, colon, group_name = wanted.partition(":")
    user = user or "0"
    entry = _find(passwd, 0, user) or (_find(passwd, 2, user) if user.isdecimal() else None)
    if entry is None and not user.isdecimal():
        raise invalid(f"user {user[:80]!r}: the image's /etc/passwd has no such user")
    uid = _number(entry[2] if entry else user, wanted)
    home = entry[5] if entry else None
    if colon and group_name:
        return User(uid, _group_number(group_name, group, wanted), (), home)
    gid = _number(entry[3], wanted) if entry else 0
    return User(uid, gid, _memberships(group, entry[0], gid) if entry else (), home)


def _rows(text: str, columns: int) -> list[list[str]]:
    return [row for line in text.splitlines() if len(row := line.split(":")) >= columns]


def _find(passwd: str, column: int, value: str) -> list[str] | None:
    for row in _rows(passwd, 7):
        if row[column] == value and row[2].isdecimal() and row[3].isdecimal():
            return row
    return None


def _group_number(name: str, group: str, wanted: str) -> int:
    for row in _rows(group, 4):
        if row[0] == name and row[2].isdecimal():
            return _number(row[2], wanted)
    if name.isdecimal():
        return _number(name, wanted)
    raise invalid(f"user {wanted[:80]!r}: the image's /etc/group has no group {name[:80]!r}")


def _memberships(group: str, user: str, gid: int) -> tuple[int, ...]:
    found = {int(row[2]) for row in _rows(group, 4) if row[2].isdecimal() and user in row[3].split(",")}
    return tuple(sorted(g for g in found if g != gid and g < 2**32 - 1))[:1000]


def _number(text: str, wanted: str) -> int:
    value = int(text)
    if value >= 2**32 - 1:
        raise invalid(f"user {wanted[:80]!r}: {text[:40]} is no user or group number")
    return value
