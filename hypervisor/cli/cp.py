"""``hv cp``: files between a container and this machine, as a tar stream."""

from __future__ import annotations

import io
import os
import stat
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import click

from hypervisor.cli import complete, progress
from hypervisor.cli.app import Settings, pass_settings
from hypervisor.cli.execute import first_container
from hypervisor.cli.output import note
from hypervisor.cli.rest import Connection, target
from hypervisor.cli.state import pod_reference
from hypervisor.cli.untar import Parts, Unpacker
from hypervisor.errors import InvalidInput, NotFound, ProtocolError

if TYPE_CHECKING:
    from hypervisor.cli.rest import Write

CHUNK = 256 * 1024
MAX_LINKS = 10
SHOW_AFTER = 1.0  # seconds until a copy shows how far it is


@dataclass(frozen=True)
class Remote:
    """A path in a container."""

    namespace: str
    pod: str
    container: str
    path: str

    def where(self, path: str | None = None) -> str:
        """Request target of the archive of a path."""
        parts = ("hv", "v1", "pods", self.namespace, self.pod, "archive")
        return target(parts, [("container", self.container), ("path", path or self.path)])


def split_argument(text: str) -> tuple[str | None, str]:
    """Pod (None for a local path) and path of one of cp's arguments."""
    if text.startswith(("/", ".")) or ":" not in text:
        return None, text
    pod, _, path = text.partition(":")
    return pod, path if path.startswith("/") else f"/{path}"


@click.command("cp")
@click.argument("source", shell_complete=complete.pod_names)
@click.argument("destination", shell_complete=complete.pod_names)
@click.option("-c", "--container", metavar="NAME", help="Default: the pod's first.")
@pass_settings
def cp(settings: Settings, source: str, destination: str, container: str | None) -> None:
    """Copy files between a container and this machine.

    One of SOURCE and DESTINATION is POD:PATH, the other a local path (write ./NAME for one with a colon) or - for a
    tar stream. As docker cp:

    \b
    - into an existing folder the source is copied under its own name, else it gets
      the destination's name, whose parent folder must exist
    - a source that ends in /. means what is in the folder, not the folder
    - symbolic links are copied as links; coming out of a container, only those that
      stay inside of what is copied: others are skipped with a warning, as are devices
    - files in a container belong to root; files here to you, without set-id bits

    \b
    hv cp ./site web:/srv             hv cp web:/var/log ./logs
    hv cp web:/srv - | tar t          tar c . | hv cp - web:/srv
    """
    from_pod, from_path = split_argument(source)
    to_pod, to_path = split_argument(destination)
    pod = from_pod or to_pod
    if pod is None or (from_pod and to_pod):
        raise click.UsageError("exactly one of SOURCE and DESTINATION must be POD:PATH")
    namespace, name = pod_reference(pod)
    with settings.connect_any(None) as connection:
        container = container or first_container(connection, namespace, name)
        if from_pod:
            copy_out(connection, Remote(namespace, name, container, from_path), to_path)
        else:
            copy_in(settings, connection, from_path, Remote(namespace, name, container, to_path))


# ---- out of a container ----------------------------------------------------------------------------------------------


