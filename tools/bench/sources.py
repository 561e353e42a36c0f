"""What a compressed source costs: a real template's working set, prefetched into fresh memory from each kind of source.

The plain file; the same file in zstd's seekable format, decompressed by each VM for itself; and decompressed once for
the host, its frames shared: the first VM has them loaded, the next ones find them.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from host import fresh_host
from measure import Figure

from hypervisor.memory.database import PageFrameDatabase, SourceKind, new_memory_file
from hypervisor.memory.faults import FaultServer
from hypervisor.memory.loader import SourceLoader
from hypervisor.memory.native import PAGE
from hypervisor.memory.space import AddressSpace
from hypervisor.vmm import records
from hypervisor.vmm.templates.template import Manifest, Template
from hypervisor.vmx import working_set

UNIT_BYTES = 64 << 10
LEVEL = 3
_CHECKSUM_FLAG, _LEVEL_PARAMETER = 201, 100
_NAMES = {
    "plain": "plain file (page cache)",
    "alone": "zstd, each VM for itself",
    "first": "zstd, shared frames, first VM",
    "next": "zstd, shared frames, next VM",
}


@dataclass(frozen=True)
class Input:
    """A template's RAM as both files, and what its clones touch first."""

    plain: Path
    packed: Path
    size: int
    pages: list[int]


def run(rounds: int) -> list[Figure]:
    """Milliseconds to fill the working set; the sizes on disk."""
    with fresh_host("busybox") as host, tempfile.TemporaryDirectory(prefix="hvz-") as folder:
        for _ in range(2):  # makes the template, and records the working set
            host.run("run", "--rm", "busybox", "--", "true")
        (path,) = (p.parent for p in (host.state / "templates").glob("*/working-set"))
        given = _input(path, Path(folder))
        samples: dict[str, list[float]] = {name: [] for name in _NAMES}
        frames: list[float] = []
        for _ in range(rounds):
            with _database() as database:
                samples["plain"].append(_fill(database, given, SourceKind.FILE, None))
                samples["alone"].append(_fill(database, given, SourceKind.ZSTD, None))
            with _database() as database, _loader(database, given) as loader:
                vad = database.add(SourceKind.ZSTD, pages=given.size // PAGE, source=1)
                for name in ("first", "next"):
                    samples[name].append(_fill(database, given, SourceKind.ZSTD, loader, vad))
                frames.append(loader.counts().bytes / 2**20)
        sizes = [float(file.stat().st_blocks * 512) / 2**20 for file in (given.plain, given.packed)]
    what = f"working set of {len(given.pages)} pages filled from"
    return [
        *(Figure(f"{what} {_NAMES[name]}", "ms", tuple(values)) for name, values in samples.items()),
        Figure("memory that its shared frames take while the source is in use", "MiB", tuple(frames)),
        Figure("template's RAM on disk, plain", "MiB", (sizes[0],)),
        Figure(f"the same, zstd in frames of {UNIT_BYTES >> 10} KiB", "MiB", (sizes[1],)),
    ]


def _input(template: Path, folder: Path) -> Input:
    manifest = records.loads(Manifest, (template / "template.json").read_bytes(), where="template.json")
    packed = folder / "ram.zst"
    packed.write_bytes(pack(Template.ram_of(template).read_bytes()))
    data = Template.working_set_of(template).read_bytes()
    pages = working_set.decode(data, template=manifest.ram_sha256, ram_pages=manifest.ram_bytes // PAGE)
    return Input(Template.ram_of(template), packed, manifest.ram_bytes, pages.tolist())


def pack(data: bytes) -> bytes:
    """zstd's seekable format: frames of `UNIT_BYTES` with checksums, and the table of their sizes."""
    zstd = ctypes.CDLL("libzstd.so.1")
    zstd.ZSTD_createCCtx.restype = ctypes.c_void_p
    zstd.ZSTD_compress2.restype = zstd.ZSTD_compressBound.restype = ctypes.c_size_t
    zstd.ZSTD_compressBound.argtypes = [ctypes.c_size_t]
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    zstd.ZSTD_compress2.argtypes = [pointer, ctypes.c_char_p, size, ctypes.c_char_p, size]
    context = pointer(zstd.ZSTD_createCCtx())
    for parameter, value in ((_LEVEL_PARAMETER, LEVEL), (_CHECKSUM_FLAG, 1)):
        zstd.ZSTD_CCtx_setParameter(context, parameter, value)
    room = ctypes.create_string_buffer(zstd.ZSTD_compressBound(UNIT_BYTES))
    frames, rows = bytearray(), []
    for at in range(0, len(data), UNIT_BYTES):
        unit = data[at : at + UNIT_BYTES]
        count = zstd.ZSTD_compress2(context, room, len(room), unit, len(unit))
        frames += room.raw[:count]
        rows.append(struct.pack("<II", count, len(unit)))
    zstd.ZSTD_freeCCtx(context)
    table = b"".join(rows) + struct.pack("<IBI", len(rows), 0, 0x8F92EAB1)
    return bytes(frames) + struct.pack("<II", 0x184D2A5E, len(table)) + table


@contextlib.contextmanager
def _database() -> Iterator[PageFrameDatabase]:
    fd = new_memory_file("frames")
    with PageFrameDatabase.create(fd, max_vads=8, max_pfes=1 << 20) as database:
        yield database
    os.close(fd)


@contextlib.contextmanager
def _loader(database: PageFrameDatabase, given: Input) -> Iterator[SourceLoader]:
    with given.packed.open("rb") as file:
        loader = SourceLoader(database, 1, file.fileno(), kind=SourceKind.ZSTD, max_bytes=given.size)
        with loader:
            yield loader


def _fill(
    database: PageFrameDatabase, given: Input, kind: SourceKind, loader: SourceLoader | None, vad: int | None = None
) -> float:
    """Milliseconds to prefetch the working set into memory that nobody has touched."""
    if vad is None:
        vad = database.add(kind, pages=given.size // PAGE, source=1)
    ram = new_memory_file("ram")
    os.ftruncate(ram, given.size)
    source = (given.plain if kind is SourceKind.FILE else given.packed).open("rb")
    with source, AddressSpace(database) as space, mmap.mmap(ram, given.size) as memory:
        space.map(0, given.size // PAGE, vad)
        server = FaultServer(database, space, ram_bytes=given.size)
        server.add_source(1, source.fileno(), kind=kind)
        if loader is not None:
            client = loader.client()
            server.share_source(1, loader.store_fd, client)
            os.close(client)
        server.open_own()
        server.register_own(memory)
        with server:
            began = time.perf_counter()
            filled = sum(server.prefetch(batch) for batch in working_set.batches(given.pages))
            seconds = time.perf_counter() - began
        if filled != len(given.pages):
            raise SystemExit(f"sources: {filled} pages filled of {len(given.pages)}: {server.reason}")
    os.close(ram)
    return seconds * 1e3
