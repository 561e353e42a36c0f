"""A snapshot as files, and the check that stands between a damaged one and a guest.

A snapshot is a folder, whole in itself::

    index            which page of RAM has its content where (`hypervisor.vmm.snapshots.index`)
    layer-<id>       pages of RAM (`hypervisor.vmm.snapshots.layer`); one that an earlier snapshot has, too, is a link
    state            QEMU's device state (a migration stream without RAM)
    disk.img         the VM's own disk
    working-set      pages that were in memory, to be prefetched (`hypervisor.vmx.working_set`); may be absent
    template/        links to the template's RAM and manifest
    manifest.json    `Manifest`: what it fits, and digests of the others

``manifest.json`` is written last, so a folder without one is no snapshot. Files that several have in common are hard
links to one: each snapshot can be removed at any time, and nothing else notices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hypervisor.errors import Conflict, HvError, InvalidInput
from hypervisor.vmm import records
from hypervisor.vmm.argv import Disk
from hypervisor.vmm.config import DATA_SERIAL, ROOT_SERIAL, VmConfig
from hypervisor.vmm.directory import VmDirectory, disk_error
from hypervisor.vmm.snapshots import index
from hypervisor.vmm.snapshots.index import Piece
from hypervisor.vmm.snapshots.layer import PAGE, check_layer
from hypervisor.vmm.templates.template import Template, TemplateDamaged, TemplateKey, data_extents, digest_of

FORMAT = 1
#: more are made one (`hypervisor.vmm.snapshots.compact`). A fault server takes 16 sources (csrc/memory/fault.h)
MAX_LAYERS = 8
_FILES = ("index", "state")
_PATHS = ("-kernel", "-initrd")
_FICLONE = 0x40049409


class SnapshotDamaged(HvError):
    """A snapshot's file is missing, short or changed; the message names it. Nothing was started."""

    reason = "SnapshotDamaged"
    code = 409


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """:ivar id: SHA-256 of its table of checksums, in hex"""

    id: str
    pages: int

    @property
    def file(self) -> str:
        return f"layer-{self.id[:32]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Content of ``manifest.json``.

    :ivar key: of the template that it lies over: names QEMU's version, machine, CPU model, memory and guest image
    :ivar disks: as the guest has them; paths are those of the host that it was made on
    :ivar created: seconds since the epoch
    :ivar sum: SHA-256 of all of this with an empty one, in hex
    """

    format: int
    name: str
    created: float
    key: TemplateKey
    template_sha256: str
    ram_bytes: int
    disks: tuple[Disk, ...]
    layers: tuple[Layer, ...]
    index_sha256: str
    state_bytes: int
    state_sha256: str
    disk_bytes: int
    sum: str = ""

    def sealed(self) -> Manifest:
        """Itself with its own checksum."""
        text = records.dumps(dataclasses.replace(self, sum=""))
        return dataclasses.replace(self, sum=hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One whose manifest and index could be read; `load` and `check` say what else has been looked at."""

    path: Path
    manifest: Manifest
    pieces: tuple[Piece, ...]

    @staticmethod
    def state_of(path: Path) -> Path:
        """Device state of the snapshot in `path`."""
        return path / "state"

    @staticmethod
    def disk_of(path: Path) -> Path:
        """The VM's own disk in the snapshot in `path`."""
        return path / "disk.img"

    @staticmethod
    def template_of(path: Path) -> Path:
        """Links to the template of the snapshot in `path`."""
        return path / "template"

    @staticmethod
    def working_set_of(path: Path) -> Path:
        """What is prefetched for the snapshot in `path`."""
        return path / "working-set"

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether there is one that was completed."""
        return (path / "manifest.json").is_file()

    @property
    def layers(self) -> list[Path]:
        """Files of the layers, the first one first."""
        return [self.path / layer.file for layer in self.manifest.layers]

    @classmethod
    def read(cls, path: Path) -> Snapshot:
        """Manifest and index, checked.

        :raises SnapshotDamaged: they cannot be read, or were changed
        """
        try:
            manifest = records.loads(Manifest, (path / "manifest.json").read_bytes(), where="manifest.json")
            data = (path / "index").read_bytes()
            if manifest.format != FORMAT:
                raise InvalidInput(f"has format {manifest.format}; this release reads {FORMAT}", where="manifest.json")
            if manifest.sealed() != manifest:
                raise InvalidInput("was changed: its checksum does not fit", where="manifest.json")
            if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
                raise InvalidInput("was changed: its checksum does not fit", where="index")
            pages = manifest.ram_bytes // PAGE
            pieces = index.decode(data, ram_pages=pages, layers=[layer.pages for layer in manifest.layers])
        except OSError as e:
            raise SnapshotDamaged(f"snapshot {path.name}: {Path(str(e.filename)).name}: {e.strerror}") from e
        except InvalidInput as e:
            raise SnapshotDamaged(f"snapshot {path.name}: {e}") from e
        return cls(path, manifest, tuple(pieces))

    def check(self) -> None:
        """Reads all of its files but the disk, each once for the life of this process as long as it stays the same.

        :raises SnapshotDamaged: one is missing, short or changed
        """
        try:
            for layer, path in zip(self.manifest.layers, self.layers, strict=True):
                check_layer(path, layer.id, layer.pages)
            _check_file(self.state_of(self.path), self.manifest.state_bytes, self.manifest.state_sha256)
            if (there := self.disk_of(self.path).stat().st_size) != self.manifest.disk_bytes:
                raise InvalidInput(f"has {there} bytes instead of {self.manifest.disk_bytes}", where="disk.img")
            template = Template.linked(self.template_of(self.path))
        except OSError as e:
            raise SnapshotDamaged(f"snapshot {self.path.name}: {Path(str(e.filename)).name}: {e.strerror}") from e
        except (InvalidInput, TemplateDamaged) as e:
            raise SnapshotDamaged(f"snapshot {self.path.name}: {e}") from e
        if template.manifest.ram_sha256 != self.manifest.template_sha256:
            raise SnapshotDamaged(f"snapshot {self.path.name}: template/ holds another template")

    def link(self, target: Path) -> None:
        """Makes a folder `target` with links to all but its disk and its template.

        :raises OSError: the disk is full
        """
        target.mkdir(mode=0o700)
        for path in (*(self.path / name for name in _FILES), *self.layers):
            link_or_copy(path, target / path.name)
        with contextlib.suppress(FileNotFoundError):
            link_or_copy(self.working_set_of(self.path), self.working_set_of(target))
        link_or_copy(self.path / "manifest.json", target / "manifest.json")

    def copy(self, target: Path) -> None:
        """Another snapshot of the same, with a disk of its own. Raises `OSError`."""
        target.mkdir(mode=0o700)
        for path in (*(self.path / name for name in _FILES), *self.layers):
            link_or_copy(path, target / path.name)
        with contextlib.suppress(FileNotFoundError):
            link_or_copy(self.working_set_of(self.path), self.working_set_of(target))
        Template.link(self.template_of(self.path), self.template_of(target))
        copy_sparse(self.disk_of(self.path), self.disk_of(target))
        link_or_copy(self.path / "manifest.json", target / "manifest.json")

    def occupies(self) -> int:
        """Bytes on the host's disk that go with it, as far as no other has them too."""
        files = [path for path in self.path.rglob("*") if path.is_file()]
        return sum(status.st_blocks * 512 for status in (path.stat() for path in files) if status.st_nlink == 1)


