"""Makes one layer of many: what later ones have replaced goes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from contextlib import ExitStack

from hypervisor.vmm import records
from hypervisor.vmm.directory import write_atomically
from hypervisor.vmm.snapshots import index
from hypervisor.vmm.snapshots.index import TEMPLATE, ZERO, Piece, joined
from hypervisor.vmm.snapshots.layer import PAGE, LayerWriter
from hypervisor.vmm.snapshots.snapshot import Layer, Snapshot

_BLOCK_PAGES = 1024


def compact(snapshot: Snapshot) -> Snapshot:
    """The same with a single layer, in its place. Only one that nobody else knows of: cut short, it is none. Blocks.

    :raises OSError: the disk is full
    """
    path = snapshot.path / "layer.new"
    with ExitStack() as stack:
        fds = [os.open(layer, os.O_RDONLY | os.O_CLOEXEC) for layer in snapshot.layers]
        for fd in fds:
            stack.callback(os.close, fd)
        writer = LayerWriter(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        stack.callback(os.close, writer.fd)
        pieces = joined(_moved(piece, fds, writer) for piece in snapshot.pieces)
        layer = Layer(id=writer.finish(), pages=writer.pages)
    for old in snapshot.layers:
        old.unlink()
    path.rename(snapshot.path / layer.file)
    return _rewritten(snapshot, layer, pieces)


def _moved(piece: Piece, fds: list[int], writer: LayerWriter) -> Piece:
    if piece.source in (TEMPLATE, ZERO):
        return piece
    began = writer.pages
    for start in range(0, piece.pages, _BLOCK_PAGES):
        size = min(_BLOCK_PAGES, piece.pages - start) * PAGE
        data = os.pread(fds[piece.source - 1], size, (piece.page + start) * PAGE)
        for at in range(0, len(data), PAGE):
            writer.add(data[at : at + PAGE])
    return piece._replace(source=1, page=began)


def _rewritten(snapshot: Snapshot, layer: Layer, pieces: list[Piece]) -> Snapshot:
    data = index.encode(pieces, ram_pages=snapshot.manifest.ram_bytes // PAGE, layers=1)
    manifest = dataclasses.replace(
        snapshot.manifest, layers=(layer,), index_sha256=hashlib.sha256(data).hexdigest()
    ).sealed()
    (snapshot.path / "index").unlink()  # it may be a link
    (snapshot.path / "index").write_bytes(data)
    write_atomically(snapshot.path / "manifest.json", records.dumps(manifest))
    return Snapshot(snapshot.path, manifest, tuple(pieces))
