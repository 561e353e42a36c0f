"""Layers applied one on the other: what docker's users expect, entry by entry."""

from __future__ import annotations

import os
import stat
import tarfile
from pathlib import Path

import pytest
from erofs_reader import Image
from imagekit import LayerTar, build, xattr


def image(tmp_path: Path, *layers: LayerTar) -> Image:
    return Image(build(tmp_path, *(layer.bytes() for layer in layers)))


def test_files_have_their_content_and_all_of_their_metadata(tmp_path: Path) -> None:
    data = os.urandom(10_000)
    layer = LayerTar().dir("d", mode=0o1777).file("d/f", data, mode=0o4751, uid=123456, gid=70000, mtime=1.25)
    found = image(tmp_path, layer)
    file = found["d/f"]
    assert file.data == data
    assert (stat.S_ISREG(file.mode), file.permissions) == (True, 0o4751)
    assert (file.uid, file.gid, file.mtime, file.nlink) == (123456, 70000, (1, 250_000_000), 1)
    assert found["d"].permissions == 0o1777


@pytest.mark.parametrize("size", [0, 1, 4031, 4032, 4033, 4095, 4096, 4097, 8191, 8192, 12288, 1 << 20, (1 << 21) + 17])
def test_files_of_every_kind_of_size(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    found = image(tmp_path, LayerTar().file("before", b"x" * 5000).file("f", data).file("after", b"y" * 5000))
    assert (found["f"].data, found["f"].size) == (data, size)
    assert (found["before"].data, found["after"].data) == (b"x" * 5000, b"y" * 5000)


def test_symlinks_keep_their_target_as_it_is(tmp_path: Path) -> None:
    long = "x/" * 2040 + "end"
    found = image(tmp_path, LayerTar().symlink("a", "/etc/../../passwd").symlink("long", long).symlink("s", "f"))
    assert found["a"].data == b"/etc/../../passwd"
    assert found["long"].data == long.encode()
    assert stat.S_ISLNK(found["a"].mode)
    assert found["a"].permissions == 0o777


def test_devices_and_fifos_are_kept(tmp_path: Path) -> None:
    layer = LayerTar().device("c", tarfile.CHRTYPE, 1, 3).device("b", tarfile.BLKTYPE, 259, 70000).fifo("p")
    found = image(tmp_path, layer)
    assert stat.S_ISCHR(found["c"].mode)
    assert found["c"].rdev == 1 << 8 | 3
    assert stat.S_ISBLK(found["b"].mode)
    assert found["b"].rdev == (70000 & 0xFF) | 259 << 8 | (70000 & ~0xFF) << 12
    assert stat.S_ISFIFO(found["p"].mode)


def test_hard_links_are_one_inode_also_across_directories_and_layers(tmp_path: Path) -> None:
    first = LayerTar().file("a/one", b"same").link("b/two", "a/one").link("/b/three", "./a/one")
    second = LayerTar().link("c/four", "b/two")
    found = image(tmp_path, first, second)
    assert {found[path].nid for path in ("a/one", "b/two", "b/three", "c/four")} == {found["a/one"].nid}
    assert found["a/one"].nlink == 4


def test_a_hard_link_outlives_the_name_it_was_made_from(tmp_path: Path) -> None:
    found = image(tmp_path, LayerTar().file("a", b"data" * 2000).link("b", "a"), LayerTar().file(".wh.a"))
    assert found.paths == ["b"]
    assert (found["b"].data, found["b"].nlink) == (b"data" * 2000, 1)


def test_hard_links_to_symlinks_and_devices(tmp_path: Path) -> None:
    found = image(tmp_path, LayerTar().symlink("s", "x").link("t", "s").fifo("p").link("q", "p"))
    assert found["s"].nid == found["t"].nid
    assert found["p"].nid == found["q"].nid


def test_replacing_one_name_of_a_hard_link_leaves_the_other(tmp_path: Path) -> None:
    found = image(tmp_path, LayerTar().file("a", "old").link("b", "a"), LayerTar().file("b", "new"))
    assert (found["a"].data, found["b"].data) == (b"old", b"new")
    assert (found["a"].nlink, found["b"].nlink) == (1, 1)


def test_extended_attributes(tmp_path: Path) -> None:
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    acl = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff"
    pax = xattr("security.capability", capability) | xattr("user.\xe4\n x", b"\0\xff\n=") | xattr("user.empty", b"")
    pax |= xattr("system.posix_acl_access", acl) | xattr("trusted.t", b"v" * 5000)
    found = image(tmp_path, LayerTar().file("f", b"data", pax=pax))
    assert found["f"].xattrs == {
        b"security.capability": capability,
        "user.\xe4\n x".encode(): b"\0\xff\n=",
        b"user.empty": b"",
        b"system.posix_acl_access": acl,
        b"trusted.t": b"v" * 5000,
    }
    assert found["f"].data == b"data"


def test_attributes_that_would_fool_the_guests_overlay_are_dropped(tmp_path: Path) -> None:
    pax = xattr("trusted.overlay.opaque", b"y") | xattr("user.overlay.redirect", b"/x") | xattr("btrfs.x", b"1")
    assert image(tmp_path, LayerTar().dir("d", pax=pax))["d"].xattrs == {}


def test_names_that_are_no_text_and_very_deep_paths(tmp_path: Path) -> None:
    odd = b"\xff\xfe \n\\\"'$(x)*\x01".decode("utf-8", "surrogateescape")
    deep = "/".join(f"{index:0>250}" for index in range(40))  # 10,000 bytes
    found = image(tmp_path, LayerTar().file(odd, "odd").file(f"{deep}/f", "deep"))
    assert found[os.fsencode(odd)].data == b"odd"
    assert found[f"{deep}/f"].data == b"deep"


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_with_long_names(tmp_path: Path, tar_format: int) -> None:
    name, target = "d" * 90 + "/" + "f" * 90, "d" * 90 + "/" + "t" * 9
    layer = LayerTar(tar_format).file(name, "x", mtime=1).symlink("s", target)
    if tar_format != tarfile.USTAR_FORMAT:
        layer.file("e" * 200, "y", uid=1 << 30).symlink("long", "t" * 3000)
    found = image(tmp_path, layer)
    assert found[name].data == b"x"
    assert found["s"].data == target.encode()
    if tar_format != tarfile.USTAR_FORMAT:
        assert (found["e" * 200].data, found["e" * 200].uid) == (b"y", 1 << 30)
        assert found["long"].data == b"t" * 3000


def test_times_before_1970_and_with_fractions(tmp_path: Path) -> None:
    layer = (
        LayerTar()
        .file("a", mtime=-1.5)
        .file("b", mtime=-3, pax={"mtime": "-3"})
        .file("c", pax={"mtime": "9.1234567899"})
    )
    found = image(tmp_path, layer)
    assert found["a"].mtime == (-2, 500_000_000)
    assert found["b"].mtime == (-3, 0)
    assert found["c"].mtime == (9, 123_456_789)


def test_the_roots_own_entry_sets_its_metadata(tmp_path: Path) -> None:
    found = image(tmp_path, LayerTar().dir("./", mode=0o711, uid=5, mtime=77).file("./f", "x"))
    assert (found[""].permissions, found[""].uid, found[""].mtime) == (0o711, 5, (77, 0))


def test_a_leading_slash_means_the_images_root(tmp_path: Path) -> None:
    """As for docker; nixpkgs' image builder writes its layers so."""
    found = image(tmp_path, LayerTar().dir("/nix").file("/nix//./f", "x").link("/g", "/nix/f"))
    assert found.paths == ["g", "nix", "nix/f"]


def test_directories_without_an_entry_are_roots_and_0755(tmp_path: Path) -> None:
    found = image(tmp_path, LayerTar().file("a/b/c", "x"))
    assert (found["a/b"].permissions, found["a/b"].uid) == (0o755, 0)
    assert (found["a"].nlink, found["a/b"].nlink, found[""].nlink) == (3, 2, 3)


def test_a_later_entry_wins_as_in_any_tar(tmp_path: Path) -> None:
    found = image(
        tmp_path, LayerTar().file("f", "old" * 5000).dir("d", mode=0o700).file("f", "new").dir("d", mode=0o711)
    )
    assert found["f"].data == b"new"
    assert found["d"].permissions == 0o711


def test_directories_merge_and_take_the_later_metadata(tmp_path: Path) -> None:
    first = LayerTar().dir("d", mode=0o700, pax=xattr("user.a", b"1")).file("d/old", "old")
    found = image(tmp_path, first, LayerTar().dir("d", mode=0o755).file("d/new", "new"))
    assert found.paths == ["d", "d/new", "d/old"]
    assert (found["d"].permissions, found["d"].xattrs) == (0o755, {})


@pytest.mark.parametrize("kind", ["file", "symlink", "fifo", "link"])
def test_a_directory_may_be_replaced_by_something_else_and_back(tmp_path: Path, kind: str) -> None:
    first = LayerTar().file("other", "o").dir("d").file("d/x/y", "z")
    second = LayerTar()
    {
        "file": lambda: second.file("d", "now a file"),
        "symlink": lambda: second.symlink("d", "other"),
        "fifo": lambda: second.fifo("d"),
        "link": lambda: second.link("d", "other"),
    }[kind]()
    assert image(tmp_path, first, second).paths == ["d", "other"]
    assert image(tmp_path, first, second, LayerTar().dir("d").file("d/new")).paths == ["d", "d/new", "other"]


def test_whiteouts_hide_files_and_whole_directories_of_lower_layers(tmp_path: Path) -> None:
    first = LayerTar().file("keep", "1").file("gone", "2").file("d/a/b", "3").symlink("s", "x").file("e/f", "4")
    second = LayerTar().file(".wh.gone").file(".wh.d").file(".wh.s").file("e/.wh.f").file(".wh.never-there")
    assert image(tmp_path, first, second).paths == ["e", "keep"]


def test_a_whiteout_spares_what_its_own_layer_brings_in_either_order(tmp_path: Path) -> None:
    first = LayerTar().file("d/old", "1").file("f", "old")
    for second in (
        LayerTar().file(".wh.d").dir("d").file("d/new", "2").file("f", "new").file(".wh.f"),
        LayerTar().dir("d").file("d/new", "2").file(".wh.d").file(".wh.f").file("f", "new"),
        LayerTar().file("d/new", "2").file(".wh.d").file("f", "new"),
    ):
        found = image(tmp_path, first, second)
        assert found.paths == ["d", "d/new", "f"]
        assert found["f"].data == b"new"


def test_a_whiteout_spares_a_link_that_its_own_layer_made_to_a_lower_file(tmp_path: Path) -> None:
    found = image(tmp_path, LayerTar().file("a", "x"), LayerTar().link("b", "a").file(".wh.a").file(".wh.b"))
    assert found.paths == ["b"]


def test_an_opaque_directory_hides_all_of_lower_layers_in_it(tmp_path: Path) -> None:
    first = LayerTar().dir("d", mode=0o700).file("d/a", "1").file("d/sub/deep", "2").file("out", "3")
    for second in (
        LayerTar().dir("d").file("d/.wh..wh..opq").file("d/new", "4").file("d/sub/fresh", "5"),
        LayerTar().file("d/new", "4").file("d/sub/fresh", "5").file("d/.wh..wh..opq"),
    ):
        found = image(tmp_path, first, second)
        assert found.paths == ["d", "d/new", "d/sub", "d/sub/fresh", "out"]


def test_aufs_bookkeeping_is_ignored(tmp_path: Path) -> None:
    assert image(tmp_path, LayerTar().file(".wh..wh.aufs").dir(".wh..wh.plnk").file("f")).paths == ["f"]


def test_an_image_without_layers_is_an_empty_root(tmp_path: Path) -> None:
    found = image(tmp_path)
    assert found.paths == []
    assert stat.S_ISDIR(found[""].mode)


def test_big_directories_span_blocks(tmp_path: Path) -> None:
    layer = LayerTar()
    names = [f"d/{index:05}-{'n' * (index % 200)}" for index in range(3000)]
    for name in names:
        layer.file(name, name)
    found = image(tmp_path, layer)
    assert found.paths == sorted(["d", *names])
    assert all(found[name].data == name.encode() for name in names)


def test_global_headers_are_ignored(tmp_path: Path) -> None:
    info = tarfile.TarInfo("ignored")
    header = info.create_pax_global_header({"comment": "made by git archive", "uid": "77"})
    found = Image(build(tmp_path, header + LayerTar().file("f", "x").bytes()))
    assert found["f"].uid == 0


def test_an_archive_that_ends_without_its_two_zero_blocks(tmp_path: Path) -> None:
    assert Image(build(tmp_path, LayerTar().file("f", "x" * 512).bytes()[:1024])).paths == ["f"]
