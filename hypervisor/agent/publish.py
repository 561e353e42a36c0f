"""Files of config maps, secrets and tokens in a volume, replaced all at once.

Layout, which programs that watch such volumes know from Kubernetes: the files lie in a folder of their own with a new
name, ``..data`` is a link to it, and each top-level name is a link through that one. Replacing one link is atomic:
a reader sees all old or all new files. Killed in between, the next call takes the leftovers away.
"""

from __future__ import annotations

import base64
import binascii
import os
import shutil
from typing import NamedTuple

from .errors import from_os, invalid
from .fields import Fields

DATA = "..data"
_GROUP_READS = 0o440
MAX_FILES = 32768
MAX_BYTES = 3 * 1024 * 1024


class File(NamedTuple):
    """`path` is relative to the volume."""

    path: str
    data: bytes
    mode: int


def parse_files(fields: Fields) -> list[File]:
    """The files of a request.

    :raises AgentError: Invalid
    """
    files = [_file(item) for item in fields.objects("files")]
    if len(files) > MAX_FILES or sum(len(f.data) for f in files) > MAX_BYTES:
        raise invalid(f"volume.write.files: more than {MAX_FILES} files or {MAX_BYTES} bytes")
    return files


def _file(fields: Fields) -> File:
    path = fields.text("path")
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts) or parts[0].startswith(".."):
        raise invalid(f"volume.write.files: {path!r} is not a relative path without '..'")
    try:
        data = base64.b64decode(fields.text("data", limit=MAX_BYTES * 2), validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"volume.write.files: the data of {path!r} is not base64") from None
    mode = fields.integer("mode", 0o644, low=0, high=0o777)
    fields.done()
    return File(path, data, mode)


def publish(root: str, files: list[File], group: int | None = None) -> None:
    """Makes these, and no others, the files of the volume at `root`. Blocks: run it in a thread.

    :param group: may read them, whatever their modes say
    :raises AgentError: the volume is full, or two paths collide; the old files stay
    """
    folder = f"..{os.urandom(8).hex()}"
    try:
        os.chmod(root, 0o755 if group is None else 0o2755)
        try:
            _write(f"{root}/{folder}", files, group)
            os.symlink(folder, f"{root}/{DATA}{folder}")
            os.rename(f"{root}/{DATA}{folder}", f"{root}/{DATA}")
        except OSError:
            shutil.rmtree(f"{root}/{folder}", ignore_errors=True)
            raise
        _link(root, {f.path.split("/")[0] for f in files}, folder)
    except OSError as e:
        raise from_os("volume.write", e) from e


def _write(folder: str, files: list[File], group: int | None) -> None:
    os.mkdir(folder, 0o755)
    for file in files:
        path = f"{folder}/{file.path}"
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as out:
            out.write(file.data)
        if group is not None:
            os.chown(path, -1, group)
        os.chmod(path, file.mode if group is None else file.mode | _GROUP_READS)


def _link(root: str, names: set[str], folder: str) -> None:
    """Top-level links for `names` only; whatever else lies there is from before."""
    for name in names:
        if not os.path.lexists(f"{root}/{name}"):
            os.symlink(f"{DATA}/{name}", f"{root}/{name}")
    for name in os.listdir(root):
        path = f"{root}/{name}"
        if name in names or name in (DATA, folder):
            continue
        if os.path.islink(path):
            os.unlink(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
