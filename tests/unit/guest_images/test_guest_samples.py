"""The sample images: what skopeo, which the image store uses too, reads in them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from builder import samples as module
from builder.samples import NAMES, build_samples


def inspect(archive: Path, *flags: str) -> dict[str, Any]:
    done = subprocess.run(["skopeo", "inspect", *flags, f"oci-archive:{archive}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def layer_names(archive: Path, number: int) -> dict[str, tarfile.TarInfo]:
    """Entries of one layer, by name."""
    digest = inspect(archive)["Layers"][number]
    with tarfile.open(archive) as outer:
        blob = outer.extractfile(f"blobs/{digest.replace(':', '/')}")
        assert blob is not None
        plain = gzip.decompress(blob.read())
    with tarfile.open(fileobj=io.BytesIO(plain)) as layer:
        return {entry.name: entry for entry in layer}


def test_same_inputs_same_bytes(samples: Path, tmp_path: Path, cache: Path) -> None:
    build_samples(tmp_path / "elsewhere", cache)
    for name in NAMES:
        there, here = (folder / f"{name}.tar" for folder in (samples, tmp_path / "elsewhere"))
        assert hashlib.sha256(there.read_bytes()).digest() == hashlib.sha256(here.read_bytes()).digest(), name
    assert not build_samples(samples, cache)


@pytest.mark.parametrize("name", NAMES)
def test_skopeo_reads_it_and_copies_it(samples: Path, tmp_path: Path, name: str) -> None:
    archive = samples / f"{name}.tar"
    config = inspect(archive, "--config")
    assert (config["architecture"], config["os"]) == ("amd64", "linux")
    assert any(row.startswith("PATH=") for row in config["config"]["Env"])
    source = f"oci-archive:{archive}:podvisor/{name}:latest"
    copied = subprocess.run(["skopeo", "copy", "-q", source, f"dir:{tmp_path}"], capture_output=True, text=True)
    assert copied.returncode == 0, copied.stderr  # checks every digest on its way


def test_images_share_their_first_layer(samples: Path) -> None:
    assert len({inspect(samples / f"{name}.tar")["Layers"][0] for name in NAMES}) == 1


def test_web_says_how_it_is_run(samples: Path) -> None:
    config = inspect(samples / "web.tar", "--config")["config"]
    assert config["ExposedPorts"] == {f"{module.PORT}/tcp": {}}
    assert config["Entrypoint"] == ["busybox", "httpd"]
    assert str(module.PORT) in config["Cmd"]
    assert config["User"] == "nobody"
    assert config["WorkingDir"] == "/srv/www"
    assert "srv/www/index.html" in layer_names(samples / "web.tar", 1)


def test_busybox_has_a_shell_users_and_a_sticky_tmp(samples: Path) -> None:
    entries = layer_names(samples / "busybox.tar", 0)
    assert entries["usr/bin/sh"].linkname == "busybox"
    assert entries["bin"].linkname == "usr/bin"
    assert entries["tmp"].mode == 0o1777
    assert entries["root"].mode == 0o700
    assert {(e.uid, e.gid, e.mtime) for e in entries.values()} == {(0, 0, 0)}


def test_python_has_its_library_compiled(samples: Path) -> None:
    entries = layer_names(samples / "python.tar", 1)
    assert entries["usr/bin/python3"].linkname == "python3.11"
    library = "usr/lib/python3.11"
    assert f"{library}/http/server.py" in entries
    assert f"{library}/http/__pycache__/server.cpython-311.pyc" in entries
    assert not any(name.startswith(f"{library}/test/") for name in entries)
    assert not {"bin", "lib", "lib64"} & set(entries)  # links of the layer below
