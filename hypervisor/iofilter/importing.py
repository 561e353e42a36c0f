"""Making a disk from a file of another format, with qemu-img as the reader of formats."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from hypervisor.errors import HostUnfit, HvError, InvalidInput
from hypervisor.iofilter.descriptor import Data, Descriptor
from hypervisor.iofilter.serve import serve
from hypervisor.iofilter.spec import FilterSpec
from hypervisor.iofilter.store import DATA, DiskStore, round_size

LONGEST = 60
"""Seconds that looking at a file's header may take."""


def virtual_size(path: Path, fmt: str) -> int:
    """Bytes of the disk in a file.

    :raises InvalidInput: it is not of that format, or leans on another file (which could be any of the host's)
    """
    try:
        done = subprocess.run(
            ["qemu-img", "info", "--output=json", "-f", fmt, str(path)],
            capture_output=True,
            text=True,
            timeout=LONGEST,
            check=False,
        )
    except FileNotFoundError as error:
        raise HostUnfit("there is no qemu-img here: install qemu-utils") from error
    if done.returncode:
        raise InvalidInput(f"{path} is no {fmt} image: {done.stderr.strip()}")
    info = json.loads(done.stdout)
    if "backing-filename" in info:
        raise InvalidInput(f"{path} has a backing file ({info['backing-filename']}): flatten it with qemu-img convert")
    if info.get("format-specific", {}).get("data", {}).get("data-file"):
        raise InvalidInput(f"{path} keeps its data in another file: flatten it with qemu-img convert")
    return int(info["virtual-size"])


def import_disk(store: DiskStore, path: Path, name: str, fmt: str, filters: tuple[FilterSpec, ...]) -> int:
    """Makes disk `name` with the file's content, written through its filters.

    :return: qemu-img's exit code; when it is not 0 there is no disk
    """
    size = round_size(virtual_size(path, fmt))
    store.create(Descriptor(name, size, Data("file", DATA), filters=filters))
    command = ("qemu-img", "convert", "-p", "-n", "-f", fmt, "-O", "raw", str(path), "{}")
    try:
        status = serve(store, name, command=command)
    except HvError:
        store.remove(name)
        raise
    if status:
        store.remove(name)
    return status
