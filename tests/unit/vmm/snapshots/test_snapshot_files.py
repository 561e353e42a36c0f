"""Snapshots as folders: checked, copied, made one; what does not fit is named. RAM and state are made up."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from hypervisor.errors import Conflict
from hypervisor.vmm import records
from hypervisor.vmm.snapshots import index
from hypervisor.vmm.snapshots.compact import compact
from hypervisor.vmm.snapshots.index import TEMPLATE, ZERO, Piece
from hypervisor.vmm.snapshots.layer import PAGE, LayerWriter
from hypervisor.vmm.snapshots.snapshot import (
    FORMAT,
    Layer,
    Manifest,
    Snapshot,
    SnapshotDamaged,
    copy_sparse,
    refuse_misfit,
)
from hypervisor.vmm.snapshots.take import open_base
from hypervisor.vmm.templates.template import Template, TemplateKey, write_template

PAGES = 512
KEY = TemplateKey(
    qemu_version="7.2.0",
    argv=("/usr/bin/qemu", "-nodefaults", "-cpu", "max", "-m", "2M", "-kernel", "/a/vmlinuz"),
    guest="ab" * 32,
)


def page(n: int) -> bytes:
    return n.to_bytes(4, "big") * (PAGE // 4)


def layer(folder: Path, first: int, count: int) -> Layer:
    with (folder / "new").open("wb") as file:
        writer = LayerWriter(file.fileno())
        for n in range(first, first + count):
            writer.add(page(n))
        made = Layer(id=writer.finish(), pages=count)
    (folder / "new").rename(folder / made.file)
    return made


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    """Two layers; page 3 of RAM is the template's, 5 and 6 the first layer's, 6 was changed again, 7 is zeroes."""
    template_path = tmp_path / "template"
    template_path.mkdir()
    (template_path / "ram").write_bytes(b"".join(page(n) for n in range(PAGES)))
    (template_path / "state").write_bytes(b"state of the template")
    template = write_template(template_path, KEY)
    folder = tmp_path / "one"
    folder.mkdir()
    layers = (layer(folder, 1000, 3), layer(folder, 2000, 1))
    pieces = [
        Piece(0, 5, TEMPLATE, 0), Piece(5, 1, 1, 1), Piece(6, 1, 2, 0), Piece(7, 1, ZERO, 0),
        Piece(8, PAGES - 8, TEMPLATE, 8),
    ]  # fmt: skip
    data = index.encode(pieces, ram_pages=PAGES, layers=2)
    (folder / "index").write_bytes(data)
    (folder / "state").write_bytes(b"state")
    (folder / "disk.img").write_bytes(bytes(1 << 20) + b"disk")
    Template.link(template_path, folder / "template")
    manifest = Manifest(
        format=FORMAT, name="one", created=1.0, key=KEY, template_sha256=template.manifest.ram_sha256,
        ram_bytes=PAGES * PAGE, disks=(), layers=layers, index_sha256=hashlib.sha256(data).hexdigest(), state_bytes=5,
        state_sha256=hashlib.sha256(b"state").hexdigest(), disk_bytes=(1 << 20) + 4,
    )  # fmt: skip
    (folder / "manifest.json").write_text(records.dumps(manifest.sealed()))
    return Snapshot.read(folder)


def ram_of(snapshot: Snapshot) -> bytes:
    with ExitStack() as stack:
        template = Template.linked(Snapshot.template_of(snapshot.path))
        base, _ = open_base(Snapshot.template_of(snapshot.path), snapshot.path, template, stack)
        return base.read(0, PAGES)


EXPECTED = b"".join({5: page(1001), 6: page(2000), 7: bytes(PAGE)}.get(n, page(n)) for n in range(PAGES))


def test_whole_snapshot_is_taken(snapshot: Snapshot) -> None:
    snapshot.check()
    assert ram_of(snapshot) == EXPECTED


@pytest.mark.parametrize("name", ["manifest.json", "index", "state", "layer-0", "layer-1", "disk.img", "template/ram"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_damage_is_named(snapshot: Snapshot, name: str, how: str) -> None:
    if how == "flipped" and name == "disk.img":
        pytest.skip("disks have no checksums")
    names = {f"layer-{i}": each.file for i, each in enumerate(snapshot.manifest.layers)}
    path = snapshot.path / names.get(name, name)
    data = bytearray(path.read_bytes())
    path.unlink()
    if how == "flipped":
        data[len(data) // 2] ^= 1
    if how == "truncated":
        del data[-2:]
    if how != "missing":
        path.write_bytes(data)
    with pytest.raises(SnapshotDamaged, match=path.name):
        Snapshot.read(snapshot.path).check()


def test_every_byte_of_the_manifest(snapshot: Snapshot) -> None:
    """Harmless are only blanks between values."""
    path = snapshot.path / "manifest.json"
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        bad = bytearray(data)
        bad[at] ^= 1
        path.write_bytes(bad)
        try:
            found = Snapshot.read(snapshot.path)
        except SnapshotDamaged as e:
            assert "manifest.json" in str(e)
        else:
            assert found == snapshot


def test_of_another_format(snapshot: Snapshot) -> None:
    manifest = dataclasses.replace(snapshot.manifest, format=FORMAT + 1)
    (snapshot.path / "manifest.json").write_text(records.dumps(manifest.sealed()))
    with pytest.raises(SnapshotDamaged, match=f"has format {FORMAT + 1}"):
        Snapshot.read(snapshot.path)


def test_many_layers_become_one(snapshot: Snapshot) -> None:
    made = compact(snapshot)
    assert [each.pages for each in made.manifest.layers] == [2]  # what was replaced has gone
    assert Snapshot.read(snapshot.path) == made
    made.check()
    assert ram_of(made) == EXPECTED
    assert len(list(snapshot.path.glob("layer-*"))) == 1


def test_copies_do_without_each_other(snapshot: Snapshot, tmp_path: Path) -> None:
    snapshot.copy(tmp_path / "two")
    (tmp_path / "two/disk.img").write_bytes(b"written by another")
    assert snapshot.path.joinpath("disk.img").read_bytes().endswith(b"disk")
    copied = Snapshot.read(tmp_path / "two")
    compact(copied)
    snapshot.check()  # a link's file is as it was
    shutil.rmtree(snapshot.path)
    assert ram_of(Snapshot.read(tmp_path / "two")) == EXPECTED


def test_sparse_disks_stay_sparse(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    with source.open("wb") as file:
        os.truncate(file.fileno(), 1 << 30)
        os.pwrite(file.fileno(), b"x" * 5000, 1 << 20)
        os.pwrite(file.fileno(), b"end", (1 << 30) - 3)
    copy_sparse(source, target)
    assert target.stat().st_blocks <= source.stat().st_blocks + 16
    assert target.stat().st_size == 1 << 30
    with target.open("rb") as file:
        assert os.pread(file.fileno(), 6000, 1 << 20) == b"x" * 5000 + bytes(1000)
        assert os.pread(file.fileno(), 9, (1 << 30) - 6) == b"\0\0\0end"


def test_what_differs_is_named(snapshot: Snapshot) -> None:
    moved = tuple("/b/vmlinuz" if word == "/a/vmlinuz" else word for word in KEY.argv)
    refuse_misfit(dataclasses.replace(KEY, argv=moved), snapshot)
    other = TemplateKey(qemu_version="10.0.0", argv=("/usr/bin/qemu", "-cpu", "host", "-m", "2M"), guest="cd" * 32)
    with pytest.raises(Conflict) as refused:
        refuse_misfit(other, snapshot)
    for words in ("QEMU 7.2.0, here is 10.0.0", "guest image abababababab, here is cdcd", "-cpu max, here host"):
        assert words in str(refused.value)
