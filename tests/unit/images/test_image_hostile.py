"""Broken and hostile images: each is refused with one error that says what is wrong, and leaves nothing."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagekit import COMPRESSORS, OCI, LayerTar, Layout, as_archive, build, docker_archive, layout, sha256, xattr

from hypervisor.errors import HvError, InvalidInput, ResourceExhausted
from hypervisor.images import ImageStore, Limits, Platform
from hypervisor.images.blobs import ByteStream
from hypervisor.images.tarstream import TarReader

LAYER = LayerTar().file("f", os.urandom(200_000)).bytes()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    """A store that must be as empty at the end as at the beginning."""
    folder = tmp_path / "store"
    yield ImageStore(folder, platform=Platform("amd64"), limits=Limits(bomb_grace=1 << 20))
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) in (
        ["building", "disks", "lock", "staging"],
        ["building", "disks", "staging"],
    )


# ---- layers ----------------------------------------------------------------------------------------------------------


def raw_header(**change: bytes) -> bytes:
    """A header of ``LayerTar().file("f")`` with bytes changed by offset, and its checksum made right again."""
    header = bytearray(LayerTar(tarfile.USTAR_FORMAT).file("f").bytes()[:512])
    for place, value in change.items():
        offset = int(place.removeprefix("at"))
        header[offset : offset + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def sparse_header(*regions: tuple[int, int], size: int, stored: int) -> bytes:
    table = b"".join(b"%011o\0%011o\0" % region for region in regions)
    return raw_header(at156=b"S", at124=b"%011o\0" % stored, at257=b"ustar  \0", at386=table, at483=b"%011o\0" % size)


def pax_layer(records: bytes) -> bytes:
    header = raw_header(at156=b"x", at124=b"%011o\0" % len(records))
    return header + records.ljust(-(-len(records) // 512) * 512, b"\0") + LayerTar().file("f").bytes()


SPARSE_1_0 = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
HOSTILE_LAYERS: dict[str, tuple[bytes, str]] = {
    "dot-dot": (LayerTar().file("a/../../etc/passwd", "x").bytes(), r"leads out of the image"),
    "dot-dot alone": (LayerTar().dir("..").bytes(), r"leads out of the image"),
    "dot-dot whiteout": (LayerTar().file("../.wh.x").bytes(), r"leads out of the image"),
    "through a symlink": (LayerTar().symlink("l", "/etc").file("l/passwd", "x").bytes(), r"through the symlink 'l'"),
    "through a symlink up": (LayerTar().symlink("l", "..").dir("l/d").bytes(), r"through the symlink 'l'"),
    "whiteout through a symlink": (LayerTar().symlink("l", "/").file("l/.wh.etc").bytes(), r"through the symlink"),
    "through a file": (LayerTar().file("f").file("f/g").bytes(), r"through what is no directory: 'f'"),
    "link out": (LayerTar().link("l", "../../etc/shadow").bytes(), r"leads out of the image"),
    "absolute link out": (LayerTar().link("l", "/etc/shadow").bytes(), r"which is not in the image"),
    "link through a symlink": (LayerTar().symlink("s", "/etc").link("l", "s/shadow").bytes(), r"through the symlink"),
    "link to a directory": (LayerTar().dir("d").link("d/loop", "d").bytes(), r"hard link to the directory"),
    "link to the root": (LayerTar().link("loop", "./").bytes(), r"hard link to the directory"),
    "link to itself": (LayerTar().link("l", "l").bytes(), r"which is not in the image"),
    "root replaced": (LayerTar().symlink("./", "/etc").bytes(), r"replaces the root"),
    "whiteout of nothing": (LayerTar().file("d/.wh.").bytes(), r"whiteout of nothing"),
    "whiteout of dot-dot": (LayerTar().dir("d").file("d/.wh...").bytes(), r"whiteout of nothing"),
    "long name": (LayerTar().file("n" * 256).bytes(), r"longer than 255"),
    "long path": (LayerTar().file("a/" * 40_000 + "f").bytes(), r"path is longer"),
    "long symlink": (LayerTar().symlink("l", "t" * 4096).bytes(), r"target has 4096 bytes"),
    "empty symlink": (LayerTar().symlink("l", "").bytes(), r"target has 0 bytes"),
    "NUL in a name": (LayerTar().file("f", pax={"path": "a\0b"}).bytes(), r"NUL byte"),
    "huge header": (LayerTar().file("f", pax={"comment": "x" * (2 << 20)}).bytes(), r"tar header of"),
    "huge attribute": (LayerTar().file("f", pax=xattr("user.x", b"v" * 70_000)).bytes(), r"attribute is too long"),
    "many attributes": (
        LayerTar().file("f", pax={key: "v" * 60_000 for i in range(5) for key in xattr(f"user.{i}", b"")}).bytes(),
        r"more than 256 KiB",
    ),
    "device number": (LayerTar(tarfile.GNU_FORMAT).device("d", tarfile.CHRTYPE, 4096, 0).bytes(), r"device number"),
    "unknown type": (raw_header(at156=b"Z"), r"unknown type b'Z'"),
    "negative size": (raw_header(at124=b"\xff" * 12), r"negative size"),
    "negative size of a long name": (raw_header(at124=b"\xff" * 12, at156=b"L"), r"tar header of -1 bytes"),
    "negative size of a pax header": (raw_header(at124=b"\xff" * 11 + b"\0", at156=b"x"), r"tar header of -256 bytes"),
    "negative sparse region": (
        raw_header(at156=b"S", at257=b"ustar  \0", at386=b"\xff" * 24, at483=b"%011o\0" % 9), r"map is damaged"
    ),
    "negative sparse size": (
        raw_header(at156=b"S", at257=b"ustar  \0", at483=b"\xff" * 12), r"map does not fit"
    ),
    "negative owner": (raw_header(at108=b"\xff" * 8), r"no such owner"),
    "size is no number": (raw_header(at124=b"99999999999\0"), r"header is damaged \(size"),
    "wrong checksum": (b"x" + raw_header()[1:], r"checksum is wrong"),
    "no tar at all": (b"this is no tar archive".ljust(1024), r"not a tar archive|header is damaged"),
    "cut in a header": (LAYER[:300], r"cut short"),
    "cut in the data": (LAYER[:100_000], r"cut short"),
    "ends after an extended header": (pax_layer(b"")[:512], r"ends after|cut short|extended"),
    "pax: length too large": (pax_layer(b"99 path=x\n"), r"extended tar header"),
    "pax: no equals sign": (pax_layer(b"9 pathxx\n"), r"extended tar header"),
    "pax: length zero": (pax_layer(b"0 path=x\n"), r"extended tar header"),
    "pax: no newline": (pax_layer(b"9 path=xy"), r"extended tar header"),
    "pax: size is no number": (pax_layer(b"11 size=-1\n"), r"header is damaged \(size"),
    "sparse: overlap": (sparse_header((0, 512), (100, 512), size=9999, stored=1024) + bytes(1024), r"map is damaged"),
    "sparse: beyond the end": (sparse_header((5000, 512), size=100, stored=512) + bytes(512), r"does not fit"),
    "sparse: more than stored": (sparse_header((0, 4096), size=4096, stored=512) + bytes(512), r"does not fit"),
    "sparse: odd map": (
        LayerTar().file("f", b"x", pax={"GNU.sparse.map": "1,2,3", "GNU.sparse.size": "9"}).bytes(), "map"
    ),
    "sparse: version": (
        LayerTar().file("f", b"x", pax={"GNU.sparse.major": "2", "GNU.sparse.realsize": "9"}).bytes(), r"not known",
    ),
    "sparse: endless map": (
        LayerTar()
        .file("f", b"9" * 1024, pax=SPARSE_1_0)
        .bytes(),
        r"map is damaged",
    ),
    "sparse: map longer than data": (
        LayerTar()
        .file("f", b"5\n".ljust(512, b"1"), pax=SPARSE_1_0)
        .bytes(),
        r"map",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_LAYERS)
async def test_a_hostile_layer_is_refused(tmp_path: Path, store: ImageStore, case: str) -> None:
    layer, message = HOSTILE_LAYERS[case]
    source = layout(tmp_path / "layout", LayerTar().dir("d").bytes(), layer)
    with pytest.raises(InvalidInput, match=f"layer 2 of 2: .*(?:{message})") as caught:
        await store.import_archive(source, name="hostile")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


async def test_a_sparse_file_of_many_exabytes_is_refused(tmp_path: Path, store: ImageStore) -> None:
    huge = raw_header(at156=b"S", at257=b"ustar  \0", at483=b"\x80\0\0\0\x7f" + b"\xff" * 7)
    with pytest.raises(ResourceExhausted, match="files are larger than"):
        await store.import_archive(layout(tmp_path / "layout", huge))


def test_no_more_entries_than_the_limit_allows_implied_directories_counted(tmp_path: Path) -> None:
    limits = Limits(entries=100)
    build(tmp_path, LayerTar().file("a/" * 98 + "f").bytes(), limits=limits)
    for layer in (LayerTar().file("a/" * 100 + "f").bytes(), many_files(101)):
        with pytest.raises(ResourceExhausted, match="more than 100 entries"):
            build(tmp_path, layer, limits=limits)


def many_files(count: int) -> bytes:
    layer = LayerTar()
    for index in range(count):
        layer.file(f"f{index}")
    return layer.bytes()


@pytest.mark.parametrize("compression", ["+gzip", "+zstd"])
async def test_a_decompression_bomb_is_refused(tmp_path: Path, store: ImageStore, compression: str) -> None:
    layer = LayerTar().file("zeros", bytes(64 << 20)).bytes()
    with pytest.raises(ResourceExhausted, match="bomb"):
        await store.import_archive(layout(tmp_path / "layout", layer, compression=compression))


async def test_an_image_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store", platform=Platform("amd64"), limits=Limits(image_bytes=100_000))
    with pytest.raises(ResourceExhausted, match=r"97\.7 KiB"):
        await store.import_archive(layout(tmp_path / "layout", LAYER))


# ---- blobs and documents ---------------------------------------------------------------------------------------------


def spoil(folder: Path, blob: dict[str, Any], change: Callable[[bytes], bytes]) -> None:
    path = folder / "blobs/sha256" / blob["digest"].removeprefix("sha256:")
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("damage", ["other bytes", "shorter", "longer"])
async def test_a_layer_with_another_digest_or_size(
    tmp_path: Path, store: ImageStore, compression: str, damage: str
) -> None:
    made = Layout(tmp_path / "layout")
    manifest = json.loads(read(made, made.image([LAYER], compression=compression)))
    changes: dict[str, tuple[Callable[[bytes], bytes], str]] = {
        "other bytes": (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "damaged|differs"),
        "shorter": (lambda data: data[:-1], "bytes; the manifest says"),
        "longer": (lambda data: data + b"\0", "bytes; the manifest says"),
    }
    change, message = changes[damage]
    spoil(made.folder, manifest["layers"][0], change)
    with pytest.raises(InvalidInput, match=message):
        await store.import_archive(made.write())


def read(made: Layout, blob: dict[str, Any]) -> bytes:
    return (made.folder / "blobs/sha256" / blob["digest"].removeprefix("sha256:")).read_bytes()


@pytest.mark.parametrize("compression", ["+gzip", "+zstd"])
async def test_a_cut_compressed_layer_whose_digest_is_right(
    tmp_path: Path, store: ImageStore, compression: str
) -> None:
    made = Layout(tmp_path / "layout")
    cut = made.blob(COMPRESSORS[compression](LAYER)[:-2000])
    made.image([LAYER], change={"layers": [{"mediaType": f"{OCI}.layer.v1.tar{compression}", **cut}]})
    with pytest.raises(InvalidInput, match="cut short"):
        await store.import_archive(made.write())


@pytest.mark.parametrize("text", [b"root:x:0:0:root:/root:/bin/sh\n", b"a text of more than a header\n" * 100])
async def test_a_file_that_is_no_archive(tmp_path: Path, store: ImageStore, text: bytes) -> None:
    path = tmp_path / "passwd"
    path.write_bytes(text)
    with pytest.raises(InvalidInput, match=r"passwd: is no image archive"):
        await store.import_archive(path)


@pytest.mark.parametrize("junk", [b"\x1f\x8bjunk" * 50, b"\x28\xb5\x2f\xfdjunk" * 50, b"BZh9junk", b"\xfd7zXZ\0"])
async def test_junk_that_looks_compressed(tmp_path: Path, store: ImageStore, junk: bytes) -> None:
    made = Layout(tmp_path / "layout")
    made.image([LAYER], change={"layers": [{"mediaType": f"{OCI}.layer.v1.tar+gzip", **made.blob(junk)}]})
    with pytest.raises(InvalidInput, match=r"damaged|bzip2 or xz"):
        await store.import_archive(made.write())


async def test_garbage_after_the_gzip_data(tmp_path: Path, store: ImageStore) -> None:
    made = Layout(tmp_path / "layout")
    blob = made.blob(gzip.compress(LAYER) + b"garbage")
    made.image([LAYER], change={"layers": [{"mediaType": f"{OCI}.layer.v1.tar+gzip", **blob}]})
    with pytest.raises(InvalidInput, match="damaged"):
        await store.import_archive(made.write())


async def test_a_layer_that_the_config_does_not_vouch_for(tmp_path: Path, store: ImageStore) -> None:
    """Else whoever serves a manifest could put other files under a well-known image's id."""
    made = Layout(tmp_path / "layout")
    other = made.blob(gzip.compress(LayerTar().file("evil").bytes()))
    made.image([LAYER], change={"layers": [{"mediaType": f"{OCI}.layer.v1.tar+gzip", **other}]})
    with pytest.raises(InvalidInput, match="diff_id differs"):
        await store.import_archive(made.write())


