"""`GuestImage.load`: what it accepts, and that every refusal says how to mend it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypervisor.errors import HostUnfit
from hypervisor.vmm import guest
from hypervisor.vmm.guest import GuestImage


@pytest.fixture
def image(tmp_path: Path) -> Path:
    manifest: dict[str, Any] = {"version": 1, "agent_wire_version": 1}
    for part in ("kernel", "initrd", "root"):
        (tmp_path / part).write_bytes(part.encode())
        manifest[part] = {"file": part, "sha256": hashlib.sha256(part.encode()).hexdigest()}
    manifest["kernel"]["release"] = "6.1.0"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def edit(image: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = image / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_load(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HV_GUEST_DIR", str(image))
    loaded = GuestImage.load()
    expected = GuestImage(image, image / "kernel", image / "initrd", image / "root", "6.1.0", 1, loaded.digest)
    assert loaded == expected


def test_the_digest_tells_images_apart(image: Path) -> None:
    before = GuestImage.load(image).digest
    edit(image, lambda m: m.update(packages={"crun": "2"}))
    assert GuestImage.load(image).digest != before


BREAKS: dict[str, Callable[[Path], object]] = {
    "no guest image": lambda d: (d / "manifest.json").unlink(),
    "cannot read": lambda d: (d / "manifest.json").write_text("{"),
    "is not a version 1": lambda d: edit(d, lambda m: m.update(version=2)),
    "lacks or misstates 'initrd'": lambda d: edit(d, lambda m: m.pop("initrd")),
    "lacks or misstates 'release'": lambda d: edit(d, lambda m: m["kernel"].pop("release")),
    "lies outside": lambda d: edit(d, lambda m: m["root"].update(file="../root")),
    "cannot read the guest image's root": lambda d: (d / "root").unlink(),
    "differs from its manifest": lambda d: (d / "kernel").write_bytes(b"other"),
}


@pytest.mark.parametrize("says", BREAKS)
def test_refusals_say_how_to_mend(image: Path, says: str) -> None:
    BREAKS[says](image)
    with pytest.raises(HostUnfit, match=says) as caught:
        GuestImage.load(image)
    assert "make guest-image" in str(caught.value)


def test_hashed_once_for_each_content(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GuestImage.load(image)

    def refuse(*_: object) -> None:
        raise AssertionError("hashed again")

    monkeypatch.setattr(guest.hashlib, "file_digest", refuse)
    GuestImage.load(image)
    os.utime(image / "kernel", ns=(1, 1))
    with pytest.raises(AssertionError):
        GuestImage.load(image)
