"""Fetching, with a stand-in for skopeo that plays registries: lying, stalling, of many platforms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from imagekit import OCI, LayerTar, Layout, sha256

from hypervisor.errors import InvalidInput, Timeout
from hypervisor.images import Credentials, ImageStore, Platform, ProgressEvent, fetch, skopeo

NAME = "registry.example/demo:1"
INSPECT = r"""
for last; do :; done
case "$*" in
    *inspect*) exec cat "$ROOT/$(echo "$last" | tr '/:@' '___')" ;;
esac
"""
COPY = r"""
mkdir -p "${last#dir:}"
cp "$ROOT"/blobs/sha256/* "${last#dir:}"
"""


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """Documents under their names in files, blobs in a layout."""
    monkeypatch.setattr(skopeo, "_PREFIX", (str(tmp_path / "skopeo"),))
    monkeypatch.setenv("ROOT", str(tmp_path / "registry"))
    monkeypatch.setenv("HOME", str(tmp_path))
    behave(tmp_path, INSPECT + COPY)
    return Layout(tmp_path / "registry")


def behave(folder: Path, program: str) -> None:
    (folder / "skopeo").write_text(f"#!/bin/sh\n{program}")
    (folder / "skopeo").chmod(0o755)


def serve(registry: Layout, name: str, data: bytes) -> None:
    (registry.folder / f"docker://{name}".translate(str.maketrans("/:@", "___"))).write_bytes(data)


def blob(registry: Layout, descriptor: dict[str, str]) -> bytes:
    return (registry.folder / "blobs/sha256" / descriptor["digest"].removeprefix("sha256:")).read_bytes()


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store", platform=Platform("amd64"))


LAYER = LayerTar().file("f", "x").bytes()


async def test_an_index_leads_to_this_platforms_manifest(registry: Layout, store: ImageStore) -> None:
    amd = {**registry.image([LAYER]), "platform": {"os": "linux", "architecture": "amd64"}}
    arm = {**registry.image([], architecture="arm64"), "platform": {"os": "linux", "architecture": "arm64"}}
    index = json.dumps({"schemaVersion": 2, "mediaType": f"{OCI}.index.v1+json", "manifests": [arm, amd]}).encode()
    serve(registry, NAME, index)
    serve(registry, f"registry.example/demo@{amd['digest']}", blob(registry, amd))
    events: list[ProgressEvent] = []
    image = await store.pull(NAME, progress=events.append, credentials=Credentials("u", "p"))
    assert image.digest == f"sha256:{sha256(index)}"
    assert image.names == (NAME,)
    assert {event.detail for event in events if event.phase == "download"} == {f"registry.example/demo@{amd['digest']}"}


async def test_a_registry_that_sends_another_manifest_than_the_pinned_one(
    registry: Layout, store: ImageStore, tmp_path: Path
) -> None:
    pinned = f"registry.example/demo@sha256:{'0' * 64}"
    serve(registry, pinned, blob(registry, registry.image([LAYER])))
    with pytest.raises(InvalidInput, match="the registry sent something else, with digest sha256:"):
        await store.pull(pinned)
    assert [path.name for path in (tmp_path / "store/staging").iterdir()] == []


async def test_a_registry_that_sends_other_layers(registry: Layout, store: ImageStore) -> None:
    manifest = blob(registry, registry.image([LAYER]))
    serve(registry, NAME, manifest)
    path = registry.folder / "blobs/sha256" / json.loads(manifest)["layers"][0]["digest"].removeprefix("sha256:")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InvalidInput, match="damaged"):
        await store.pull(NAME)
    path.unlink()
    with pytest.raises(InvalidInput, match="is missing"):
        await store.pull(NAME)
    assert store.list() == []


async def test_a_manifest_that_is_too_large(registry: Layout, store: ImageStore) -> None:
    registry.image([])
    serve(registry, NAME, b" " * (9 << 20))
    with pytest.raises(InvalidInput, match="a manifest of 9437184 bytes"):
        await store.pull(NAME)


async def test_a_helm_chart_is_no_image(registry: Layout, store: ImageStore) -> None:
    config = {"mediaType": "application/vnd.cncf.helm.config.v1+json", **registry.blob(b"{}")}
    serve(registry, NAME, blob(registry, registry.image([], change={"config": config})))
    with pytest.raises(
        InvalidInput, match=r"image registry.example/demo:1 is not of a container image but of an artifact"
    ):
        await store.pull(NAME)


async def test_a_download_that_stalls(
    registry: Layout, store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_STALL_S", 0.3)
    serve(registry, NAME, blob(registry, registry.image([LAYER])))
    behave(tmp_path, INSPECT + "exec sleep 1000")
    with pytest.raises(Timeout, match="nothing has arrived for"):
        await store.pull(NAME)
    assert [path.name for path in (tmp_path / "store/staging").iterdir()] == []


def test_files_that_are_renamed_while_they_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "gone").symlink_to("nowhere")
    assert fetch._arrived(tmp_path) == 3
