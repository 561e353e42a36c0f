"""Builds ``hypervisor.iofilter._iofilter``: disks, filters, NBD and the vhost-user-blk device; setup.py names it."""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

CSRC = Path(__file__).resolve().parent.parent
ROOT = CSRC.parent
INTERFACE = ("iofilter/disks.h", "blk/blk.h", "blk/guest.h")
PARTS = ("iofilter/*", "iofilter/filters/*/*", "nbd/*", "common/*", "blk/*", "vhost/*")


def declarations() -> str:
    """The interface headers without what cffi does not read: a header stays what declares its interface."""
    text = "\n".join((CSRC / name).read_text() for name in INTERFACE)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def files(suffix: str) -> list[str]:
    """Relative to the root, as setuptools wants them; sorted, so that the build is the same every time."""
    return sorted(str(path.relative_to(ROOT)) for part in PARTS for path in CSRC.glob(part + suffix))


ffibuilder = FFI()
ffibuilder.cdef(declarations())
# cffi releases the GIL around every call into the library, so pv_disks_run may block in a thread of its own.
ffibuilder.set_source(
    "hypervisor.iofilter._iofilter",
    "\n".join(f'#include "{name}"' for name in INTERFACE),
    sources=files(".c"),
    include_dirs=["csrc"],
    libraries=["uring", "crypto", "m"],
    depends=files(".h"),
    extra_compile_args=["-O2", "-g", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-fstack-protector-strong"],
    py_limited_api=False,
)

if __name__ == "__main__":
    import os

    os.chdir(ROOT)
    ffibuilder.compile(verbose=True)
