"""The guest image: kernel, initramfs and root of every pod VM, as ``make guest-image`` lays them down.

``manifest.json`` beside the files names them with their digests. They are checked once for each (size, mtime): a
start is not slowed by hashing 40 MB, and a half-built or foreign image is still refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypervisor.errors import HostUnfit

MANIFEST_VERSION = 1
_MEND = "run `make guest-image`"
_verified: dict[tuple[str, int, int, int], str] = {}


@dataclass(frozen=True, slots=True)
class GuestImage:
    """Checked files of one guest image.

    :param release: the kernel's ``uname -r``
    :param wire_version: the protocol version that its agent speaks
    :param digest: of the manifest, and so of everything that it names
    """

    directory: Path
    kernel: Path
    initrd: Path
    root: Path
    release: str
    wire_version: int
    digest: str = ""

    @classmethod
    def load(cls, directory: Path | None = None) -> GuestImage:
        """The image in `directory` (default: `default_directory`), its digests verified. Blocks on disk reads.

        :raises HostUnfit: a file is missing, unreadable or differs from the manifest; says how to mend it
        """
        directory = (directory or default_directory()).absolute()
        manifest = _read_manifest(directory)
        try:
            files = {part: _verify(directory, part, manifest[part]) for part in ("kernel", "initrd", "root")}
            return cls(
                directory, release=str(manifest["kernel"]["release"]),
                wire_version=int(manifest["agent_wire_version"]), digest=_digest_of(manifest), **files,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as e:
            raise HostUnfit(f"{directory / 'manifest.json'} lacks or misstates {e}: {_MEND}") from e


def default_directory() -> Path:
    """``HV_GUEST_DIR``, else ``guest-images/out`` of the checkout that this package runs from."""
    if chosen := os.environ.get("HV_GUEST_DIR"):
        return Path(chosen)
    return Path(__file__).resolve().parents[2] / "guest-images" / "out"


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise HostUnfit(f"no guest image in {directory}: {_MEND}") from e
    except (OSError, ValueError) as e:
        raise HostUnfit(f"cannot read the guest image's manifest {path}: {e}: {_MEND}") from e
    if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION:
        raise HostUnfit(f"{path} is not a version {MANIFEST_VERSION} manifest: {_MEND}")
    return manifest


def _verify(directory: Path, part: str, entry: dict[str, Any]) -> Path:
    name = str(entry["file"])
    path = directory / name
    if Path(name).name != name:
        raise HostUnfit(f"the guest image's {part} lies outside its directory ({name!r}): {_MEND}")
    try:
        digest = _digest(path)
    except OSError as e:
        raise HostUnfit(f"cannot read the guest image's {part} {path}: {e.strerror}: {_MEND}") from e
    if digest != entry["sha256"]:
        raise HostUnfit(f"the guest image's {part} {path} differs from its manifest's digest: {_MEND}")
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        key = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
        if key not in _verified:
            _verified[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return _verified[key]
