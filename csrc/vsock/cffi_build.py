"""Builds the extension module ``hypervisor.vsock._vsock`` from this folder; setup.py names it."""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def declarations() -> str:
    """vsock.h without what cffi does not read: the header stays the one place that declares the interface."""
    text = (HERE / "vsock.h").read_text()
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def sources() -> list[str]:
    """Relative to the root, as setuptools wants them; sorted, so that the build is the same every time."""
    shared = [*HERE.parent.glob("vhost/*.c"), HERE.parent / "common" / "iov.c"]
    return sorted(str(path.relative_to(ROOT)) for path in [*HERE.glob("*.c"), *shared])


ffibuilder = FFI()
ffibuilder.cdef(declarations())
# cffi releases the GIL around every call into the library, so pv_vsock_run may block in a thread of its own.
ffibuilder.set_source(
    "hypervisor.vsock._vsock",
    '#include "vsock/vsock.h"',
    sources=sources(),
    include_dirs=["csrc"],
    depends=sorted(
        str(path.relative_to(ROOT))
        for path in [*HERE.glob("*.h"), *HERE.parent.glob("common/*.h"), *HERE.parent.glob("vhost/*.h")]
    ),
    extra_compile_args=["-O2", "-g", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-fstack-protector-strong"],
    py_limited_api=False,
)

if __name__ == "__main__":
    import os

    os.chdir(ROOT)
    ffibuilder.compile(verbose=True)