DESCRIPTOR = {"mediaType": f"{OCI}.layer.v1.tar", "digest": f"sha256:{sha256(b'')}", "size": 0}
BAD_MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "foreign layer": (
        {"layers": [{**DESCRIPTOR, "urls": ["http://x/"]}]}, r"layers\[0\] lies outside the image \(urls\)"
    ),
    "nondistributable": (
        {"layers": [{**DESCRIPTOR, "mediaType": f"{OCI}.layer.nondistributable.v1.tar"}]}, "unknown media type",
    ),
    "unknown layer": ({"layers": [{**DESCRIPTOR, "mediaType": "application/x"}]}, "unknown media type"),
    "layer of no digest": ({"layers": [{**DESCRIPTOR, "digest": "md5:123"}]}, r"layers\[0\]: 'md5:123' is no digest"),
    "path as a digest": ({"layers": [{**DESCRIPTOR, "digest": "sha256:../../etc/passwd"}]}, "is no digest"),
    "layer of no size": ({"layers": [{**DESCRIPTOR, "size": -1}]}, "size must be a number of bytes"),
    "layer is no object": ({"layers": ["x"]}, r"layers\[0\] must be an object"),
    "layers is no list": ({"layers": {}}, "layers must be a list"),
    "too many layers": ({"layers": [DESCRIPTOR] * 513}, "513 layers; the limit is 512"),
    "missing blob": ({"layers": [{**DESCRIPTOR, "digest": f"sha256:{'0' * 64}"}]}, "sha256:000000000000 is missing"),
    "artifact": ({"config": {**DESCRIPTOR, "mediaType": "application/vnd.cncf.helm.config.v1+json"}}, "an artifact"),
    "no config": ({"config": None}, "config must be an object"),
    "layer count": ({"layers": []}, "0 layers, the config names 1"),
    "media type": ({"mediaType": "application/json"}, "no image manifest"),
    "version": ({"schemaVersion": 3}, "no image manifest"),
    "schema 1": ({"schemaVersion": 1}, "schema 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MANIFESTS)
async def test_a_malformed_manifest(tmp_path: Path, store: ImageStore, case: str) -> None:
    change, message = BAD_MANIFESTS[case]
    made = Layout(tmp_path / "layout")
    made.image([LAYER], change=change)
    with pytest.raises(InvalidInput, match=message):
        await store.import_archive(made.write())


DIFF_IDS = [f"sha256:{sha256(LAYER)}"]
BAD_CONFIGS: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{", "the config is not JSON"),
    "deep JSON": (b"[" * 100_000, "the config is not JSON"),
    "no object": (b"[]", "not a JSON object"),
    "other platform": (
        json.dumps({"os": "linux", "architecture": "s390x"}).encode(), "linux/s390x; this host runs linux/amd64"
    ),
    "windows": (json.dumps({"os": "windows", "architecture": "amd64"}).encode(), "made for windows/amd64"),
    "no rootfs": (json.dumps({"os": "linux", "architecture": "amd64"}).encode(), "rootfs must be"),
    **{
        f"config.{key}": (
            json.dumps(
                {
                    "os": "linux",
                    "architecture": "amd64",
                    "rootfs": {"type": "layers", "diff_ids": DIFF_IDS},
                    "config": {key: value},
                }
            ).encode(),
            message,
        )
        for key, value, message in [
            ("Cmd", "sh", "Cmd must be a list"),
            ("Env", [1], "Env must be a list of strings"),
            ("Entrypoint", ["a\0b"], "Entrypoint must be a list of strings"),
            ("User", 0, "User must be a string"),
            ("WorkingDir", "a\0", "WorkingDir must be a string"),
            ("ExposedPorts", [], "ExposedPorts must be an object"),
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
async def test_a_malformed_config(tmp_path: Path, store: ImageStore, case: str) -> None:
    data, message = BAD_CONFIGS[case]
    made = Layout(tmp_path / "layout")
    made.image([LAYER], change={"config": {"mediaType": f"{OCI}.config.v1+json", **made.blob(data)}})
    with pytest.raises(InvalidInput, match=message):
        await store.import_archive(made.write())


async def test_documents_beyond_the_limit_are_not_read(tmp_path: Path, store: ImageStore) -> None:
    folder = layout(tmp_path / "layout", LAYER)
    (folder / "index.json").write_bytes(b" " * (9 << 20))
    with pytest.raises(InvalidInput, match="a document may have"):
        await store.import_archive(folder)


# ---- archives --------------------------------------------------------------------------------------------------------


async def test_no_such_source(tmp_path: Path, store: ImageStore) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "other.tar").write_bytes(LayerTar().file("f").bytes())
    for name, message in [
        ("nowhere", "no such file"),
        ("fifo", "neither a file nor a folder"),
        ("empty", "neither an OCI layout"),
        ("other.tar", "neither an OCI layout"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            await store.import_archive(tmp_path / name)


async def test_a_cut_archive(tmp_path: Path, store: ImageStore) -> None:
    archive = as_archive(layout(tmp_path / "layout", LAYER), tmp_path / "a.tar")
    data = archive.read_bytes()
    for size in (700, 150_000, len(data) // 2):
        archive.write_bytes(data[:size])
        with pytest.raises(InvalidInput):
            await store.import_archive(archive)


async def test_an_archive_with_a_member_twice(tmp_path: Path, store: ImageStore) -> None:
    """Two programs could take it for two different images."""
    archive = tmp_path / "a.tar"
    as_archive(layout(tmp_path / "layout", LAYER), archive)
    data = archive.read_bytes().rstrip(b"\0")
    data = data.ljust(-(-len(data) // 512) * 512, b"\0")
    archive.write_bytes(data + LayerTar().file("index.json", "{}").bytes())
    with pytest.raises(InvalidInput, match=r"index.json' is in the archive twice"):
        await store.import_archive(archive)


async def test_an_archive_with_too_many_members(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store", limits=Limits(entries=10))
    (tmp_path / "a.tar").write_bytes(many_files(11))
    with pytest.raises(ResourceExhausted, match="more than 10 members"):
        await store.import_archive(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"{", "not JSON"),
        (b"{}", "lists no image"),
        (b"[1]", "must be an object"),
        (b'[{"Config": 1}]', "Config is missing"),
        (b'[{"Config": "config.json", "Layers": {}}]', "Layers is missing"),
        (b'[{"Config": "../../etc/passwd", "Layers": []}]', "passwd is missing"),
        (b'[{"Config": "config.json", "Layers": ["../../../etc/passwd"]}]', "passwd' is missing"),
        (b'[{"Config": "config.json", "Layers": []}]', "0 layers, the config names 1"),
        (b'[{"Config": "config.json", "RepoTags": ["A B"], "Layers": []}]', "bad name part"),
    ],
)
async def test_a_malformed_docker_archive(tmp_path: Path, store: ImageStore, manifest: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        await store.import_archive(docker_archive(tmp_path / "d.tar", [LAYER], manifest=manifest))


async def test_symlinks_in_an_archive_that_lead_out_or_in_circles(tmp_path: Path, store: ImageStore) -> None:
    for link, target in (("config.json", "../../../../etc/passwd"), ("config.json", "config.json")):
        archive = LayerTar().symlink(link, target)
        archive.file("manifest.json", b'[{"Config": "config.json", "Layers": []}]')
        (tmp_path / "d.tar").write_bytes(archive.bytes())
        with pytest.raises(InvalidInput, match=r"config.json is missing"):
            await store.import_archive(tmp_path / "d.tar")


# ---- anything --------------------------------------------------------------------------------------------------------


@pytest.mark.fuzz
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=6), st.booleans())
def test_a_damaged_tar_gives_one_of_our_errors_or_none(changes: list[tuple[int, int]], fix_sums: bool) -> None:
    layer = LayerTar().file("f", b"x" * 700, pax=xattr("user.a", b"b")).symlink("s", "t" * 200).link("l", "f").dir("d")
    data = bytearray(layer.bytes())
    for place, value in changes:
        data[place % len(data)] = value
    if fix_sums:
        for at in range(0, len(data) - 511, 512):
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    reader = TarReader(ByteStream(iter([bytes(data)]), "test"), header_limit=1 << 16)
    try:
        for _ in reader.entries():
            for _ in reader.data():
                pass
    except HvError:
        pass


def test_numbers_in_base_256_are_read() -> None:
    header = raw_header(at124=b"\x80" + struct.pack(">xxxQ", 5), at108=b"\x80\0\0\0" + struct.pack(">I", 3_000_000_000))
    entries = list(TarReader(ByteStream(iter([header + b"hello".ljust(512, b"\0")]), "t"), header_limit=1).entries())
    assert (entries[0].size, entries[0].uid) == (5, 3_000_000_000)


def test_old_archives_directories_and_signed_checksums() -> None:
    header = bytearray(raw_header(at0=b"d\xe9/\0", at156=b"\0", at257=b"\0" * 8))
    assert next(TarReader(ByteStream(iter([bytes(header)]), "t"), header_limit=1).entries()).kind.value == "directory"
    signed = sum(byte - 256 if byte > 127 else byte for byte in header[:148] + header[156:]) + 8 * 32
    header[148:156] = b"%06o\0 " % signed
    assert next(TarReader(ByteStream(iter([bytes(header)]), "t"), header_limit=1).entries()).shown == "'d\\\\xe9/'"


def test_python_can_read_what_the_tests_make() -> None:
    with tarfile.open(fileobj=io.BytesIO(LAYER)) as tar:
        assert tar.getnames() == ["f"]
