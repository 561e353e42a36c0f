"""The disk as a whole: what the kernel, fsck and another unpacker make of it; determinism, holes, space, memory."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from erofs_reader import Image
from imagekit import IMAGE_ID, LayerTar, build, has, layout, sha256, xattr

from hypervisor.errors import ResourceExhausted, Unavailable
from hypervisor.images import erofs, worker
from hypervisor.images.blobs import Blob
from hypervisor.images.build import BuildJob, Layer, build_disk
from hypervisor.images.disk import DiskWriter, Placement
from hypervisor.images.model import Limits, no_progress

MIB = 1 << 20


@contextlib.contextmanager
def mounted(disk: Path, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "erofs", "-o", "loop,ro", disk, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def facts(root: Path) -> dict[str, tuple[object, ...]]:
    """All that can be seen of every file below a folder; names of one inode are told by the first of them."""
    found: dict[str, tuple[object, ...]] = {}
    first: dict[int, str] = {}
    for path in sorted([root, *root.rglob("*")]):
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content: object = None
        if kind == stat.S_IFREG:
            content = sha256(path.read_bytes())
        elif kind == stat.S_IFLNK:
            content = path.readlink()
        names = os.listxattr(path, follow_symlinks=False)
        xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
        relative = str(path.relative_to(root))
        links = None if kind == stat.S_IFDIR else (status.st_nlink, first.setdefault(status.st_ino, relative))
        device = status.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
        owner = (status.st_uid, status.st_gid)
        found[relative] = (status.st_mode, owner, status.st_mtime_ns, device, content, xattrs, links)
    return found


def rich_layers() -> list[bytes]:
    """Two layers with some of everything; every entry has a time and an owner of its own."""
    data = random.Random(1).randbytes
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    first = LayerTar().dir("./", mode=0o755, mtime=5).dir("bin", mtime=6).dir("d", mode=0o2775, gid=50, mtime=7)
    first.file("bin/ping", data(70_000), mode=0o4755, mtime=8.5, pax=xattr("security.capability", capability))
    first.link("bin/ping2", "bin/ping").symlink("lib", "usr/lib", mtime=9, mode=0o777)
    first.device("null", tarfile.CHRTYPE, 1, 3, mode=0o666, mtime=9).device("loop", tarfile.BLKTYPE, 7, 300, mtime=9)
    first.fifo("pipe", mtime=10).symlink("long", "p/" * 2000 + "q", mtime=11, mode=0o777)
    first.file("x", b"x", mtime=3, pax=xattr("user.big", data(3000)) | xattr("trusted.s", b"t"))
    for index in range(500):
        first.file(f"d/{index}-{'n' * (index % 97)}", data(index * 37), uid=index, gid=index * 3, mtime=index)
    first.file("gone/with/the/wind", data(MIB), mtime=1).file("d2/a", "a", mtime=1).file("d2/b/c", "c", mtime=1)
    second = LayerTar().dir("new", mtime=20).file("new/f", data(5000), mtime=21).file(".wh.gone")
    second.dir("d2", mtime=22).file("d2/.wh..wh..opq").file("d2/z", "z", mtime=23).file("d/.wh.7-nnnnnnn")
    second.file("d/1-n", "replaced", mtime=24).dir("d", mode=0o2775, gid=50, mtime=25).dir("bin", mtime=26)
    second.file(b"\xff\xfe".decode("utf-8", "surrogateescape"), "odd", mtime=27).dir("./", mode=0o755, mtime=5)
    return [first.bytes(), second.bytes()]


@pytest.mark.root
def test_the_kernel_sees_what_umoci_unpacks(tmp_path: Path) -> None:
    if not has("umoci"):
        pytest.skip("needs Debian's umoci")
    layers = rich_layers()
    folder = layout(tmp_path / "layout", *layers, name="latest")
    subprocess.run(["umoci", "raw", "unpack", "--image", f"{folder}:latest", tmp_path / "oracle"], check=True)
    with mounted(build(tmp_path, *layers), tmp_path / "mnt") as root:
        ours, theirs = facts(root), facts(tmp_path / "oracle")
    assert ours.keys() == theirs.keys()
    for path, fact in theirs.items():
        assert ours[path] == fact, path


@pytest.mark.root
@pytest.mark.parametrize("seed", range(6))
def test_random_layers_give_what_umoci_unpacks(tmp_path: Path, seed: int) -> None:
    if not has("umoci"):
        pytest.skip("needs Debian's umoci")
    layers = random_layers(random.Random(seed))
    folder = layout(tmp_path / "layout", *layers, name="latest")
    subprocess.run(["umoci", "raw", "unpack", "--image", f"{folder}:latest", tmp_path / "oracle"], check=True)
    with mounted(build(tmp_path, *layers), tmp_path / "mnt") as root:
        assert facts(root) == facts(tmp_path / "oracle")


def random_layers(choose: random.Random) -> list[bytes]:
    """Layers as diffs of a tree that changes at random; what docker would push, that is: parents before children."""
    tree: dict[str, str] = {}
    return [_random_layer(choose, tree, index) for index in range(6)]


def _random_layer(choose: random.Random, tree: dict[str, str], index: int) -> bytes:
    layer = LayerTar().dir("./", mtime=index, mode=0o755)
    mine: dict[str, str] = {}

    def below(path: str) -> list[str]:
        return [other for other in tree if other == path or other.startswith(path + "/")]

    def make(path: str, kind: str) -> None:
        options = {"mtime": index * 1000 + len(mine), "uid": choose.randrange(3), "gid": choose.randrange(3)}
        if kind == "dir":
            layer.dir(path, mode=choose.choice([0o755, 0o700]), **options)
        elif kind == "file":
            layer.file(path, choose.randbytes(choose.choice([0, 10, 4000, 4096, 9000])), **options)
        else:
            layer.symlink(path, "nowhere", mode=0o777, **options)
        tree[path] = mine[path] = kind

    for _ in range(60):
        folders = ["", *(path for path, kind in mine.items() if kind == "dir")]
        lower = [path for path, kind in tree.items() if kind == "dir" and path not in mine]
        if lower and choose.random() < 0.3:
            path = choose.choice(lower)
            if path.rpartition("/")[0] in folders:
                make(path, "dir")
            continue
        path = f"{choose.choice(folders)}/{choose.choice('abcdef')}".lstrip("/")
        if path in mine:
            continue
        if path in tree and choose.random() < 0.4:
            head, _, name = path.rpartition("/")
            layer.file(f"{head}/.wh.{name}".lstrip("/"))
            mine[path] = "gone"
            for other in below(path):
                del tree[other]
            continue
        kind = choose.choice(["dir", "file", "symlink"])
        if kind != "dir" or tree.get(path) != "dir":
            for other in below(path):
                del tree[other]
        make(path, kind)
    return layer.bytes()


def test_fsck_and_dump_are_content(tmp_path: Path) -> None:
    if not has("fsck.erofs"):
        pytest.skip("needs erofs-utils")
    disk = build(tmp_path, *rich_layers())
    assert complaints("fsck.erofs", "--extract", disk) == ""
    assert complaints("dump.erofs", "-s", disk) == ""
    spoilt = bytearray(disk.read_bytes())
    spoilt[1024 + 90] ^= 1
    disk.write_bytes(spoilt)
    assert "chksum" in complaints("fsck.erofs", disk), "the checksum must be a real one"


def complaints(*argv: str | Path) -> str:
    return subprocess.run(argv, capture_output=True, text=True).stderr


def test_the_same_layers_give_the_same_bytes(tmp_path: Path) -> None:
    layers = rich_layers()
    assert build(tmp_path, *layers).read_bytes() == build(tmp_path, *layers).read_bytes()


def test_the_disk_is_labelled_with_the_images_id(tmp_path: Path) -> None:
    found = Image(build(tmp_path, LayerTar().file("f").bytes()))
    assert found.label == IMAGE_ID[:12].encode().ljust(16, b"\0")  # without a NUL at the end, kernels refuse it
    assert found.inodes == 2
    assert 0 < found.root_nid < 65536


def test_what_a_later_layer_hides_takes_no_space(tmp_path: Path) -> None:
    data = os.urandom(8 * MIB)
    first = LayerTar().file("gone", data).file("kept", data[:MIB]).file("replaced", data)
    disk = build(tmp_path, first.bytes(), LayerTar().file(".wh.gone").file("replaced", "small").bytes())
    assert disk.stat().st_blocks * 512 < 2 * MIB
    assert Image(disk)["kept"].data == data[:MIB]


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=pax", "--sparse-version=0.0"],
        ["--format=pax", "--sparse-version=0.1"],
        ["--format=pax", "--sparse-version=1.0"],
    ],
    ids=" ".join,
)
def test_sparse_files_in_every_format(tmp_path: Path, options: list[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with (source / "sparse").open("wb") as file:
        for index in range(60):
            file.seek(index * 3 * MIB // 2 + index)
            file.write(os.urandom(5000))
        file.truncate(100 * MIB + 77)
    (source / "after").write_bytes(b"after")
    tar = subprocess.run(
        ["tar", "-C", source, "-cS", *options, "sparse", "after"], check=True, capture_output=True
    ).stdout
    assert len(tar) < 10 * MIB
    disk = build(tmp_path, tar)
    found = Image(disk)
    assert found["sparse"].data == (source / "sparse").read_bytes()
    assert found["after"].data == b"after"
    assert disk.stat().st_blocks * 512 < 10 * MIB


def test_zeros_become_holes(tmp_path: Path) -> None:
    disk = build(tmp_path, LayerTar().file("zeros", bytes(20 * MIB)).file("one", b"1" * 100).bytes())
    assert disk.stat().st_blocks * 512 < 3 * MIB
    found = Image(disk)
    assert found["zeros"].data == bytes(20 * MIB)
    assert found["one"].data == b"1" * 100


@pytest.mark.root
def test_a_file_of_more_than_4_gib(tmp_path: Path) -> None:
    source, size = tmp_path / "source", (5 << 30) + 3
    source.mkdir()
    with (source / "big").open("wb") as file:
        file.truncate(size)
        for offset in (0, 1 << 32, size - 3):
            file.seek(offset)
            file.write(b"abc")
    tar = subprocess.run(["tar", "-C", source, "-cS", "--format=pax", "."], check=True, capture_output=True).stdout
    with mounted(build(tmp_path, tar), tmp_path / "mnt") as root, (root / "big").open("rb") as file:
        assert os.fstat(file.fileno()).st_size == size
        for offset in (0, 1 << 32, size - 3):
            file.seek(offset)
            assert file.read(3) == b"abc"
        file.seek((1 << 32) - 3)
        assert file.read(3) == bytes(3)


def test_no_room_is_one_clear_error(tmp_path: Path) -> None:
    layer = LayerTar().file("f", os.urandom(3 * MIB)).bytes()
    (tmp_path / "layer.tar").write_bytes(layer)
    with limited(resource.RLIMIT_FSIZE, 2 * MIB), pytest.raises(ResourceExhausted, match="hv image prune"):
        from_layer_file(tmp_path / "layer.tar", tmp_path / "disk.erofs")


@pytest.mark.root
@pytest.mark.parametrize("size", ["1m", "2052k"], ids=["while storing", "while finishing"])
def test_a_full_file_system(tmp_path: Path, size: str) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (tmp_path / "layer.tar").write_bytes(LayerTar().file("f", os.urandom(2 * MIB)).bytes())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", full], check=True)
    try:
        with pytest.raises(ResourceExhausted, match="No space left"):
            from_layer_file(tmp_path / "layer.tar", full / "disk.erofs")
    finally:
        subprocess.run(["umount", full], check=True)


def from_layer_file(layer: Path, output: Path) -> None:
    data = layer.read_bytes()
    found = Layer(Blob(layer, 0, len(data)), sha256(data))
    build_disk(BuildJob(IMAGE_ID, (found,), output, Limits()), no_progress)


@contextlib.contextmanager
def limited(what: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


def test_a_disk_that_cannot_be_made_or_exists_already(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    for path in (tmp_path / "no/such/folder", tmp_path / "there"):
        with pytest.raises(Unavailable, match="cannot write the image"), DiskWriter(path):
            pass


def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    """100 MiB of files are imported by a worker that never holds more than some 60 MiB."""
    layer = LayerTar()
    for index in range(10):
        layer.file(f"f{index}", os.urandom(10 * MIB))
    (tmp_path / "layer.tar").write_bytes(layer.bytes())
    usage = measured(tmp_path / "layer.tar", tmp_path / "disk.erofs")
    assert usage < 100, f"{usage} MiB"


def measured(layer: Path, output: Path) -> int:
    """Peak memory in MiB of a worker process that builds a disk."""
    data = layer.read_bytes()
    job = BuildJob(IMAGE_ID, (Layer(Blob(layer, 0, len(data)), sha256(data)),), output, Limits())
    program = (
        "from hypervisor.images import worker; worker.main(); "
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    done = subprocess.run([sys.executable, "-c", program], input=worker.encode(job), capture_output=True, check=True)
    return int(done.stdout.split()[-1]) // 1024


class TestPlacement:
    def test_never_across_a_block_and_never_twice(self) -> None:
        choose, place, taken = random.Random(3), Placement(), set[int]()
        for _ in range(3000):
            size = choose.choice([64, 100, 2000, 4000, 4096, choose.randrange(64, 4096)])
            at = place.place(size)
            slots = range(at // 32, (at + size + 31) // 32)
            assert at % 32 == 0
            assert at // 4096 == (at + size - 1) // 4096
            assert not taken.intersection(slots)
            taken.update(slots)
        assert max(taken) < place.blocks * 128
        assert min(taken) >= 4

    def test_what_is_larger_than_a_block_begins_one(self) -> None:
        place = Placement()
        place.place(64)
        assert place.place(10_000) == 4096
        assert place.blocks == 4


class TestFormat:
    def test_device_numbers(self) -> None:
        assert erofs.device_number(1, 3) == 0x103
        assert erofs.device_number(4095, (1 << 20) - 1) == 0xFFFFFFFF

    def test_directories_fill_blocks_to_the_brim(self) -> None:
        names = [f"{index:0244}".encode() for index in range(17)]  # 12 + 244 = 256 bytes each: 16 to a block
        assert erofs.directory_layout(names) == [(16, 4096), (17, 256)]
        assert erofs.directory_size(erofs.directory_layout(names)) == 4096 + 256
        blocks = list(
            erofs.directory_blocks([(name, 1, stat.S_IFREG) for name in names], erofs.directory_layout(names))
        )
        assert [len(block) for block in blocks] == [4096, 256]
