"""Whether a chain would do: put together over an empty disk, and thrown away. Nothing of it is left."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypervisor.iofilter.descriptor import Data, Descriptor
from hypervisor.iofilter.loop import DiskLoop, create_state
from hypervisor.iofilter.spec import FilterSpec

SIZE = 1 << 20


def try_chain(filters: tuple[FilterSpec, ...], *, read_only: bool = False) -> None:
    """Blocks for some milliseconds.

    :raises InvalidInput: there is no such filter, the order of classes is broken, or a setting is wrong
    """
    Descriptor("trial", SIZE, Data("file", "data.raw"), read_only=read_only, filters=filters)
    with tempfile.TemporaryDirectory(prefix="hv-trial-") as name, DiskLoop(spin_ns=0) as loop:
        folder = Path(name)
        fd = os.memfd_create("trial", os.MFD_CLOEXEC)
        os.ftruncate(fd, SIZE)
        disk = loop.open_fd(f"trial {folder.name}", fd, read_only=read_only)
        try:
            for spec in reversed(filters):
                create_state(spec.kind, spec.resolved(folder), SIZE)
                disk.add(spec.kind, spec.name, spec.resolved(folder))
        finally:
            disk.close()
