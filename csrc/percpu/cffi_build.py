"""Builds the extension module ``hypervisor.percpu._percpu`` from this folder; setup.py names it."""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOURCES = ("area.c", "face.c", "ring.c", "rseq.c", "slow.c", "trace.c")


def declarations() -> str:
    """face.h without what cffi does not read: the header stays the one place that declares the interface."""
    text = re.sub(r"/\*.*?\*/", "", (HERE / "face.h").read_text(), flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


ffibuilder = FFI()
ffibuilder.cdef(declarations())
# cffi releases the GIL around every call into the library: threads of Python really run beside each other here.
ffibuilder.set_source(
    "hypervisor.percpu._percpu",
    '#include "percpu/face.h"',
    sources=[str((HERE / name).relative_to(ROOT)) for name in SOURCES],
    include_dirs=["csrc"],
    depends=sorted(str(path.relative_to(ROOT)) for path in [*HERE.glob("*.h"), *HERE.parent.glob("common/*.h")]),
    extra_compile_args=["-O2", "-g", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-fstack-protector-strong"],
    py_limited_api=False,
)

if __name__ == "__main__":
    import os

    os.chdir(ROOT)
    ffibuilder.compile(verbose=True)
