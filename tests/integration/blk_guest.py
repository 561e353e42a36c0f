"""A real Linux guest whose /init works on raw disks (tests/c/blk/guest.c)."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

from hypervisor.vmm.guest import GuestImage

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests/c/blk/guest.c"


def build_initrd(folder: Path, initrd: Path) -> Path:
    """The guest image's initramfs with another /init: archives may simply follow each other, the later file wins."""
    root = folder / "root"
    root.mkdir()
    subprocess.run(["gcc", "-O2", "-static", "-o", root / "init", SOURCE], check=True)
    cpio = ["cpio", "--quiet", "-o", "-H", "newc"]
    archive = subprocess.run(cpio, input=b"init\n", cwd=root, stdout=subprocess.PIPE, check=True).stdout
    made = folder / "blk-initrd.img"
    made.write_bytes(initrd.read_bytes() + archive)
    return made


def blk_guest(folder: Path) -> GuestImage:
    """The guest image with that initramfs, made in `folder`."""
    image = GuestImage.load()
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    return dataclasses.replace(image, initrd=build_initrd(folder, image.initrd))
