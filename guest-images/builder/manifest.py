"""manifest.json: what the image consists of, with digests; the host reads it to find and to check the files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from builder.debs import sha256_of

VERSION = 1
_PARTS = ("kernel", "kernel_compressed", "initrd", "root")


def describe(
    folder: Path, *, release: str, packages: Mapping[str, str], modules: Sequence[str], wire_version: int
) -> dict[str, Any]:
    """The manifest of the files in `folder`.

    :param packages: Debian versions by package name
    :param modules: kernel modules in the order in which init loads them
    """
    return {
        "version": VERSION,
        "kernel": {**_file(folder / "vmlinux"), "release": release},
        "kernel_compressed": {**_file(folder / "vmlinuz"), "release": release},
        "initrd": _file(folder / "initrd.img"),
        "root": _file(folder / "root.erofs"),
        "packages": dict(sorted(packages.items())),
        "modules": list(modules),
        "agent_wire_version": wire_version,
    }


def write(path: Path, manifest: Mapping[str, Any]) -> None:
    """Writes it, readable for people too."""
    path.write_text(json.dumps(manifest, indent=2) + "\n")


def damaged_files(folder: Path) -> list[str]:
    """Files that are missing or differ from their digests in the manifest; `manifest.json` itself if unreadable."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        parts = [manifest[part] for part in _PARTS]
        wrong = [part["file"] for part in parts if not _matches(folder / part["file"], part)]
    except (OSError, ValueError, KeyError, TypeError):
        return ["manifest.json"]
    return wrong


def _file(path: Path) -> dict[str, Any]:
    return {"file": path.name, "sha256": sha256_of(path), "size": path.stat().st_size}


def _matches(path: Path, part: Mapping[str, Any]) -> bool:
    return path.is_file() and sha256_of(path) == part["sha256"]
