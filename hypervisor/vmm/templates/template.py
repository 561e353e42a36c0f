"""A template as files, and the check that stands between a damaged one and a guest.

A template is a folder::

    ram            guest RAM of the booted guest, sparse: what is a hole is zero
    state          QEMU's device state (a migration stream without RAM)
    template.json  `Manifest`: what it was made for, and digests of the others
    working-set    pages that a first clone touched (`hypervisor.vmx.working_set`; made later, absent at first)

``template.json`` is written last, so a folder without one is no template. Digests are checked once for each (inode,
size, mtime): a start is not slowed by hashing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from hypervisor.errors import HvError, InvalidInput
from hypervisor.vmm import records
from hypervisor.vmm.directory import write_atomically
from hypervisor.vmx import working_set

log = structlog.get_logger(__name__)

FORMAT = 3
PAGE = 4096

_verified: dict[tuple[int, int, int, int], str] = {}


class TemplateDamaged(HvError):
    """A template's file is missing, short or changed; the message names it. The template is to be built anew."""

    reason = "TemplateDamaged"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateKey:
    """All that a template depends on; one that differs in anything does not fit.

    :ivar argv: QEMU's command line for making it, which names machine, CPU model, accelerator, memory and devices
    :ivar guest: digest of the guest image's manifest
    """

    qemu_version: str
    argv: tuple[str, ...]
    guest: str

    @property
    def digest(self) -> str:
        """Names the template's folder."""
        text = json.dumps([FORMAT, self.qemu_version, self.argv, self.guest])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Content of ``template.json``.

    :ivar extents: pages of RAM that have data, as (first page, number of pages), ascending
    """

    format: int
    key: TemplateKey
    ram_bytes: int
    ram_sha256: str
    state_bytes: int
    state_sha256: str
    extents: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Template:
    """A checked template."""

    path: Path
    manifest: Manifest

    @staticmethod
    def ram_of(path: Path) -> Path:
        """Guest RAM of the template in `path`."""
        return path / "ram"

    @staticmethod
    def state_of(path: Path) -> Path:
        """Device state of the template in `path`."""
        return path / "state"

    @staticmethod
    def working_set_of(path: Path) -> Path:
        """Where the working set of the template in `path` is, if one was recorded."""
        return path / "working-set"

    @staticmethod
    def link(path: Path, target: Path) -> None:
        """Makes a folder `target` with links to RAM and manifest of the template in `path`, or copies on another file
        system. They stay what they are when the template is removed or built anew.

        :raises OSError: the template is gone, or the disk is full
        """
        target.mkdir(mode=0o700)
        for name in ("ram", "template.json"):
            try:
                os.link(path / name, target / name)
            except OSError as e:
                if e.errno != errno.EXDEV:
                    raise
                shutil.copyfile(path / name, target / name)

    @property
    def ram(self) -> Path:
        return self.ram_of(self.path)

    @property
    def state(self) -> Path:
        return self.state_of(self.path)

    @classmethod
    def load(cls, path: Path, key: TemplateKey) -> Template | None:
        """The template in `path`; None when there is none. Blocks, the first time, while it hashes its files.

        :raises TemplateDamaged: a part is missing, short, changed, or belongs to another key
        """
        try:
            text = (path / "template.json").read_bytes()
        except FileNotFoundError:
            return None
        except OSError as e:
            raise TemplateDamaged(f"template {path.name}: template.json cannot be read: {e.strerror}") from e
        try:
            manifest = records.loads(Manifest, text, where="template.json")
        except InvalidInput as e:
            raise TemplateDamaged(f"template {path.name}: template.json cannot be read: {e}") from e
        if manifest.format != FORMAT or manifest.key != key:
            raise TemplateDamaged(f"template {path.name}: template.json is of another template or version")
        template = cls(path, manifest)
        template.check_ram()
        template._check("state", template.state, manifest.state_bytes, manifest.state_sha256)
        return template

    def check_ram(self) -> None:
        """:raises TemplateDamaged: RAM is missing, short or changed"""
        self._check("ram", self.ram, self.manifest.ram_bytes, self.manifest.ram_sha256)

    @classmethod
    def linked(cls, path: Path) -> Template:
        """What `link` made in `path`, checked.

        :raises TemplateDamaged: it cannot be read, or was changed
        """
        try:
            manifest = records.loads(Manifest, (path / "template.json").read_bytes(), where="template.json")
        except (OSError, InvalidInput) as e:
            raise TemplateDamaged(f"template {path}: template.json cannot be read: {e}") from e
        template = cls(path, manifest)
        template.check_ram()
        return template

    def _check(self, part: str, file: Path, size: int, sha256: str) -> None:
        try:
            status = file.stat()
        except OSError as e:
            raise TemplateDamaged(f"template {self.path.name}: {part} cannot be read: {e.strerror}") from e
        if status.st_size != size:
            raise TemplateDamaged(f"template {self.path.name}: {part} has {status.st_size} bytes instead of {size}")
        seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if _verified.get(seen) == sha256:
            return
        try:
            digest = digest_of(file, self.manifest.extents if part == "ram" else None)
        except OSError as e:
            raise TemplateDamaged(f"template {self.path.name}: {part} cannot be read: {e.strerror}") from e
        if digest != sha256:
            raise TemplateDamaged(f"template {self.path.name}: {part} was changed: its checksum does not fit")
        _verified[seen] = sha256

    def working_set(self) -> array[int]:
        """Page numbers to prefetch, in order; empty while none was recorded. One that is damaged is removed: the next
        clone records it anew.
        """
        path = self.working_set_of(self.path)
        try:
            with path.open("rb") as file:
                data = file.read(working_set.MAX_BYTES + 1)
            return working_set.decode(data, template=self.manifest.ram_sha256, ram_pages=self._pages)
        except FileNotFoundError:
            pass
        except (OSError, InvalidInput) as e:
            log.warning("working set dropped; it is recorded anew", template=self.path.name, reason=str(e))
            with contextlib.suppress(OSError):
                path.unlink()
        return array("I")

    def keep_working_set(self, pages: Iterable[int]) -> None:
        """Records what a clone touched; whoever is first wins, for later clones had it prefetched.

        :raises OSError: it cannot be written; there is none then, or another's
        """
        path = self.working_set_of(self.path)
        temporary = path.with_suffix(f".{os.getpid()}.new")
        data = working_set.encode(pages, template=self.manifest.ram_sha256, ram_pages=self._pages)
        try:
            temporary.write_bytes(data)
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)

    def extend_working_set(self, pages: Iterable[int], most: int) -> int:
        """Adds what a clone touched beyond the working set, `most` pages at most; how many it now has.

        :raises OSError: it cannot be written; it is as it was
        """
        path = self.working_set_of(self.path)
        known = dict.fromkeys(self.working_set())
        fresh = itertools.islice((p for p in dict.fromkeys(pages) if p not in known), most)
        data = working_set.encode([*known, *fresh], template=self.manifest.ram_sha256, ram_pages=self._pages)
        temporary = path.with_suffix(f".{os.getpid()}.new")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return len(self.working_set())

    @property
    def _pages(self) -> int:
        return self.manifest.ram_bytes // PAGE


def key_of(path: Path) -> TemplateKey | None:
    """What the template in `path` was made for; None when that cannot be told. Its files are not checked."""
    try:
        return records.loads(Manifest, (path / "template.json").read_bytes(), where="template.json").key
    except (OSError, InvalidInput):
        return None


def digest_of(file: Path, extents: tuple[tuple[int, int], ...] | None = None) -> str:
    """SHA-256 of a file; of a sparse one only its extents, with their places, so that holes cost nothing.

    `extents`, by which a clone's RAM is laid out, are part of it: no change of them in the manifest goes unseen. What
    the file system says is data beyond them must be zeroes: on tmpfs a hole that was only read through a mapping
    becomes data.
    """
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        if extents is None:
            while block := stream.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
        digest.update(repr(extents).encode())
        for first, pages in extents:
            for block in _blocks(stream, first, pages):
                digest.update(block)
        for first, pages in outside(data_extents(stream.fileno()), extents):
            if any(block.strip(b"\0") for block in _blocks(stream, first, pages)):
                digest.update(b"data where a hole was")
    return digest.hexdigest()


def _blocks(stream: io.FileIO, first: int, pages: int) -> Iterator[bytes]:
    stream.seek(first * PAGE)
    left = pages * PAGE
    while left and (block := stream.read(min(left, 1 << 20))):
        yield block
        left -= len(block)


def outside(extents: tuple[tuple[int, int], ...], known: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """The pages of `extents` that are in none of `known`; both ascending and without overlap."""
    found: list[tuple[int, int]] = []
    rest = iter([*known, (1 << 62, 1)])
    start, count = next(rest)
    for first, pages in extents:
        end = first + pages
        while first < end:
            while start + count <= first:
                start, count = next(rest)
            if start > first:
                found.append((first, min(end, start) - first))
            first = min(end, start + count)
    return found


def data_extents(fd: int) -> tuple[tuple[int, int], ...]:
    """Which pages of a sparse file have data, as (first page, number of pages), ascending."""
    extents: list[tuple[int, int]] = []
    end, at = os.fstat(fd).st_size, 0
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise
            break  # nothing but a hole up to the end
        at = os.lseek(fd, start, os.SEEK_HOLE)
        first, last = start // PAGE, (at + PAGE - 1) // PAGE
        extents.append((first, last - first))
    return tuple(extents)


def write_template(path: Path, key: TemplateKey) -> Template:
    """Completes a folder that holds ``ram`` and ``state``: syncs them, writes the manifest. Blocks."""
    ram, state = path / "ram", path / "state"
    for file in (ram, state):
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
            extents = data_extents(fd) if file is ram else ()
        finally:
            os.close(fd)
        if file is ram:
            ram_extents = extents
    manifest = Manifest(
        format=FORMAT, key=key, ram_bytes=ram.stat().st_size, ram_sha256=digest_of(ram, ram_extents),
        state_bytes=state.stat().st_size, state_sha256=digest_of(state), extents=ram_extents,
    )  # fmt: skip
    write_atomically(path / "template.json", records.dumps(manifest))
    return Template(path, manifest)


def copy_ram(source: int, target: int, size: int) -> int:
    """Copies guest RAM, leaving pages of zeroes as holes; the number of pages with data. Blocks.

    :raises OSError: the disk is full
    """
    os.ftruncate(target, size)
    zero, pages = bytes(PAGE), 0
    for first, count in data_extents(source):
        for start in range(first, first + count, 256):
            block = os.pread(source, min(256, first + count - start) * PAGE, start * PAGE)
            for i in range(0, len(block), PAGE):
                page = block[i : i + PAGE]
                if page != zero:
                    if os.pwrite(target, page, start * PAGE + i) != PAGE:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    pages += 1
    return pages