class _Stream(io.RawIOBase):
    """A response's body as a file for tarfile, counted."""

    def __init__(self, chunks: Iterator[bytes], count: Callable[[int], None] = lambda _n: None) -> None:
        self._chunks = chunks
        self._count = count
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        if not self._rest:
            data = next(self._chunks, b"")
            self._count(len(data))
            self._rest = memoryview(data)
        size = min(len(view), len(self._rest))
        view[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def copy_out(connection: Connection, remote: Remote, destination: str) -> None:
    """Copies a path of a container to a local one, or to standard output.

    :raises NotFound: it is not there
    :raises InvalidInput: the destination does not fit; what was unpacked by then stays
    """
    contents = remote.path.endswith("/.") or not remote.path.strip("/")
    path = "/" + remote.path.removesuffix("/.").strip("/")
    layout = None if destination == "-" else Layout.of(destination, os.path.basename(path), contents)  # noqa: PTH119
    response = connection.call("GET", remote.where(path))
    if layout is None:
        for data in response.chunks():
            sys.stdout.buffer.write(data)
        return
    layout.prepare()
    with _Meter(path) as count, Unpacker(layout.folder, layout.place, note) as unpacker:
        unpacker.unpack(io.BufferedReader(_Stream(response.chunks(), count), CHUNK))
        if unpacker.skipped and not unpacker.count:
            raise InvalidInput(f"nothing of {path} could be copied")


@dataclass(frozen=True)
class Layout:
    """Where the entries of a copy go.

    :ivar folder: what they are unpacked in
    :ivar top: first component of their names in the archive
    :ivar name: what replaces it; empty: what is in the folder, without the folder
    :ivar must_be: ``"folder"`` or ``"file"`` where the destination only fits one of them; else empty
    :ivar create: whether `folder` is to be made
    """

    folder: str
    top: str
    name: str
    must_be: str = ""
    create: bool = False

    @classmethod
    def of(cls, destination: str, top: str, contents: bool) -> Layout:
        """The layout of a copy of something named `top`.

        :raises InvalidInput: the destination's parent folder does not exist
        """
        is_folder = os.path.isdir(destination)  # noqa: PTH112
        if contents:
            return cls(destination, top, "", must_be="folder", create=not is_folder)
        if is_folder:
            return cls(destination, top, top)
        parent, name = os.path.split(destination.rstrip("/"))
        if not os.path.isdir(parent or "."):  # noqa: PTH112
            raise InvalidInput(f"there is no folder {parent} to copy into; make it first")
        must_be = "folder" if destination.endswith("/") else "file" if os.path.lexists(destination) else ""
        return cls(parent or ".", top, name, must_be)

    def prepare(self) -> None:
        """Makes the folder if it is to be made."""
        if self.create:
            os.mkdir(self.folder)  # noqa: PTH102

    def place(self, parts: Parts, is_folder: bool) -> Parts:
        """An entry's path below the folder; empty for the folder itself.

        :raises InvalidInput: what is copied does not fit the destination
        """
        if self.top and parts[:1] != (self.top,):
            raise ProtocolError(f"hostd sent {'/'.join(parts)!r} as a part of {self.top}")
        below = parts[1:] if self.top else parts
        if not below and self.must_be and (self.must_be == "folder") != is_folder:
            if self.name and not is_folder and self.must_be == "folder":
                raise InvalidInput(f"there is no folder {self.name}/ to copy {self.top} into; make it first")
            kind = "a folder" if is_folder else "no folder"
            raise InvalidInput(f"{self.top} is {kind}, and the destination is there for a {self.must_be}")
        return (self.name, *below) if self.name else below


# ---- into a container ------------------------------------------------------------------------------------------------


def copy_in(settings: Settings, connection: Connection, source: str, remote: Remote) -> None:
    """Copies a local path, or the tar stream on standard input, to a path of a container.

    :raises InvalidInput: the source is not there, or the destination does not fit; nothing was changed
    """
    if source == "-":
        _put(connection, remote, remote.path, _forward(sys.stdin.buffer))
        return
    contents = source.endswith("/.")
    mode = _mode(source)
    kind = remote_kind(settings, remote, remote.path)
    folder, name = _into(source, stat.S_ISDIR(mode), contents, remote.path, kind)
    with _Meter(source) as count:
        _put(connection, remote, folder, lambda write: pack(write, source, name, count))


def _mode(source: str) -> int:
    try:
        return os.stat(source, follow_symlinks=source.endswith("/.")).st_mode  # noqa: PTH116
    except OSError as e:
        raise InvalidInput(f"cannot read {source}: {e.strerror}") from e


def _into(source: str, is_folder: bool, contents: bool, path: str, kind: str) -> tuple[str, str]:
    """Folder of the container to unpack in, and the source's name there; empty for a folder's contents."""
    parent, base = os.path.split(path.rstrip("/") or "/")
    if kind == "folder":
        return path, "" if contents else os.path.basename(os.path.abspath(source))  # noqa: PTH100, PTH119
    if kind == "file" and is_folder:
        raise InvalidInput(f"{path} is a file in the container; a folder cannot be copied over it")
    if not kind and path.endswith("/") and not is_folder:
        raise InvalidInput(f"there is no folder {path} in the container; make it first: hv exec POD -- mkdir -p {path}")
    return parent, base


def remote_kind(settings: Settings, remote: Remote, path: str) -> str:
    """``"folder"``, ``"file"`` or ``""`` for nothing: from the first entry of the path's archive.

    Symbolic links are followed, as a shell in the container would.
    """
    for _ in range(MAX_LINKS):
        path = os.path.normpath(path)
        if path == "/":
            return "folder"
        first = _first_entry(settings, remote, path)
        if first is None:
            return ""
        if not first.issym():
            return "folder" if first.isdir() else "file"
        path = os.path.join(os.path.dirname(path), first.linkname)  # noqa: PTH118, PTH120
    raise InvalidInput(f"{remote.path}: too many symbolic links in the container")


def _first_entry(settings: Settings, remote: Remote, path: str) -> tarfile.TarInfo | None:
    with settings.connect_any() as connection:  # of its own: it is closed before the archive's end
        try:
            response = connection.call("GET", remote.where(path))
        except NotFound:
            return None
        try:
            with tarfile.open(fileobj=io.BufferedReader(_Stream(response.chunks())), mode="r|") as archive:
                return archive.next()
        except tarfile.TarError as e:
            raise ProtocolError(f"hostd sent no tar stream for {path}: {e}") from e


def _put(connection: Connection, remote: Remote, folder: str, body: Callable[[Write], None]) -> None:
    kind = (("Content-Type", "application/x-tar"),)
    connection.call("PUT", remote.where(folder), body, kind).read()


def _forward(stream: IO[bytes]) -> Callable[[Write], None]:
    def forward(write: Write) -> None:
        while data := os.read(stream.fileno(), CHUNK):
            write(data)

    return forward


class _Writer(io.RawIOBase):
    """What tarfile writes, into a request's body."""

    def __init__(self, write: Write, count: Callable[[int], None]) -> None:
        self._write = write
        self._count = count

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        piece = bytes(data)  # type: ignore[call-overload]
        self._write(piece)
        self._count(len(piece))
        return len(piece)


def pack(write: Write, source: str, name: str, count: Callable[[int], None] = lambda _n: None) -> None:
    """Writes the tar of a local path.

    :param name: the source's name in the archive; empty for a folder's contents without the folder
    """
    with tarfile.open(fileobj=_Writer(write, count), mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as archive:
        if name:
            archive.add(source, name, filter=_as_root)
            return
        for entry in sorted(os.listdir(source)):  # noqa: PTH208
            archive.add(os.path.join(source, entry), entry, filter=_as_root)  # noqa: PTH118


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
        note(f"skipped {member.name}: neither file, folder nor link")
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


class _Meter:
    """Shows how much was copied, on a terminal, once it takes longer than a moment."""

    def __init__(self, what: str) -> None:
        self._bars = progress.Bars(what)
        self._show = self._bars.__enter__()
        self._next = time.monotonic() + SHOW_AFTER if sys.stderr.isatty() else float("inf")
        self._done = 0

    def __enter__(self) -> Callable[[int], None]:
        return self._count

    def __exit__(self, *_exc: object) -> None:
        self._bars.__exit__(None, None, None)

    def _count(self, size: int) -> None:
        self._done += size
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 0.1
            self._show({"phase": "copied", "done": self._done})