def _check_file(path: Path, size: int, sha256: str) -> None:
    if (there := path.stat().st_size) != size:
        raise InvalidInput(f"has {there} bytes instead of {size}", where=path.name)
    if digest_of(path) != sha256:
        raise InvalidInput("was changed: its checksum does not fit", where=path.name)


def link_or_copy(path: Path, target: Path) -> None:
    """A link, or on another file system a copy. Raises `OSError`."""
    try:
        os.link(path, target)
    except OSError as e:
        if e.errno != errno.EXDEV:
            raise
        shutil.copyfile(path, target)


def copy_sparse(path: Path, target: Path) -> None:
    """A copy that shares its blocks where the file system can, and has the same holes where it cannot.

    :raises OSError: the disk is full
    """
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        made = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(OSError):
                fcntl.ioctl(made, _FICLONE, source)
                return
            os.ftruncate(made, os.fstat(source).st_size)
            for first, count in data_extents(source):
                _copy_range(source, made, first * PAGE, count * PAGE)
        finally:
            os.close(made)
    finally:
        os.close(source)


def _copy_range(source: int, target: int, at: int, size: int) -> None:
    while size > 0:
        done = os.copy_file_range(source, target, size, at, at)
        if done == 0:
            return  # the file ends amid its last page
        at, size = at + done, size - done


def refuse_misfit(wanted: TemplateKey, snapshot: Snapshot) -> None:
    """Does nothing where a VM of `wanted` is what the snapshot was taken of.

    :raises Conflict: it differs; the message says in what
    """
    differences = _differences(snapshot.manifest.key, wanted)
    if differences:
        raise Conflict(f"snapshot {snapshot.path.name} does not fit this host: {'; '.join(differences)}")


def _differences(taken: TemplateKey, wanted: TemplateKey) -> list[str]:
    found = []
    if taken.qemu_version != wanted.qemu_version:
        found.append(f"it was taken with QEMU {taken.qemu_version}, here is {wanted.qemu_version}")
    if taken.guest != wanted.guest:
        found.append(f"it was taken of guest image {taken.guest[:12]}, here is {wanted.guest[:12]}")
    there, here = _options(taken.argv), _options(wanted.argv)
    for option in sorted({name for name, _ in there ^ here}):
        what = " ".join(value for name, value in sorted(there) if name == option) or "nothing"
        now = " ".join(value for name, value in sorted(here) if name == option) or "nothing"
        found.append(f"QEMU had {option} {what}, here {now}")
    return found


def _options(argv: Sequence[str]) -> set[tuple[str, str]]:
    """Options with their values; where files are is no matter."""
    pairs = zip(argv[1:], [*argv[2:], ""], strict=True)
    options = {(name, "" if value.startswith("-") else value) for name, value in pairs if name.startswith("-")}
    return {(name, value) for name, value in options if name not in _PATHS and "opaque=" not in value}


def full(error: OSError, path: Path) -> HvError:
    """`error` from writing a snapshot."""
    return disk_error(error, f"cannot write the snapshot {path}")


def disks_here(snapshot: Snapshot, config: VmConfig, directory: Path) -> tuple[Disk, ...]:
    """The snapshot's disks with the paths that they have for a VM like `config` in `directory` of this host.

    :raises Conflict: the VM is to have other image disks
    """
    images = [disk.path for disk in config.image_disks]
    found: list[Disk] = []
    for disk in snapshot.manifest.disks:
        path = disk.path
        if disk.serial in (ROOT_SERIAL, DATA_SERIAL):
            path = config.guest.root if disk.serial == ROOT_SERIAL else VmDirectory(directory).disk
        elif path is not None:
            path = next((image for image in images if image.parts[-2:] == path.parts[-2:]), None)
            if path is None:
                raise Conflict(f"snapshot {snapshot.path.name} has image {disk.path}, which the pod has not")
        found.append(dataclasses.replace(disk, path=path))
    return tuple(found)
