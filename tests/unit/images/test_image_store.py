"""The image service: import, look up, lease, remove, prune; two at once; what is left when things die midway."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from erofs_reader import Image as Disk
from imagekit import OCI, LayerTar, Layout, as_archive, build, docker_archive, layout, zstd

import hypervisor
from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound, ResourceExhausted, Unavailable
from hypervisor.images import ImageStore, Platform, ProgressEvent

LAYER = LayerTar().file("f", "content").bytes()
OTHER = LayerTar().file("g", "other").bytes()
CONFIG = {
    "Entrypoint": ["/bin/sh", "-c"],
    "Cmd": ["true"],
    "Env": ["A=1", "PATH=/bin"],
    "User": "1000:1000",
    "WorkingDir": "srv/www/.",
    "StopSignal": "SIGINT",
    "ExposedPorts": {"80/tcp": {}},
    "Volumes": {"/data": {}},
    "Labels": {"k": "v"},
}


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store", platform=Platform("amd64"))


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "lock")


def is_empty(folder: Path) -> bool:
    return tree(folder) == ["building", "disks", "staging"]


# ---- importing -------------------------------------------------------------------------------------------------------


async def test_an_oci_layout(tmp_path: Path, store: ImageStore) -> None:
    events: list[ProgressEvent] = []
    source = layout(tmp_path / "layout", LAYER, OTHER, name="podvisor/demo:1", config=CONFIG)
    [image] = await store.import_archive(source, progress=events.append)
    assert image.names == ("localhost/podvisor/demo:1",)
    assert image.serial == f"img-{image.id[:12]}"
    assert image.created == "2024-01-02T03:04:05Z"
    assert Disk(image.disk).paths == ["f", "g"]
    assert image.disk.stat().st_mode & 0o777 == 0o644
    assert image.size_bytes == image.disk.stat().st_blocks * 512
    assert [event.phase for event in events][-2:] == ["write", "done"]
    assert {event.phase for event in events} == {"unpack", "write", "done"}
    assert image == store.get("podvisor/demo:1") == store.get("demo:1") == store.get(image.id) == store.list()[0]


async def test_the_config_is_kept(tmp_path: Path, store: ImageStore) -> None:
    await store.import_archive(layout(tmp_path / "layout", LAYER, config=CONFIG), name="x")
    config = store.get("x").config
    assert (config.entrypoint, config.cmd, config.env) == (("/bin/sh", "-c"), ("true",), ("A=1", "PATH=/bin"))
    assert (config.user, config.workdir, config.stop_signal) == ("1000:1000", "/srv/www", "SIGINT")
    assert (config.exposed_ports, config.volumes, config.labels) == (("80/tcp",), ("/data",), {"k": "v"})


async def test_a_config_may_be_nearly_empty(tmp_path: Path, store: ImageStore) -> None:
    source = layout(tmp_path / "layout", config={"Cmd": None, "Env": None, "Labels": None, "User": None})
    [image] = await store.import_archive(source)
    assert (image.config.cmd, image.config.workdir, image.config.stop_signal, image.names) == ((), "/", None, ())


@pytest.mark.parametrize("compression", ["", "+gzip", "+zstd"])
async def test_layers_of_every_compression(tmp_path: Path, store: ImageStore, compression: str) -> None:
    big = LayerTar().file("big", os.urandom(3 << 20) + bytes(3 << 20)).bytes()
    [image] = await store.import_archive(layout(tmp_path / "layout", big, OTHER, compression=compression))
    assert image.disk.read_bytes()[1152:] == build(tmp_path, big, OTHER).read_bytes()[1152:]


async def test_gzip_in_several_members_and_a_media_type_that_lies(tmp_path: Path, store: ImageStore) -> None:
    made = Layout(tmp_path / "layout")
    members = gzip.compress(LAYER[:700]) + gzip.compress(b"") + gzip.compress(LAYER[700:])
    made.image([LAYER], change={"layers": [{"mediaType": f"{OCI}.layer.v1.tar", **made.blob(members)}]})
    [image] = await store.import_archive(made.write())
    assert Disk(image.disk).paths == ["f"]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
async def test_an_oci_archive(tmp_path: Path, store: ImageStore, compress: Any) -> None:
    archive = as_archive(layout(tmp_path / "layout", LAYER, name="quay.io/a/b:2"), tmp_path / "a.tar")
    archive.write_bytes(compress(archive.read_bytes()))
    [image] = await store.import_archive(str(archive))
    assert image.names == ("quay.io/a/b:2",)
    assert tree(tmp_path / "store/staging") == []


async def test_a_docker_archive(tmp_path: Path, store: ImageStore) -> None:
    archive = docker_archive(tmp_path / "d.tar", [LAYER, OTHER], tags=["demo:1", "quay.io/x/y:2"])
    [image] = await store.import_archive(archive)
    assert image.names == ("docker.io/library/demo:1", "quay.io/x/y:2")
    assert image.config.cmd == ("sh",)
    assert Disk(image.disk).paths == ["f", "g"]
    assert store.get("demo:1") == image


async def test_a_docker_archive_whose_images_share_layers_by_links(tmp_path: Path, store: ImageStore) -> None:
    archive = docker_archive(tmp_path / "d.tar", [LAYER, LAYER])
    other = LayerTar().file("a/layer.tar", LAYER).symlink("b/layer.tar", "../a/layer.tar").link("c", "b/layer.tar")
    manifest = [{"Config": "config.json", "RepoTags": None, "Layers": ["c", "b/layer.tar"]}]
    with tarfile.open(archive) as tar:
        config = tar.extractfile("config.json")
        assert config is not None
        other.file("config.json", config.read()).file("manifest.json", json.dumps(manifest))
    archive.write_bytes(other.bytes())
    [image] = await store.import_archive(archive)
    assert Disk(image.disk).paths == ["f"]


async def test_the_image_for_this_platform_is_chosen_from_an_index(tmp_path: Path, store: ImageStore) -> None:
    made = Layout(tmp_path / "layout")
    arm = {**made.image([OTHER], architecture="arm64"), "platform": {"os": "linux", "architecture": "arm64"}}
    amd = {**made.image([LAYER]), "platform": {"os": "linux", "architecture": "amd64"}}
    newer = {**made.image([OTHER], config=CONFIG), "platform": {**amd["platform"], "variant": "v3"}}
    note = {**made.image([]), "platform": {"os": "unknown", "architecture": "unknown"}}
    inner = made.document({"schemaVersion": 2, "manifests": [note, newer, arm, amd]}, f"{OCI}.index.v1+json")
    made.manifests = [{**inner, "annotations": {"io.containerd.image.name": "docker.io/library/multi:1"}}]
    [image] = await store.import_archive(made.write())
    assert image.names == ("docker.io/library/multi:1",)
    assert image.digest == inner["digest"]
    assert Disk(image.disk).paths == ["f"]
    elsewhere = ImageStore(tmp_path / "s390", platform=Platform("s390x"))
    with pytest.raises(InvalidInput, match=r"no image for linux/s390x, only for: linux/amd64, linux/arm64"):
        await elsewhere.import_archive(made.folder)
    assert is_empty(tmp_path / "s390")


async def test_indexes_nested_too_deep(tmp_path: Path, store: ImageStore) -> None:
    made = Layout(tmp_path / "layout")
    inner = made.image([LAYER])
    for _ in range(4):
        inner = made.document({"schemaVersion": 2, "manifests": [inner]}, f"{OCI}.index.v1+json")
    made.manifests = [inner]
    with pytest.raises(InvalidInput, match="nested deeper"):
        await store.import_archive(made.write())


async def test_several_images_are_stored_all_or_none(tmp_path: Path, store: ImageStore) -> None:
    made = Layout(tmp_path / "layout")
    made.image([LAYER], name="one:1")
    broken = made.image([OTHER], name="two:1", change={"layers": []})
    with pytest.raises(InvalidInput):
        await store.import_archive(made.write())
    assert is_empty(tmp_path / "store")
    made.manifests.remove(broken)
    made.image([OTHER], name="two:1")
    images = await store.import_archive(made.write())
    assert {image.names for image in images} == {("localhost/one:1",), ("localhost/two:1",)}
    with pytest.raises(InvalidInput, match="holds 2 images; a name can be given to one only"):
        await store.import_archive(made.folder, name="x")


async def test_a_layout_of_another_version_or_without_images(tmp_path: Path, store: ImageStore) -> None:
    folder = Layout(tmp_path / "layout").write()
    with pytest.raises(InvalidInput, match="lists no image"):
        await store.import_archive(folder)
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "2.0"}')
    with pytest.raises(InvalidInput, match=r"version '2\.0'"):
        await store.import_archive(folder)
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0"}')
    (folder / "index.json").unlink()
    with pytest.raises(InvalidInput, match=r"index.json is missing"):
        await store.import_archive(folder)


async def test_bad_names_are_refused_before_anything_is_read(tmp_path: Path, store: ImageStore) -> None:
    with pytest.raises(InvalidInput, match="bad name part"):
        await store.import_archive(tmp_path / "nowhere", name="A B")
    with pytest.raises(InvalidInput, match="named by a tag"):
        await store.import_archive(tmp_path / "nowhere", name="x@sha256:" + "0" * 64)


async def test_the_same_image_again_is_not_built_again(tmp_path: Path, store: ImageStore) -> None:
    source = layout(tmp_path / "layout", LAYER)
    [first] = await store.import_archive(source, name="one")
    events: list[ProgressEvent] = []
    [second] = await store.import_archive(source, name="two", progress=events.append)
    assert [event.phase for event in events] == ["done"]
    assert second.disk == first.disk
    assert second.names == ("localhost/one:latest", "localhost/two:latest")


async def test_two_who_want_one_image_at_once_build_it_once(tmp_path: Path, store: ImageStore) -> None:
    big = LayerTar().file("big", os.urandom(8 << 20)).bytes()
    source = layout(tmp_path / "layout", big, compression="")
    other = ImageStore(tmp_path / "store", platform=Platform("amd64"))
    events: list[ProgressEvent] = []
    await asyncio.gather(
        *(
            one.import_archive(source, name=f"n{index}", progress=events.append)
            for index, one in enumerate([store, other])
        )
    )
    assert sum(event.phase == "write" for event in events) == 1
    assert store.get("n0").names == ("localhost/n0:latest", "localhost/n1:latest")
    assert tree(tmp_path / "store/building") == []


# ---- names -----------------------------------------------------------------------------------------------------------


async def test_lookups_prefer_imported_images_then_samples_then_dockers(tmp_path: Path, store: ImageStore) -> None:
    for index, name in enumerate(["docker.io/library/x:latest", "podvisor/x", "x"]):
        layer = LayerTar().file(f"file{index}").bytes()
        await store.import_archive(layout(tmp_path / f"layout{index}", layer), name=name)
        assert Disk(store.get("x").disk).paths == [f"file{index}"]
    assert Disk(store.get("docker.io/library/x").disk).paths == ["file0"]
    assert Disk(store.get("docker.io/x:latest").disk).paths == ["file0"]


async def test_by_digest(tmp_path: Path, store: ImageStore) -> None:
    [image] = await store.import_archive(layout(tmp_path / "layout", LAYER), name="quay.io/a/b:1")
    assert store.get(f"quay.io/a/b@{image.digest}") == image
    for missing in (f"quay.io/a/c@{image.digest}", "quay.io/a/b@sha256:" + "0" * 64):
        with pytest.raises(NotFound):
            store.get(missing)


async def test_by_id(tmp_path: Path, store: ImageStore) -> None:
    [image] = await store.import_archive(layout(tmp_path / "layout", LAYER))
    assert store.get(image.id[:12]) == store.get(f"sha256:{image.id[:4]}") == image
    twin = tmp_path / "store/disks" / (image.id[:20] + "0" * 44)
    twin.mkdir()
    with pytest.raises(Conflict, match="give more digits"):
        store.get(image.id[:12])
    for missing in ("0" * 12, "sha256:0000", "nowhere"):
        with pytest.raises(NotFound, match="is not here; get it with: hv image pull"):
            store.get(missing)


async def test_a_name_may_move_and_leave_its_image_without_one(tmp_path: Path, store: ImageStore) -> None:
    [first] = await store.import_archive(layout(tmp_path / "one", LAYER), name="x")
    [second] = await store.import_archive(layout(tmp_path / "two", OTHER), name="x")
    assert store.get("x").id == second.id
    assert store.get(first.id).names == ()
    assert [image.id for image in store.list()] == [second.id, first.id]
    assert [image.id for image in store.prune(set(), dangling_only=True)] == [first.id]


# ---- removing --------------------------------------------------------------------------------------------------------


async def test_removing_names_and_with_the_last_one_the_image(tmp_path: Path, store: ImageStore) -> None:
    source = layout(tmp_path / "layout", LAYER)
    await store.import_archive(source, name="one")
    [image] = await store.import_archive(source, name="two")
    assert store.remove("one") is None
    assert store.get("two").names == ("localhost/two:latest",)
    removed = store.remove("two")
    assert removed is not None
    assert removed.id == image.id
    assert tree(tmp_path / "store") == ["building", "disks", "names.json", "staging"]
    with pytest.raises(NotFound):
        store.remove("two")


async def test_removing_by_id_removes_all_names(tmp_path: Path, store: ImageStore) -> None:
    source = layout(tmp_path / "layout", LAYER)
    await store.import_archive(source, name="one")
    [image] = await store.import_archive(source, name="two")
    assert store.remove(image.short_id) is not None
    assert store.list() == []


async def test_an_image_in_use_stays(tmp_path: Path, store: ImageStore) -> None:
    [image] = await store.import_archive(layout(tmp_path / "layout", LAYER), name="x")
    other = ImageStore(tmp_path / "store")
    with store.lease("x") as lease, store.lease(image) as second:
        assert lease.image == image
        second.release()
        for remover in (store, other):
            with pytest.raises(Conflict, match="in use by a pod"):
                remover.remove("x")
            assert remover.prune(set()) == []
        assert store.get("x") == image
    lease.release()
    assert other.prune({image.id}) == other.prune({f"sha256:{image.id}"}) == []
    assert [gone.id for gone in other.prune(set())] == [image.id]
    with pytest.raises(NotFound, match="is being removed"):
        store.lease(image)
    with pytest.raises(NotFound):
        store.lease("x")


# ---- pull policies (what needs a registry is in tests/integration/test_images.py) ------------------------------------


async def test_what_is_here_is_not_asked_for(tmp_path: Path, store: ImageStore) -> None:
    [image] = await store.import_archive(layout(tmp_path / "layout", LAYER), name="podvisor/x")
    assert await store.pull("x") == await store.pull("x", policy="never") == image
    assert await store.pull("localhost/podvisor/x", policy="always") == image
    assert await store.pull(image.id, policy="Always") == image


async def test_what_is_not_here_and_must_not_be_pulled(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="pull policy is never"):
        await store.pull("x", policy="Never")
    with pytest.raises(NotFound, match=r"names under localhost/ are imported: hv image import"):
        await store.pull("localhost/x")
    with pytest.raises(InvalidInput, match="bad name part"):
        await store.pull("A B")
    assert is_empty(tmp_path / "store")


# ---- things that die -------------------------------------------------------------------------------------------------


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """An image that takes a while."""
    layer = LayerTar()
    for index in range(20_000):
        layer.file(f"d{index // 100}/{index}", b"x" * 3000)
    return layout(tmp_path / "layout", layer.bytes())


async def test_cancelling_an_import_leaves_nothing(tmp_path: Path, store: ImageStore, big: Path) -> None:
    started = asyncio.Event()
    task = asyncio.create_task(store.import_archive(big, progress=lambda _event: started.set()))
    await started.wait()
    before = children()
    assert len(before) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == []
    assert is_empty(tmp_path / "store")
    assert len(await store.import_archive(big)) == 1


def children() -> list[int]:
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def kill_an_import(folder: Path, source: Path) -> int:
    """Start an import in a process of its own and SIGKILL that in the middle; a pidfd of its worker."""
    program = (
        "import asyncio, sys; from pathlib import Path; from hypervisor.images import ImageStore, Platform\n"
        "store = ImageStore(Path(sys.argv[1]), platform=Platform('amd64'))\n"
        "asyncio.run(store.import_archive(sys.argv[2], progress=lambda event: print(event.phase, flush=True)))\n"
    )
    argv = [sys.executable, "-c", program, folder, source]
    environment = {**os.environ, "PYTHONPATH": str(Path(hypervisor.__file__).parents[1])}
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        [worker] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        alive = os.pidfd_open(int(worker))
        process.send_signal(signal.SIGKILL)
    return alive


async def test_killed_in_the_middle_the_next_one_sweeps(tmp_path: Path, big: Path) -> None:
    folder = tmp_path / "store"
    worker = await asyncio.to_thread(kill_an_import, folder, big)
    assert tree(folder / "staging") != []
    try:
        await wait_exit(worker)
    finally:
        os.close(worker)
    store = await ImageStore.open(folder, platform=Platform("amd64"))
    assert is_empty(folder)
    assert len(await store.import_archive(big)) == 1


async def wait_exit(pidfd: int) -> None:
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, gone.set)
    try:
        await asyncio.wait_for(gone.wait(), 10)
    finally:
        loop.remove_reader(pidfd)


async def test_a_living_makers_staging_is_not_swept(tmp_path: Path, store: ImageStore, big: Path) -> None:
    started = asyncio.Event()
    task = asyncio.create_task(store.import_archive(big, progress=lambda _event: started.set()))
    await started.wait()
    await ImageStore.open(tmp_path / "store")
    assert len(await task) == 1


async def test_damaged_state_is_repaired_at_open(tmp_path: Path, store: ImageStore) -> None:
    folder = tmp_path / "store"
    [good] = await store.import_archive(layout(tmp_path / "one", LAYER), name="good")
    [cut] = await store.import_archive(layout(tmp_path / "two", OTHER), name="cut")
    cut.disk.write_bytes(b"")
    assert [image.id for image in store.list()] == [good.id]
    (folder / "disks/unfinished").mkdir()
    (folder / "building/left").touch()
    store = await ImageStore.open(folder)
    assert tree(folder / "disks") == [good.id, f"{good.id}/disk.erofs", f"{good.id}/image.json"]
    assert list(json.loads((folder / "names.json").read_text())["names"]) == ["localhost/good:latest"]
    (folder / "names.json").write_text("{")
    assert store.get(good.id).names == ()
    assert (folder / "names.damaged").read_text() == "{"
    await store.import_archive(tmp_path / "one", name="good")
    assert store.get("good").id == good.id


async def test_a_worker_that_dies_is_reported_with_its_last_words(
    tmp_path: Path, store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\ncat >/dev/null; echo 'Fatal error' >&2; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(HvError, match=r"died \(exit status 3\): Fatal error"):
        await store.import_archive(layout(tmp_path / "layout", LAYER))
    assert is_empty(tmp_path / "store")


@pytest.mark.root
async def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    source = layout(tmp_path / "layout", LayerTar().file("f", os.urandom(4 << 20)).bytes())
    with tmpfs(tmp_path / "full", "2m") as full:
        store = ImageStore(full / "store", platform=Platform("amd64"))
        with pytest.raises(ResourceExhausted, match=r"no room for the image .* \(No space left on device\): free some"):
            await store.import_archive(source)
        assert is_empty(full / "store")
        archive = as_archive(source, tmp_path / "a.tar")
        archive.write_bytes(gzip.compress(archive.read_bytes()))
        with pytest.raises(ResourceExhausted, match="no room"):
            await store.import_archive(archive)
        assert is_empty(full / "store")


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.root
def test_an_unprivileged_user_gets_the_same_disk(tmp_path: Path) -> None:
    """Owners, devices and trusted attributes too: nothing is made on the host's file system."""
    layer = LayerTar().device("null", tarfile.CHRTYPE, 1, 3).file("f", "x", uid=0, mode=0o4755).bytes()
    expected = build(tmp_path, layer).read_bytes()
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o777)
    mine.chmod(0o777)
    parents = [tmp_path, *tmp_path.parents]
    modes = [(path, path.stat().st_mode) for path in parents if path.stat().st_uid == 0 and path != Path("/")]
    for path, mode in modes:
        path.chmod(mode | 0o755)
    os.seteuid(65534)
    try:
        made = build(mine, layer)
    finally:
        os.seteuid(0)
        for path, mode in modes:
            path.chmod(mode)
    assert made.read_bytes() == expected
    assert made.stat().st_uid == 65534


def test_a_store_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot keep images in"):
        ImageStore(tmp_path / "file")
